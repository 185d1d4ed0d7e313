"""The clipped surrogate that GRPO and PPO share, and the drift metrics that ship with it.

    r_t = exp(train_t - old_t)
    surrogate_t = min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)

No denominator here: one number per token; see ``aggregation``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlalign.algorithms.metrics import Metric, max_of, mean_of, min_of


@dataclass(frozen=True, slots=True)
class Surrogate:
    """values: float32 [N], to be maximised; metrics: how far the policy drifted from the one that sampled."""

    values: torch.Tensor
    metrics: dict[str, Metric]


def clipped_surrogate(
    train_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    weights: torch.Tensor | None = None,
) -> Surrogate:
    """Per-token surrogate of float32 [N] inputs; gradient flows to ``train_logprobs`` only.

    weights: of ``corrections``, multiplied with each token's surrogate after the clip; None for no correction.

    Under the weights that sampled every ratio is exactly 1 and the gradient plain REINFORCE.
    Metrics, over tokens: ``clip_frac`` (the clipped branch was taken, so the token has no gradient),
    ``ratio/{min,mean,max}`` before any clip, ``approx_kl`` = mean(r - 1 - log r), which estimates KL(old || train).
    """
    _require_same_length(train_logprobs, old_logprobs=old_logprobs, advantages=advantages)
    log_ratio = train_logprobs - old_logprobs.detach()
    ratio = torch.exp(log_ratio)
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    advantages = advantages.detach()
    unclipped_term, clipped_term = ratio * advantages, clipped * advantages
    metrics = {
        "clip_frac": mean_of(clipped_term < unclipped_term),
        "ratio/min": min_of(ratio),
        "ratio/mean": mean_of(ratio),
        "ratio/max": max_of(ratio),
        "approx_kl": mean_of(ratio - 1.0 - log_ratio),
    }
    values = torch.minimum(unclipped_term, clipped_term)
    if weights is not None:
        _require_same_length(train_logprobs, weights=weights)
        values = weights.detach() * values
    return Surrogate(values, metrics)


def k3(train_logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Per-token estimate of KL(train || ref) from samples of train: e^d - d - 1 with d = ref - train, float32 [N].

    Never negative, and its gradient in ``train_logprobs`` is 1 - e^d.
    """
    _require_same_length(train_logprobs, ref_logprobs=ref_logprobs)
    difference = ref_logprobs.detach() - train_logprobs
    return torch.exp(difference) - difference - 1.0


def _require_same_length(train_logprobs: torch.Tensor, **others: torch.Tensor) -> None:
    """A [1] or [] tensor would broadcast silently; every input has one entry per token."""
    if train_logprobs.dim() != 1:
        raise ValueError(f"train_logprobs has shape {tuple(train_logprobs.shape)}; expected one axis, [N]")
    for name, tensor in others.items():
        if tensor.shape != train_logprobs.shape:
            expected = tuple(train_logprobs.shape)
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {expected}, one per token")
