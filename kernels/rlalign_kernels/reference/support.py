"""The kept support of a truncated row: top-k, then top-p on what is left, then min-p. Ties go to the lowest id.

top-k keeps the k first in the order (logit descending, id ascending); top-p renormalises over those and keeps each id
whose predecessors' probability stays below p (so the crossing one is kept); min-p drops ids less likely than min_p
times the most likely one. Every sum has a fixed order: a prefix sum by doubling steps, in float32.
"""

from __future__ import annotations

import torch

from rlalign_kernels.reference.elementwise import elementwise
from rlalign_kernels.rows import SamplingRows


def kept_support(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """bool [r, V] of temperature-scaled logits float32 [r, V]. Rows with every filter off keep all finite ids."""
    kept = logits > -torch.inf
    if bool(((rows.top_k > 0) | (rows.top_p < 1)).any()):
        kept &= _top(logits, rows)
    if bool((rows.min_p > 0).any()):
        exps = elementwise("exp", logits - logits.amax(1, keepdim=True), inplace=True)
        kept &= exps >= rows.min_p.unsqueeze(1)
    return kept


def _top(logits: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Top-k and top-p together, in sorted order, scattered back to ids."""
    vocab_size = logits.shape[1]
    ordered, ids = torch.sort(logits, dim=1, descending=True, stable=True)
    rank = torch.arange(vocab_size, device=logits.device)
    limit = torch.where(rows.top_k > 0, rows.top_k, vocab_size).unsqueeze(1)
    kept = rank < limit
    if bool((rows.top_p < 1).any()):
        exps = elementwise("exp", ordered - ordered[:, :1], inplace=True).masked_fill_(~kept, 0.0)
        totals = prefix_sum(exps)
        before = torch.cat((totals.new_zeros(totals.shape[0], 1), totals[:, :-1]), dim=1)
        kept &= (before < rows.top_p.unsqueeze(1) * totals[:, -1:]) | (rows.top_p >= 1).unsqueeze(1)
    return torch.zeros_like(kept).scatter_(1, ids, kept)


def prefix_sum(x: torch.Tensor) -> torch.Tensor:
    """Inclusive prefix sum over the last axis by doubling steps: additions only, the order set by the width."""
    step = 1
    while step < x.shape[-1]:
        shifted = x.clone()
        shifted[..., step:] += x[..., :-step]
        x, step = shifted, 2 * step
    return x
