"""Forwards over given token ids: which rows stand beside each other, and where their keys and values are.

One place for whoever needs other forwards than a training step or an engine's: scoring in many ways, recording every
module's output, the checks within a run. Legend: T rows of a forward, N rows of all sequences that belong to a token
("canonical", sequence after sequence).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlalign.modeling.context import AttentionContext, PackedContext, PagedContext
from rlalign.modeling.policy import Policy

PADDING = -1


@dataclass(frozen=True, slots=True)
class Feed:
    """What one sequence puts into the model.

    token_ids, position_ids: int64 [n]. canonical: bool [n], False for padding. prompt_length: rows before those of the
    response, padding included. name: what an error calls it. older: so many first rows are computed by the weights that
    were there before the policy's.
    """

    token_ids: np.ndarray
    position_ids: np.ndarray
    canonical: np.ndarray
    prompt_length: int
    name: str
    older: int = 0

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Forward:
    """One call of ``Policy.hidden``. rows: int64 [T], each row's place among the N canonical ones; PADDING for none.
    older: the call is another policy's, which has the weights before; what it computes is in the caches."""

    token_ids: Tensor
    position_ids: Tensor
    context: AttentionContext
    rows: np.ndarray
    older: bool = False


def canonical_rows(feeds: Sequence[Feed]) -> list[np.ndarray]:
    """Of every feed, int64 [n]: each row's place among the N canonical ones of all feeds; PADDING for none."""
    starts = np.cumsum([0, *(int(feed.canonical.sum()) for feed in feeds)])
    return [
        np.where(feed.canonical, start + np.cumsum(feed.canonical) - 1, PADDING)
        for feed, start in zip(feeds, starts[:-1].tolist(), strict=True)
    ]


def row_groups(feeds: Sequence[Feed], max_rows: int) -> Iterator[list[int]]:
    """Indices of feeds that share a forward of at most ``max_rows`` rows; a longer feed is alone."""
    group: list[int] = []
    total = 0
    for index, feed in enumerate(feeds):
        if group and total + feed.num_rows > max_rows:
            yield group
            group, total = [], 0
        group.append(index)
        total += feed.num_rows
    if group:
        yield group


def packed_forward(policy: Policy, members: Sequence[tuple[Feed, np.ndarray]]) -> Forward:
    """Whole sequences, one after another: what a trainer runs. members: a feed and its ``canonical_rows``."""
    lengths = [feed.num_rows for feed, _ in members]
    offsets = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=policy.device)
    return Forward(
        token_ids=_tensor([feed.token_ids for feed, _ in members], policy),
        position_ids=_tensor([feed.position_ids for feed, _ in members], policy),
        context=PackedContext(offsets, max(lengths)),
        rows=np.concatenate([rows for _, rows in members]),
    )


def paged_forwards(
    policy: Policy, members: Sequence[tuple[Feed, np.ndarray]], pieces: Sequence[Sequence[int]], *, page_size: int
) -> Iterator[Forward]:
    """Pieces of all members beside each other against a cache of their own, as an engine runs them; before them the
    pieces that are of older weights.

    pieces: of each member, ascending bounds of the rows that one forward takes, from 0 to its number of rows; where
    its older rows end is one of them.
    """
    page = page_size
    tables, caches = _caches(policy, [feed.num_rows for feed, _ in members], page)
    ends = [list(bounds).index(feed.older) for bounds, (feed, _) in zip(pieces, members, strict=True)]
    older = [bounds[: end + 1] for bounds, end in zip(pieces, ends, strict=True)]
    newer = [bounds[end:] for bounds, end in zip(pieces, ends, strict=True)]
    steps = [(part, step) for part in (older, newer) for step in range(max(map(len, part)) - 1)]
    for half, step in steps:
        active = [i for i, bounds in enumerate(half) if step < len(bounds) - 1]
        spans = [slice(half[i][step], half[i][step + 1]) for i in active]
        lengths = [span.stop - span.start for span in spans]
        slots = [
            tables[i, np.arange(span.start, span.stop) // page].astype(np.int64) * page
            + np.arange(span.start, span.stop) % page
            for i, span in zip(active, spans, strict=True)
        ]
        taken = [(*members[i], span) for i, span in zip(active, spans, strict=True)]
        yield Forward(
            token_ids=_tensor([feed.token_ids[span] for feed, _, span in taken], policy),
            position_ids=_tensor([feed.position_ids[span] for feed, _, span in taken], policy),
            context=PagedContext(
                *caches,
                slot_mapping=_tensor(slots, policy),
                block_tables=torch.from_numpy(tables[active]).to(policy.device),
                cu_seqlens_q=torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=policy.device),
                kv_lens=torch.tensor([span.stop for span in spans], dtype=torch.int32, device=policy.device),
                max_seqlen_q=max(lengths),
                max_seqlen_k=max(span.stop for span in spans),
            ),
            rows=np.concatenate([rows[span] for _, rows, span in taken]),
            older=half is older,
        )


def _caches(policy: Policy, lengths: Sequence[int], page: int) -> tuple[np.ndarray, tuple[list[Tensor], list[Tensor]]]:
    """Block tables int32 [B, pages of the longest] and every layer's caches, just large enough for ``lengths``."""
    counts = [-(-length // page) for length in lengths]
    tables = np.zeros((len(lengths), max(counts)), np.int32)
    first = np.cumsum([0, *counts])
    for table, begin, count in zip(tables, first.tolist(), counts, strict=False):
        table[:count] = np.arange(begin, begin + count)
    shape, options = (int(first[-1]), page), {"dtype": policy.dtype, "device": policy.device}
    keys = [torch.zeros(*shape, kv.num_kv_heads, kv.head_dim, **options) for kv in policy.kv_layout]
    values = [torch.zeros(*shape, kv.num_kv_heads, kv.value_dim, **options) for kv in policy.kv_layout]
    return tables, (keys, values)


def _tensor(parts: Sequence[np.ndarray], policy: Policy) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)).to(policy.device)
