"""The forwards that a set of sequences takes under ``ScoreSettings``: which rows stand beside each other, and where
their keys and values are.

One generator serves whoever runs them: the scorer, which wants log-probs, and the recorder, which wants every module's
output. Legend: T rows of a forward, N rows of all sequences that belong to a token ("canonical", sequence after
sequence), P prompt tokens, L response tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlalign.modeling import AttentionContext, PackedContext, PagedContext, Policy
from rlalign.verifier.dumps.record import DumpSequence
from rlalign.verifier.score import ScoreSettings

_PAGE = {"cuda": 128, "cpu": 16}
PADDING = -1


@dataclass(frozen=True, slots=True)
class Feed:
    """What one sequence puts into the model.

    token_ids, position_ids: int64 [n]. canonical: bool [n], False for padding. prompt_length: rows before those of the
    response, padding included. name: what an error calls it.
    """

    token_ids: np.ndarray
    position_ids: np.ndarray
    canonical: np.ndarray
    prompt_length: int
    name: str

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Forward:
    """One call of ``Policy.hidden``. rows: int64 [T], each row's place among the N canonical ones; PADDING for none."""

    token_ids: Tensor
    position_ids: Tensor
    context: AttentionContext
    rows: np.ndarray


def make_feed(
    sequence: DumpSequence,
    prompt: np.ndarray,
    response: np.ndarray,
    settings: ScoreSettings,
    *,
    longest_prompt: int,
    pad_id: int,
) -> Feed:
    """Rows of one sequence. prompt, response: int64, maybe not the dump's own. Its last token is fed only if a
    log-prob is read from its row. Raises ValueError for an empty prompt."""
    if len(prompt) == 0:
        raise ValueError(f"{sequence.source}: the prompt is empty, nothing predicts the first response token")
    fed = response if settings.target_shift == 1 else response[:-1]
    pads = np.full(longest_prompt - len(prompt) if settings.padding != "none" else 0, pad_id, np.int64)
    parts = [prompt, pads, fed] if settings.padding == "middle_seen" else [pads, prompt, fed]
    ids = np.concatenate(parts)
    real = [np.full(len(part), part is not pads) for part in parts]
    positions = np.arange(len(ids)) + settings.position_offset
    positions[len(pads) + len(prompt) :] += settings.response_position_offset
    return Feed(ids, positions, np.concatenate(real), len(pads) + len(prompt), sequence.source or sequence.id)


def check_feeds(policy: Policy, feeds: Sequence[Feed]) -> None:
    """Raises ValueError naming the sequence for an id outside the vocabulary, and for more rows than positions."""
    for feed in feeds:
        bad = (feed.token_ids < 0) | (feed.token_ids >= policy.vocab_size)
        if bad.any():
            found = int(feed.token_ids[bad][0])
            raise ValueError(f"{feed.name}: token id {found} is outside the model's vocabulary of {policy.vocab_size}")
        if feed.num_rows > policy.max_positions:
            raise ValueError(f"{feed.name} needs {feed.num_rows} positions; the model has {policy.max_positions}")


def forwards(policy: Policy, feeds: Sequence[Feed], settings: ScoreSettings, max_rows: int) -> Iterator[Forward]:
    """Forwards over ``feeds``, which cover every row once. max_rows: of sequences beside each other; a longer
    sequence gets a forward, or a cache, of its own."""
    cached = settings.phase == "decode" or settings.chunk is not None
    starts = np.cumsum([0, *(int(feed.canonical.sum()) for feed in feeds)])
    rows = [
        np.where(feed.canonical, start + np.cumsum(feed.canonical) - 1, PADDING)
        for feed, start in zip(feeds, starts[:-1].tolist(), strict=True)
    ]
    for group in _groups(feeds, 0 if settings.batch == "alone" else max_rows):
        members = [(feeds[i], rows[i]) for i in group]
        yield from _paged(policy, members, settings) if cached else [_packed(policy, members)]


def _groups(feeds: Sequence[Feed], max_rows: int) -> Iterator[list[int]]:
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


def _packed(policy: Policy, members: Sequence[tuple[Feed, np.ndarray]]) -> Forward:
    lengths = [feed.num_rows for feed, _ in members]
    offsets = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=policy.device)
    return Forward(
        token_ids=_tensor([feed.token_ids for feed, _ in members], policy),
        position_ids=_tensor([feed.position_ids for feed, _ in members], policy),
        context=PackedContext(offsets, max(lengths)),
        rows=np.concatenate([rows for _, rows in members]),
    )


def _paged(policy: Policy, members: Sequence[tuple[Feed, np.ndarray]], settings: ScoreSettings) -> Iterator[Forward]:
    """Pieces of all members beside each other: a chunk of each prompt, later one response token of each."""
    page = _PAGE[policy.device.type]
    tables, caches = _caches(policy, [feed.num_rows for feed, _ in members], page)
    pieces = [_pieces(feed, settings) for feed, _ in members]
    for step in range(max(len(bounds) - 1 for bounds in pieces)):
        active = [i for i, bounds in enumerate(pieces) if step < len(bounds) - 1]
        spans = [slice(pieces[i][step], pieces[i][step + 1]) for i in active]
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
        )


def _pieces(feed: Feed, settings: ScoreSettings) -> list[int]:
    """Bounds of what one sequence feeds at a time."""
    prefill = feed.prompt_length if settings.phase == "decode" else feed.num_rows
    chunk = settings.chunk or prefill
    return [*range(0, prefill, chunk), *range(prefill, feed.num_rows), feed.num_rows]


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
