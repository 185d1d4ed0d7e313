"""Which rows meet which keys: the index arithmetic of attention, computed once per batch and shared by all layers.

An *item* is up to R query rows of one (sequence, key head): the G query heads of the group at consecutive positions,
row = position * G + head of the group. Items are batched over sequences and heads, longest first, so that at every
step the items that still have keys form a prefix. Nothing here changes a bit: it is all schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

KV_TILE = 64


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
class Chunk:
    """A bounded number n of items with R rows each.

    q_rows int64 [n * R]: rows of q viewed as [T * Hq, D]; padding repeats row 0. out_rows: the same, with padding sent
    to the spare row T * Hq. low, high: int32 [n, used, 1], first key and one past the last key a row may see, relative
    to the item's first tile. tiles: int64 [n], row of ``slot_tiles`` of the item's first tile. head: int64 [n, 1].
    steps: per step (active items, first item that needs a mask).
    """

    rows: int
    used: int
    q_rows: torch.Tensor
    out_rows: torch.Tensor
    low: torch.Tensor | None
    high: torch.Tensor
    tiles: torch.Tensor
    head: torch.Tensor
    steps: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Layout:
    """All chunks of a batch. slot_tiles: int64 [tiles, 64], premultiplied by the number of key heads."""

    chunks: tuple[Chunk, ...]
    slot_tiles: torch.Tensor
    num_q_rows: int


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
    max_scores: int,
    max_items: int,
    device: torch.device,
) -> Layout:
    """Cut every (sequence, key head) into items of the smallest row count that holds them, or the largest one."""
    group = num_q_heads // num_kv_heads
    chunks: list[Chunk] = []
    classes = _row_classes(problem.q_len * group, row_counts)
    for rows in row_counts:
        items = _Items(problem, np.flatnonzero(classes == rows), rows, group, num_q_heads, num_kv_heads, causal, window)
        size = max(1, min(max_items, max_scores // (rows * KV_TILE)))
        for start in range(0, items.count, size):
            chunks.append(items.chunk(slice(start, start + size), device))
    slots = torch.from_numpy(problem.slot_tiles * num_kv_heads).to(device)
    return Layout(tuple(chunks), slots, problem.num_q_rows * num_q_heads)


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
        cuts = -(-problem.q_len[members] * group // rows)
        sequence = np.repeat(members, cuts * num_kv_heads)
        local = np.arange(len(sequence)) - np.repeat(
            np.cumsum(cuts * num_kv_heads) - cuts * num_kv_heads, cuts * num_kv_heads
        )
        self.head, cut = local % num_kv_heads, local // num_kv_heads
        row = cut[:, None] * rows + np.arange(rows)
        position = row // group
        self.valid = position < problem.q_len[sequence][:, None]
        self.used = min(rows, int((problem.q_len[members] * group).max(initial=0)))
        self.q_rows = (
            (problem.q_start[sequence][:, None] + position) * num_q_heads + self.head[:, None] * group + row % group
        )
        self._limits(problem, sequence, position, causal, window)
        order = np.argsort(-self.num_tiles, kind="stable")
        self.tiles = (problem.tile_start[sequence] + self.first)[order]
        for name in ("head", "valid", "q_rows", "low", "high", "num_tiles", "clear_from", "clear_to"):
            setattr(self, name, getattr(self, name)[order])
        self.windowed = window is not None
        self.spare = problem.num_q_rows * num_q_heads

    def _limits(
        self, problem: Problem, sequence: np.ndarray, position: np.ndarray, causal: bool, window: int | None
    ) -> None:
        """Key range of each row, tile range of each item, and the tiles that no row needs a mask for."""
        kv_len = problem.kv_len[sequence][:, None]
        absolute = position + kv_len - problem.q_len[sequence][:, None]
        high = np.clip(absolute + 1, 0, kv_len) if causal else np.broadcast_to(kv_len, position.shape)
        low = np.zeros_like(position) if window is None else np.maximum(absolute - window + 1, 0)
        high = np.where(self.valid & (high > low), high, 0)
        low = np.where(high > 0, low, 0)
        seen = high > 0
        self.first = np.where(seen, low, np.iinfo(np.int64).max).min(1, initial=np.iinfo(np.int64).max) // KV_TILE
        self.first = np.where(seen.any(1), self.first, 0)
        self.num_tiles = np.maximum(-(-high.max(1, initial=0) // KV_TILE) - self.first, 0)
        shift = (self.first * KV_TILE)[:, None]
        self.high, self.low = high - shift, low - shift
        # Padding rows may hold anything: they are never stored.
        self.clear_to = np.where(self.valid, self.high, np.iinfo(np.int64).max).min(1) // KV_TILE
        self.clear_from = -(-np.where(seen, self.low, 0).max(1) // KV_TILE)

    @property
    def count(self) -> int:
        return len(self.num_tiles)

    def chunk(self, part: slice, device: torch.device) -> Chunk:
        num_tiles = self.num_tiles[part]
        steps = []
        for step in range(int(num_tiles.max(initial=0))):
            active = int((num_tiles > step).sum())
            masked = ~((self.clear_from[part][:active] <= step) & (step < self.clear_to[part][:active]))
            steps.append((active, int(masked.argmax()) if masked.any() else active))
        used = slice(0, self.used)

        def tensor(values: np.ndarray, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.from_numpy(np.ascontiguousarray(values)).to(device, dtype)

        valid = self.valid[part]
        return Chunk(
            rows=self.rows,
            used=self.used,
            q_rows=tensor(np.where(valid, self.q_rows[part], 0).reshape(-1)),
            out_rows=tensor(np.where(valid, self.q_rows[part], self.spare)[:, used].reshape(-1)),
            low=tensor(self.low[part][:, used, None], torch.int32) if self.windowed else None,
            high=tensor(self.high[part][:, used, None], torch.int32),
            tiles=tensor(self.tiles[part]),
            head=tensor(self.head[part][:, None]),
            steps=tuple(steps),
        )
