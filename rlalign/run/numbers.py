"""What a step logs of its samples and its seconds, beside what the verifier and the trainer log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    samples: Sequence[Sample], seconds: Mapping[str, float], stats: Mapping[str, float]
) -> dict[str, float]:
    """``perf/*``. seconds: of every phase. stats: what the engines counted."""
    tokens = sum(len(sample.completion.token_ids) for sample in samples)
    total = sum(sample.num_tokens for sample in samples)
    return {
        **{f"perf/seconds/{name}": value for name, value in seconds.items()},
        **{f"perf/{name}": float(value) for name, value in stats.items()},
        "perf/step_seconds": sum(seconds.values()),
        "perf/rollout_tokens_per_s": tokens / seconds["rollout"],
        "perf/train_tokens_per_s": total / seconds["train"],
    }
