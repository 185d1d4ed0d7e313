"""Learning rate as a pure function of the update's number.

warm-up:   base * (step + 1) / warmup_steps                     for step < warmup_steps
constant:  base
cosine:    base * (m + (1 - m) * (1 + cos(pi * p)) / 2)         p from 0 (warm-up's end) to 1 (the last update)
"""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    step: int,
    *,
    base: float,
    total_steps: int,
    warmup_steps: int = 0,
    schedule: Literal["constant", "cosine"] = "constant",
    min_lr_ratio: float = 0.1,
) -> float:
    """Learning rate of update ``step`` (from 0). ``total_steps`` counts optimizer updates, warm-up included.

    A cosine past its end stays at its floor ``base * min_lr_ratio``.
    """
    if step < 0 or total_steps < 1:
        raise ValueError(f"step={step}, total_steps={total_steps}: expected step >= 0 and total_steps >= 1")
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    if schedule == "constant":
        return base
    if schedule != "cosine":
        raise ValueError(f"schedule={schedule!r} is not supported: use 'constant' or 'cosine'")
    # The last update, total_steps - 1, is where the floor is reached.
    span = max(total_steps - 1 - warmup_steps, 1)
    progress = min((step - warmup_steps) / span, 1.0)
    return base * (min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress)))
