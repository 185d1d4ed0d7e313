"""Proximal policy optimisation with a critic.

    policy loss = sum_t w_t ( -c_t surrogate_t - entropy_coef * H_t )
    value loss  = sum_t (1/N) * 1/2 max( (v_t - R_t)^2, (clip(v_t, v_old_t - c, v_old_t + c) - R_t)^2 )
    rewards     : r_t = -kl_coef (old_t - ref_t), plus the sequence's reward at its last token
    whitening   : (A - mean) / (std + eps), population statistics over all tokens of the batch

w_t is 1/N or 1/(S L_s) (``aggregation``), c_t the weight of ``corrections``, 1 without one; the value loss is always a
token mean. N, S count the whole optimizer batch.
KL to a reference enters through the rewards, not the loss: the critic then values it too.
"""

from __future__ import annotations

import math

import torch

from rlalign.algorithms.aggregation import Aggregation, Denominators, token_weights
from rlalign.algorithms.metrics import Metric, mean_of, sum_of
from rlalign.algorithms.surrogate import clipped_surrogate


def policy_loss(
    train_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    entropy: torch.Tensor,
    *,
    sequence_lengths: torch.Tensor,
    denominators: Denominators,
    clip_low: float,
    clip_high: float,
    aggregation: Aggregation = "token_mean",
    entropy_coef: float = 0.0,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """One micro-batch's share of the policy loss (float32 scalar) and its metrics. Inputs as in ``grpo.loss``."""
    surrogate = clipped_surrogate(
        train_logprobs, old_logprobs, advantages, clip_low=clip_low, clip_high=clip_high, weights=weights
    )
    token_loss = -surrogate.values
    if entropy_coef > 0.0:
        token_loss = token_loss - entropy_coef * entropy
    weighted = token_loss * token_weights(sequence_lengths, denominators, aggregation)
    return weighted.sum(), {**surrogate.metrics, "entropy": mean_of(entropy), "loss": sum_of(weighted)}


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    *,
    denominators: Denominators,
    value_clip: float,
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """One micro-batch's share of the clipped value loss (float32 scalar); all inputs float32 [N].

    The larger of both errors is taken, so the clip can only hold an update back, never reward one.
    """
    for name, tensor in (("old_values", old_values), ("returns", returns)):
        if tensor.shape != values.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(values.shape)}")
    old_values, returns = old_values.detach(), returns.detach()
    near_old = torch.minimum(torch.maximum(values, old_values - value_clip), old_values + value_clip)
    error, clipped_error = (values - returns).square(), (near_old - returns).square()
    # Multiplied by 1/N in float32 like the policy's token_mean, so that both round alike.
    share = (0.5 * torch.maximum(error, clipped_error) * (1.0 / denominators.tokens)).sum()
    metrics = {
        "critic/loss": Metric("sum", float(share.detach()), values.numel()),
        "critic/clip_frac": mean_of(clipped_error > error),
        "critic/value": mean_of(values),
        "critic/squared_error": mean_of(error),
    }
    return share, metrics


def token_rewards(
    reward: float,
    length: int,
    *,
    old_logprobs: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None,
    kl_coef: float = 0.0,
) -> torch.Tensor:
    """Per-token rewards of one sequence, float32 [L]: the sequence's reward falls due at its last token."""
    rewards = torch.zeros(length, dtype=torch.float32)
    if kl_coef > 0.0:
        if old_logprobs is None or ref_logprobs is None:
            raise ValueError(f"kl_coef={kl_coef} needs old_logprobs and ref_logprobs of every token")
        rewards -= kl_coef * (old_logprobs - ref_logprobs)
    if length:
        rewards[-1] += reward
    return rewards


def whiten(advantages: torch.Tensor, *, eps: float = 1e-8) -> torch.Tensor:
    """Advantages of all tokens of the batch, [N], to mean 0 and standard deviation 1; float32 [N].

    The sums behind both are correctly rounded (``math.fsum``): the order of tokens reaches nothing.
    """
    exact = advantages.double()
    centred = exact - math.fsum(exact.tolist()) / len(exact)
    std = math.sqrt(math.fsum(centred.square().tolist()) / len(exact))
    return (centred / (std + eps)).float()
