"""Importance weights for tokens that the rollout drew under other log-probs than the trainer's.

    rho_t = exp(old_t - rollout_t),   w_t = min(rho_t, cap)

The loss is an expectation under the trainer's policy, the samples are the rollout's: w_t makes up for the difference,
and its cap bounds the variance (truncated importance sampling). A constant: no gradient flows through it. Where both
sides have the same bits, w_t is exactly 1 and the loss keeps every bit.
"""

from __future__ import annotations

import torch

from rlalign.algorithms.metrics import Metric, max_of, mean_of


def truncated_weights(
    old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, *, cap: float
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """w_t float32 [N] of float32 [N] log-probs, and ``correction/is/{mean,max,truncated_frac}`` of them.

    old_logprobs: the trainer's, under the weights that sampled. A log-prob that is not finite gives a weight that is
    none either. Raises ValueError for a cap below 1 and for shapes that differ.
    """
    if not cap >= 1.0:
        raise ValueError(f"cap={cap}: a weight of 1 must be possible, so that agreement changes nothing; use cap >= 1")
    if old_logprobs.shape != rollout_logprobs.shape:
        raise ValueError(
            f"rollout_logprobs has shape {tuple(rollout_logprobs.shape)}; expected {tuple(old_logprobs.shape)}"
        )
    ratio = torch.exp(old_logprobs.detach() - rollout_logprobs.detach())
    weights = ratio.clamp(max=cap)
    return weights, {
        "correction/is/mean": mean_of(weights),
        "correction/is/max": max_of(weights),
        "correction/is/truncated_frac": mean_of(ratio > cap),
    }
