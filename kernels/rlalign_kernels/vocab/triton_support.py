"""The kept support of truncated rows on a GPU, from the very logits that are scored: top-k, top-p, min-p.

The definition is reference/support.py's. Rows are ordered by their logits before temperature, which orders nothing
anew. Sums have a fixed order; PyTorch's sort is stable and its exp sees one element at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rlalign_kernels.reference.support import prefix_sum
from rlalign_kernels.rows import SamplingRows
from rlalign_kernels.vocab.triton_launches import Head, logits

# Logits held at a time, with what sorting them takes about 48 bytes each.
_MOST_LOGITS = 2**23


def find_support(
    hidden: torch.Tensor, head: Head, rows: SamplingRows | None, banned: torch.Tensor | None, everything: bool
) -> torch.Tensor | None:
    """bool [T, V] (all but banned ids for untruncated rows), or None if that is everything and not asked for."""
    truncated = rows is not None and rows.any_truncated
    if not truncated:
        if banned is not None:
            return ~banned
        shape = (hidden.shape[0], head.vocab_size)
        return torch.ones(shape, dtype=torch.bool, device=hidden.device) if everything else None
    support = torch.ones(hidden.shape[0], head.vocab_size, dtype=torch.bool, device=hidden.device)
    if banned is not None:
        torch.logical_not(banned, out=support)
    index = rows.truncated.nonzero().squeeze(1)
    for part in few_rows(index, head.vocab_size):
        support[part] = kept_ids(hidden[part], head, rows[part], None if banned is None else banned[part])
    return support


def few_rows(index: torch.Tensor, vocab_size: int) -> Iterator[torch.Tensor]:
    """``index`` [n] in pieces whose logits may be held."""
    yield from index.split(max(1, _MOST_LOGITS // vocab_size))


def kept_ids(hidden: torch.Tensor, head: Head, rows: SamplingRows, banned: torch.Tensor | None) -> torch.Tensor:
    """bool [r, V] of truncated rows. Waits for the device."""
    x = logits(hidden.contiguous(), head)
    if banned is not None:
        x.masked_fill_(banned, -torch.inf)
    temperature = torch.where(rows.greedy, 1.0, rows.temperature).unsqueeze(1)
    kept = x > -torch.inf
    if bool(((rows.top_k > 0) | (rows.top_p < 1)).any()):
        kept &= _top(x, temperature, rows)
    if bool((rows.min_p > 0).any()):
        weights = ((x - x.amax(1, keepdim=True)) / temperature).exp_()
        kept &= weights >= rows.min_p.unsqueeze(1)
    return kept


def _top(x: torch.Tensor, temperature: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Top-k and top-p together, in sorted order, scattered back to ids."""
    ordered, ids = torch.sort(x, dim=1, descending=True, stable=True)
    limit = torch.where(rows.top_k > 0, rows.top_k, x.shape[1]).unsqueeze(1)
    kept = torch.arange(x.shape[1], device=x.device) < limit
    if bool((rows.top_p < 1).any()):
        weights = ((ordered - ordered[:, :1]) / temperature).exp_().masked_fill_(~kept, 0.0)
        totals = prefix_sum(weights)
        before = torch.cat((totals.new_zeros(totals.shape[0], 1), totals[:, :-1]), dim=1)
        kept &= (before < rows.top_p.unsqueeze(1) * totals[:, -1:]) | (rows.top_p >= 1).unsqueeze(1)
    return torch.zeros_like(kept).scatter_(1, ids, kept)
