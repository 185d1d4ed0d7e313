"""Group-relative policy optimisation: clipped surrogate, optional KL to a reference, optional entropy bonus.

    loss = sum_t w_t ( -c_t surrogate_t + kl_coef * k3_t - entropy_coef * H_t )

with surrogate and k3 of ``surrogate``, c_t the weight of ``corrections`` (1 without one), H_t the entropy of the
sampling distribution at token t, and w_t of ``aggregation``: 1/N (token_mean) or 1/(S L_s) (sequence_mean), both over
the whole optimizer batch. The advantages are those of ``advantages.group_normalized``, one per sequence, repeated over
its tokens.
"""

from __future__ import annotations

import torch

from rlalign.algorithms.aggregation import Aggregation, Denominators, token_weights
from rlalign.algorithms.metrics import Metric, mean_of, sum_of
from rlalign.algorithms.surrogate import clipped_surrogate, k3


def loss(
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
    ref_logprobs: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """One micro-batch's share of the loss (float32 scalar; shares add up to the batch's loss), and its metrics.

    All inputs are float32 [N] over response tokens but ``sequence_lengths``, int64 [N]: the response length of the
    sequence that the token belongs to. weights: c_t, None for no correction. Gradient flows to
    ``train_logprobs`` and ``entropy``.
    Raises ValueError for shapes that differ, and for exactly one of ``kl_coef`` and ``ref_logprobs``.
    """
    if (kl_coef > 0.0) != (ref_logprobs is not None):
        given = "missing" if ref_logprobs is None else "given"
        raise ValueError(f"kl_coef={kl_coef} with ref_logprobs {given}: a KL term needs both, no KL term neither")
    surrogate = clipped_surrogate(
        train_logprobs, old_logprobs, advantages, clip_low=clip_low, clip_high=clip_high, weights=weights
    )
    metrics = dict(surrogate.metrics)
    token_loss = -surrogate.values
    if ref_logprobs is not None:
        kl = k3(train_logprobs, ref_logprobs)
        token_loss = token_loss + kl_coef * kl
        metrics["kl_ref"] = mean_of(kl)
    # Without a bonus the entropy stays out of the graph: its backward is another pass over the vocabulary.
    if entropy_coef > 0.0:
        token_loss = token_loss - entropy_coef * entropy
    weighted = token_loss * token_weights(sequence_lengths, denominators, aggregation)
    metrics["entropy"] = mean_of(entropy)
    metrics["loss"] = sum_of(weighted)
    return weighted.sum(), metrics
