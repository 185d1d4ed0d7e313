"""Which ids truncated rows keep on a GPU, from the very logits that are scored: top-k, top-p, min-p.

The definition is reference/support.py's. Each filter keeps the first ids in the order of descending logits, ascending
ids among equals, so what a row keeps is known by the last of them: two numbers, whatever V. Rows are ordered by their
logits before temperature, which orders nothing anew. Sums have a fixed order; PyTorch's sort is stable and its exp sees
one element at a time.
"""

from __future__ import annotations

import torch

from rlalign_kernels.reference.support import prefix_sum
from rlalign_kernels.rows import SamplingRows
from rlalign_kernels.vocab.triton_launches import Cut, Head, logits

# Logits held at a time, and what they take with sorting and summing them.
_MOST_LOGITS = 2**23
MOST_SORTING_BYTES = 64 * _MOST_LOGITS


def find_cut(
    hidden: torch.Tensor,
    head: Head,
    rows: SamplingRows | None,
    banned: torch.Tensor | None,
    support: torch.Tensor | None = None,
) -> Cut | None:
    """None if no row is truncated, which the device may be asked for; else it is waited for.

    support: bool [T, V], whose truncated rows are filled; the others say already what they keep.
    """
    if rows is None or not rows.any_truncated:
        return None
    num_rows, device = hidden.shape[0], hidden.device
    cut = Cut(
        torch.full((num_rows,), -torch.inf, dtype=torch.float32, device=device),
        torch.full((num_rows,), head.vocab_size, dtype=torch.int32, device=device),
    )
    for part in rows.truncated.nonzero().squeeze(1).split(max(1, _MOST_LOGITS // head.vocab_size)):
        x = logits(hidden[part].contiguous(), head)
        if banned is not None:
            x.masked_fill_(banned[part], -torch.inf)
        own = _cut(x, rows[part])
        cut.limit[part], cut.last[part] = own
        if support is not None:
            support[part] = _kept(x, own)
    return cut


def _kept(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    """bool [r, V]: what the cut leaves of logits [r, V]; an id of logit -inf or NaN is never kept."""
    limit, last = cut.limit.unsqueeze(1), cut.last.unsqueeze(1)
    ids = torch.arange(x.shape[1], device=x.device)
    return (x > -torch.inf) & ((x > limit) | ((x == limit) & (ids <= last)))


def _cut(x: torch.Tensor, rows: SamplingRows) -> Cut:
    """Of truncated rows' logits [r, V]."""
    temperature = torch.where(rows.greedy, 1.0, rows.temperature).unsqueeze(1)
    limit, last = x.amin(1), torch.full_like(x[:, 0], x.shape[1], dtype=torch.int32)
    if bool(((rows.top_k > 0) | (rows.top_p < 1)).any()):
        limit, last = _top(x, temperature, rows)
    if bool((rows.min_p > 0).any()):
        weights = ((x - x.amax(1, keepdim=True)) / temperature).exp_()
        least = torch.where(weights >= rows.min_p.unsqueeze(1), x, torch.inf).amin(1)
        last = torch.where(least > limit, x.shape[1], last)
        limit = torch.maximum(limit, least)
    return Cut(limit, last)


def _top(x: torch.Tensor, temperature: torch.Tensor, rows: SamplingRows) -> Cut:
    """Top-k and top-p together: the id before the first that is left out."""
    ordered, ids = torch.sort(x, dim=1, descending=True, stable=True)
    place = torch.arange(x.shape[1], device=x.device)
    kept = place < torch.where(rows.top_k > 0, rows.top_k, x.shape[1]).unsqueeze(1)
    if bool((rows.top_p < 1).any()):
        weights = ((ordered - ordered[:, :1]) / temperature).exp_().masked_fill_(~kept, 0.0)
        totals = prefix_sum(weights)
        before = torch.cat((totals.new_zeros(totals.shape[0], 1), totals[:, :-1]), dim=1)
        kept &= (before < rows.top_p.unsqueeze(1) * totals[:, -1:]) | (rows.top_p >= 1).unsqueeze(1)
    # of a row of NaN none is kept
    end = (torch.where(kept, x.shape[1], place).amin(1, keepdim=True) - 1).clamp(min=0)
    return Cut(ordered.gather(1, end).squeeze(1), ids.gather(1, end).squeeze(1).int())
