"""Which rows meet which keys: the index arithmetic of attention, computed once per batch and shared by all layers.

An *item* is up to R query rows of one (sequence, key head): the G query heads of the group at consecutive positions,
row = position * G + head of the group. Items are batched over sequences and heads, longest first, so that at every
step the items that still have keys form a prefix. Nothing here changes a bit: it is all schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

KV_TILE = 64
# Steps of a chunk with this many (item, tile) pairs at most are kept for the next layer: half a megabyte of indices.
MAX_KEPT = 1024


@dataclass(frozen=True)
class Problem:
    """One batch: B sequences, their query and key lengths, and where keys lie. Arrays are int64 on the host.

    q_start, q_len, kv_len: [B]. slots: [B] arrays flattened: tile t of sequence b is row ``tile_start[b] + t`` of
    ``slot_tiles`` [tiles, 64], its key slots.
    """

    q_start: np.ndarray
    q_len: np.ndarray
    kv_len: np.ndarray
    tile_start: np.ndarray
    slot_tiles: np.ndarray
    num_q_rows: int


@dataclass(frozen=True)
class Step:
    """One key tile, or its first ``width`` keys if none of the chunk's first ``active`` items has more.

    index int64 [active * width]: rows of k viewed [slots * Hkv, D]. outside bool [active - first_masked, used, width]:
    keys that a row may not see; None if every row sees all.
    """

    active: int
    width: int
    index: torch.Tensor
    first_masked: int
    outside: torch.Tensor | None


@dataclass(frozen=True)
class Chunk:
    """A bounded number n of items with R rows each, of which the first ``used`` mean something.

    q_rows int64 [n * R]: rows of q viewed as [T * Hq, D], padding repeats row 0; None if that is all of them in order.
    On the host: num_tiles [n], descending; low, high [n, used], first key and one past the last key a row may see,
    relative to the item's first tile; shared_from, shared_to [n], the keys that every row of an item sees; tiles [n],
    row of ``slot_tiles`` of the item's first tile; head [n, 1]. widths: proven key widths, ascending, the last one 64.
    """

    rows: int
    used: int
    q_rows: torch.Tensor | None
    num_tiles: np.ndarray
    low: np.ndarray | None
    high: np.ndarray
    shared_from: np.ndarray
    shared_to: np.ndarray
    tiles: np.ndarray
    head: np.ndarray
    slot_tiles: np.ndarray
    widths: tuple[int, ...]
    device: torch.device
    _kept: dict[int, Step] = field(default_factory=dict, repr=False, compare=False)

    @property
    def count(self) -> int:
        return len(self.num_tiles)

    @property
    def num_steps(self) -> int:
        return int(self.num_tiles[0])

    def step(self, number: int) -> Step:
        """Indices and masks of step ``number``."""
        found = self._kept.get(number)
        if found is None:
            found = self._make_step(number)
            if self.count * self.num_steps <= MAX_KEPT:
                self._kept[number] = found
        return found

    def _make_step(self, number: int) -> Step:
        active = int(np.searchsorted(-self.num_tiles, -number))
        start = number * KV_TILE
        high = self.high[:active]
        needed = int(high.max()) - start
        width = next((w for w in self.widths if w >= needed), KV_TILE)
        index = self.slot_tiles[self.tiles[:active] + number, :width] + self.head[:active]
        clear = (self.shared_from[:active] <= start) & (start + width <= self.shared_to[:active])
        first_masked = active if clear.all() else int(clear.argmin())
        outside = None
        if first_masked < active:
            key = np.arange(start, start + width)
            outside = key >= high[first_masked:, :, None]
            if self.low is not None:
                outside |= key < self.low[first_masked:active, :, None]
            outside = torch.from_numpy(outside).to(self.device)
        return Step(active, width, torch.from_numpy(index.reshape(-1)).to(self.device), first_masked, outside)


@dataclass(frozen=True)
class Layout:
    """All chunks of a batch. order int64 [T * Hq]: where each row of q lies in the chunks' used rows, one chunk after
    the other; None if that is their order already."""

    chunks: tuple[Chunk, ...]
    order: torch.Tensor | None


def packed_problem(cu_q: np.ndarray, cu_k: np.ndarray) -> Problem:
    """Keys of sequence b are slots cu_k[b] ... cu_k[b + 1] - 1."""
    kv_len = np.diff(cu_k)
    tile_start, owner, offset = _tile_table(kv_len)
    return Problem(cu_q[:-1], np.diff(cu_q), kv_len, tile_start, cu_k[:-1][owner][:, None] + offset, int(cu_q[-1]))


def paged_problem(cu_q: np.ndarray, kv_len: np.ndarray, block_tables: np.ndarray, page_size: int) -> Problem:
    """Key j of sequence b is slot block_tables[b, j // page] * page + j % page."""
    tile_start, owner, offset = _tile_table(kv_len)
    slots = block_tables[owner[:, None], offset // page_size] * page_size + offset % page_size
    return Problem(cu_q[:-1], np.diff(cu_q), kv_len, tile_start, slots, int(cu_q[-1]))


def _tile_table(kv_len: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First tile of each sequence, and for each tile its sequence and its 64 key positions.

    Positions beyond the end repeat the tile's first key: it is masked there, and being the sequence's own it cannot
    carry another one's NaN into a product as 0 * NaN.
    """
    num_tiles = -(-kv_len // KV_TILE)
    tile_start = np.cumsum(num_tiles) - num_tiles
    owner = np.repeat(np.arange(len(kv_len)), num_tiles)
    first = (np.arange(len(owner)) - tile_start[owner]) * KV_TILE
    offset = first[:, None] + np.arange(KV_TILE)
    return tile_start, owner, np.where(offset < kv_len[owner][:, None], offset, first[:, None])


def build_layout(
    problem: Problem,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    causal: bool,
    window: int | None,
    row_counts: tuple[int, ...],
    key_widths: Callable[[int], tuple[int, ...]],
    max_scores: int,
    max_items: int,
    device: torch.device,
) -> Layout:
    """Cut every (sequence, key head) into items of the smallest row count that holds them, or the largest one.

    ``key_widths``: proven ones by row count, ascending, the last one 64.
    """
    group = num_q_heads // num_kv_heads
    slot_tiles = problem.slot_tiles * num_kv_heads
    chunks: list[Chunk] = []
    rows_of_q: list[np.ndarray] = []
    classes = _row_classes(problem.q_len * group, row_counts)
    for rows in row_counts:
        members = np.flatnonzero(classes == rows)
        if not len(members):
            continue
        items = _Items(problem, members, rows, group, num_q_heads, num_kv_heads, causal, window)
        size = max(1, min(max_items, max_scores // (rows * KV_TILE)))
        for start in range(0, items.count, size):
            part = slice(start, start + size)
            chunks.append(items.chunk(part, slot_tiles, key_widths(rows), problem.num_q_rows * num_q_heads, device))
            rows_of_q.append(items.stored_rows(part))
    return Layout(tuple(chunks), _order(rows_of_q, problem.num_q_rows * num_q_heads, device))


def _order(rows_of_q: list[np.ndarray], num_rows: int, device: torch.device) -> torch.Tensor | None:
    """Inverse of the chunks' q rows, of which padding is -1."""
    stored = np.concatenate(rows_of_q) if rows_of_q else np.zeros(0, dtype=np.int64)
    if len(stored) == num_rows and (stored == np.arange(num_rows)).all():
        return None
    places = np.flatnonzero(stored >= 0)
    order = np.zeros(num_rows, dtype=np.int64)
    order[stored[places]] = places
    return torch.from_numpy(order).to(device)


def _row_classes(needed: np.ndarray, row_counts: tuple[int, ...]) -> np.ndarray:
    """Row count for each sequence; 0 for one without queries."""
    counts = np.array(row_counts)
    index = np.minimum(np.searchsorted(counts, needed), len(counts) - 1)
    return np.where(needed > 0, counts[index], 0)


class _Items:
    """All items of one row count, sorted by number of key tiles, most first."""

    def __init__(
        self,
        problem: Problem,
        members: np.ndarray,
        rows: int,
        group: int,
        num_q_heads: int,
        num_kv_heads: int,
        causal: bool,
        window: int | None,
    ) -> None:
        self.rows = rows
        needed = problem.q_len[members] * group
        cuts = -(-needed // rows) * num_kv_heads
        sequence = np.repeat(members, cuts)
        local = np.arange(len(sequence)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
        self.head, cut = local % num_kv_heads, local // num_kv_heads
        row = cut[:, None] * rows + np.arange(rows)
        position = row // group
        self.valid = position < problem.q_len[sequence][:, None]
        self.used = min(rows, int(needed.max()))
        self.q_rows = (
            (problem.q_start[sequence][:, None] + position) * num_q_heads + self.head[:, None] * group + row % group
        )
        self._limits(problem, sequence, position, causal, window)
        self.tiles = problem.tile_start[sequence] + self.first
        self.windowed = window is not None
        if (self.num_tiles[1:] > self.num_tiles[:-1]).any():
            order = np.argsort(-self.num_tiles, kind="stable")
            for name in ("head", "valid", "q_rows", "low", "high", "num_tiles", "shared_from", "shared_to", "tiles"):
                setattr(self, name, getattr(self, name)[order])

    def _limits(
        self, problem: Problem, sequence: np.ndarray, position: np.ndarray, causal: bool, window: int | None
    ) -> None:
        """Key range of each row, tile range of each item, and the keys that all of its rows see."""
        kv_len = problem.kv_len[sequence][:, None]
        absolute = position + kv_len - problem.q_len[sequence][:, None]
        high = np.clip(absolute + 1, 0, kv_len) if causal else np.broadcast_to(kv_len, position.shape)
        low = np.zeros_like(position) if window is None else np.maximum(absolute - window + 1, 0)
        seen = self.valid & (high > low)
        high, low = np.where(seen, high, 0), np.where(seen, low, 0)
        no_key = np.iinfo(np.int64).max
        self.first = np.where(seen, low, no_key).min(1) // KV_TILE * seen.any(1)
        self.num_tiles = np.maximum(-(-high.max(1) // KV_TILE) - self.first, 0)
        shift = (self.first * KV_TILE)[:, None]
        self.high, self.low = high - shift, low - shift
        # Padding rows may hold anything: they are never stored.
        self.shared_to = np.where(self.valid, self.high, no_key).min(1)
        self.shared_from = np.where(seen, self.low, 0).max(1)

    @property
    def count(self) -> int:
        return len(self.num_tiles)

    def stored_rows(self, part: slice) -> np.ndarray:
        """Rows of q in the order of the part's used rows; -1 for padding."""
        return np.where(self.valid[part, : self.used], self.q_rows[part, : self.used], -1).reshape(-1)

    def chunk(
        self, part: slice, slot_tiles: np.ndarray, widths: tuple[int, ...], num_rows: int, device: torch.device
    ) -> Chunk:
        q_rows = np.where(self.valid[part], self.q_rows[part], 0).reshape(-1)
        whole = len(q_rows) == num_rows and (q_rows == np.arange(num_rows)).all()
        return Chunk(
            rows=self.rows,
            used=self.used,
            q_rows=None if whole else torch.from_numpy(q_rows).to(device),
            num_tiles=self.num_tiles[part],
            low=self.low[part, : self.used] if self.windowed else None,
            high=self.high[part, : self.used],
            shared_from=self.shared_from[part],
            shared_to=self.shared_to[part],
            tiles=self.tiles[part],
            head=self.head[part, None],
            slot_tiles=slot_tiles,
            widths=widths,
            device=device,
        )
