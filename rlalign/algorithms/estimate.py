"""From rewarded samples to per-token advantages: what a recipe calls between rollout and update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlalign.algorithms.advantages import gae, group_normalized
from rlalign.algorithms.ppo import token_rewards, whiten
from rlalign.config import AlgorithmConfig
from rlalign.records import Sample


@dataclass(frozen=True, slots=True)
class Estimate:
    """advantages: float32 [L] per sample, in the caller's order; returns: the critic's targets, None for GRPO.

    no_signal_frac: share of GRPO's groups whose samples all have one reward, and so 0 as their advantage.
    """

    advantages: list[np.ndarray]
    returns: list[np.ndarray] | None = None
    no_signal_frac: float | None = None


def estimate_grpo(samples: Sequence[Sample], algorithm: AlgorithmConfig) -> Estimate:
    """Group-normalised advantages, each repeated over its sample's tokens. Groups are (step, prompt)."""
    groups: dict[tuple[int, int], int] = {}
    ids = [groups.setdefault(sample.key[:2], len(groups)) for sample in samples]
    rewards = torch.tensor([sample.reward for sample in samples], dtype=torch.float64)
    advantages = group_normalized(rewards, ids, normalize_std=algorithm.normalize_std).numpy()
    told_apart = {group for group, advantage in zip(ids, advantages, strict=True) if advantage != 0.0}
    return Estimate(
        [np.full(_length(s), a, dtype=np.float32) for s, a in zip(samples, advantages, strict=True)],
        no_signal_frac=(len(groups) - len(told_apart)) / len(groups),
    )


def estimate_gae(
    samples: Sequence[Sample],
    algorithm: AlgorithmConfig,
    values: Sequence[np.ndarray],
    *,
    old_logprobs: Sequence[np.ndarray] | None = None,
    ref_logprobs: Sequence[np.ndarray] | None = None,
) -> Estimate:
    """GAE advantages, whitened over the batch's tokens, and returns (not whitened).

    values: float32 [L] per sample, of the critic before the update. old_logprobs, ref_logprobs: the trainer's own and
    the reference's, for the KL in the rewards: both with kl_coef > 0, neither without. ValueError otherwise.
    """
    for name, given in (("old_logprobs", old_logprobs), ("ref_logprobs", ref_logprobs)):
        if (given is not None) != (algorithm.kl_coef > 0.0):
            verb = "would not use" if given is not None else "needs"
            raise ValueError(f"kl_coef={algorithm.kl_coef} {verb} {name} of every sample")
    nothing = [None] * len(samples)
    pairs = [
        gae(_rewards(sample, algorithm, old, ref), torch.from_numpy(value),
            gamma=algorithm.gamma, gae_lambda=algorithm.gae_lambda)
        for sample, value, old, ref in zip(
            samples, values, old_logprobs or nothing, ref_logprobs or nothing, strict=True
        )
    ]  # fmt: skip
    whitened = whiten(torch.cat([advantages for advantages, _ in pairs]))
    parts = whitened.split([_length(sample) for sample in samples])
    return Estimate([part.numpy() for part in parts], [returns.numpy() for _, returns in pairs])


def _rewards(
    sample: Sample, algorithm: AlgorithmConfig, old_logprobs: np.ndarray | None, ref_logprobs: np.ndarray | None
) -> torch.Tensor:
    if not np.isfinite(sample.reward):
        raise ValueError(f"sample {sample.key}: reward {sample.reward} is not finite")
    return token_rewards(
        sample.reward,
        _length(sample),
        old_logprobs=None if old_logprobs is None else torch.from_numpy(old_logprobs),
        ref_logprobs=None if ref_logprobs is None else torch.from_numpy(ref_logprobs),
        kl_coef=algorithm.kl_coef,
    )


def _length(sample: Sample) -> int:
    return len(sample.completion.token_ids)
