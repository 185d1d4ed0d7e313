"""Measure at start-up what a run's operators may do on this machine, instead of at first use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from rlalign_kernels.conformance import CONFORMANCE
from rlalign_kernels.reference.attention import schedules
from rlalign_kernels.reference.elementwise import FUNCTIONS, elementwise
from rlalign_kernels.reference.gemm import N_BLOCK, ROW_TILE, gemm_schedule
from rlalign_kernels.reference.vocab import VOCAB_BLOCK


def probe(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    """Probe every (operator, shape) and return all verdicts of this process, JSON-ready.

    Shapes: ("linear", (N, K)), ("linear_logprob", (V, H)), ("attention", (D, Dv)). Element-wise functions are always
    probed. Raises RuntimeError naming operator and shape where this machine offers no invariant schedule, ValueError
    for an unknown operator.
    """
    for operator, shape in shapes:
        if operator == "linear":
            _probe_columns(shape[0], shape[1], N_BLOCK)
        elif operator == "linear_logprob":
            _probe_columns(shape[0], shape[1], VOCAB_BLOCK)
        elif operator == "attention":
            schedules(shape[0], shape[1])
        else:
            raise ValueError(f"probe: operator {operator!r} is unknown; supported: linear, linear_logprob, attention")
    for name in FUNCTIONS:
        elementwise(name, torch.ones(1))
    return CONFORMANCE.report()


def _probe_columns(width: int, depth: int, block: int) -> None:
    for size in {min(width, block), width % block or min(width, block)}:
        gemm_schedule(max(size, ROW_TILE), depth)
