"""Importance weights for tokens that the rollout drew under other log-probs than the trainer's.

    rho_t = exp(old_t - rollout_t),   w_t = min(rho_t, cap),   c_t = w_t, or 0 where t is left out

The loss is an expectation under the trainer's policy, the samples are the rollout's: w_t makes up for the difference,
and its cap bounds the variance (truncated importance sampling). Left out is a token with rho_t beyond a bound on either
side (masked importance sampling), and a sequence with a token that the trainer finds far less likely (a veto): there
the two sides did not compute the same thing, and no weight makes up for that. A constant: no gradient flows through it.
Where both sides have the same bits, c_t is exactly 1 and the loss keeps every bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlalign.algorithms.metrics import Metric, max_of, mean_of
from rlalign.config import Correction


def importance_weights(
    old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, lengths: Sequence[int], correction: Correction
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """c_t float32 [N] of float32 [N] log-probs, ``correction/is/{mean,max,truncated_frac}`` of w_t, and
    ``correction/rs/{token,sequence,veto}_frac``: shares left out of the tokens, of the sequences in part or whole, and
    of the sequences by a veto.

    old_logprobs: the trainer's, under the weights that sampled. lengths: tokens of each sequence, one after another. A
    ratio that overflows is one above the cap; where a log-prob is NaN so is the weight, left out or not.
    Raises ValueError for shapes that differ.
    """
    if old_logprobs.shape != rollout_logprobs.shape:
        raise ValueError(
            f"rollout_logprobs has shape {tuple(rollout_logprobs.shape)}; expected {tuple(old_logprobs.shape)}"
        )
    if sum(lengths) != len(old_logprobs):
        raise ValueError(f"lengths add up to {sum(lengths)}; there are {len(old_logprobs)} tokens")
    ratio = torch.exp(old_logprobs.detach() - rollout_logprobs.detach())
    weights = ratio.clamp(max=correction.cap)
    out, vetoed = torch.zeros_like(ratio, dtype=torch.bool), ratio.new_zeros(len(lengths), dtype=torch.bool)
    touched = vetoed
    if (bound := correction.reject_beyond) is not None:
        out |= (ratio > bound) | (ratio < 1 / bound)
    if correction.veto_below is not None:
        vetoed = _any(ratio < correction.veto_below, lengths)
        out |= vetoed.repeat_interleave(torch.tensor(lengths, dtype=torch.int64, device=vetoed.device))
    if bound is not None or correction.veto_below is not None:
        touched = _any(out, lengths)
    return weights.masked_fill(out & ~ratio.isnan(), 0.0), {
        "correction/is/mean": mean_of(weights),
        "correction/is/max": max_of(weights),
        "correction/is/truncated_frac": mean_of(ratio > correction.cap),
        "correction/rs/token_frac": mean_of(out),
        "correction/rs/sequence_frac": mean_of(touched),
        "correction/rs/veto_frac": mean_of(vetoed),
    }


def _any(tokens: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """bool [B] of bool [N]: whether any token of the sequence is."""
    found = [part.any() for part in tokens.split(list(lengths))]
    return torch.stack(found) if found else tokens.new_zeros(0)
