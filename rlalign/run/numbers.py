"""What a step logs of its samples and its seconds, beside what the verifier and the trainer log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlalign.records import Sample


def reward_numbers(samples: Sequence[Sample]) -> dict[str, float]:
    """``reward/*`` and ``response_length/*``."""
    rewards = np.array([sample.reward for sample in samples], np.float64)
    lengths = np.array([len(sample.completion.token_ids) for sample in samples], np.float64)
    cut = np.array([sample.completion.finish_reason == "length" for sample in samples])
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/min": float(rewards.min()),
        "reward/max": float(rewards.max()),
        "response_length/mean": float(lengths.mean()),
        "response_length/max": float(lengths.max()),
        "response_length/cut_frac": float(cut.mean()),
    }


def speed_numbers(
    samples: Sequence[Sample],
    seconds: Mapping[str, float],
    stats: Mapping[str, float],
    *,
    compute: Mapping[str, Any],
    epochs: int,
) -> dict[str, float]:
    """``perf/*``. seconds: of every phase. stats: what the engines counted. compute: of the run's facts."""
    tokens = sum(len(sample.completion.token_ids) for sample in samples)
    total = sum(sample.num_tokens for sample in samples)
    return {
        **{f"perf/seconds/{name}": value for name, value in seconds.items()},
        **{f"perf/{name}": float(value) for name, value in stats.items()},
        "perf/step_seconds": sum(seconds.values()),
        "perf/rollout_tokens_per_s": tokens / seconds["rollout"],
        "perf/train_tokens_per_s": total / seconds["train"],
        **_utilisation(samples, seconds, compute, epochs),
    }


def _utilisation(
    samples: Sequence[Sample], seconds: Mapping[str, float], compute: Mapping[str, Any], epochs: int
) -> dict[str, float]:
    """``perf/mfu``, where the device's peak is known."""
    if compute.get("peak_tflops") is None:
        return {}
    lengths = [(sample.num_tokens, len(sample.completion.token_ids)) for sample in samples]
    flops = training_flops(compute["policy"], lengths)
    if compute["critic"] is not None:  # its head is one row
        flops += training_flops({**compute["critic"], "head": 0}, lengths)
    busy = seconds["train"] + seconds["update"]
    return {"perf/mfu": epochs * flops / busy / (compute["peak_tflops"] * 1e12)}


def training_flops(size: Mapping[str, int], lengths: Sequence[tuple[int, int]]) -> float:
    """Model FLOPs of a forward and a backward over sequences of (tokens, response tokens), of a model of ``size``
    (``Policy.size``).

    A multiplication and an addition are two, a backward is two forwards, a causal layer sees half of all pairs. What is
    computed a second time, to check or to save memory, does not count.
    """
    forward = sum(
        2 * (size["weights"] * tokens + size["head"] * responses) + size["attention"] * tokens**2
        for tokens, responses in lengths
    )
    return 3.0 * forward
