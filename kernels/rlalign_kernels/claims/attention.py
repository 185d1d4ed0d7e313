"""What must hold of attention: packed rows = any chunk of them = pages = decoding, alone or among others.

``attention_packed`` is looked at for whole sequences, ``attention_paged`` against it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from rlalign_kernels.attention import attention_packed, attention_paged
from rlalign_kernels.attention.schedules import Tile
from rlalign_kernels.claims.rows import Run, Tensors, backward_claim, schedules_claim
from rlalign_kernels.claims.shapes import AttentionShape, Setting, Shapes
from rlalign_kernels.conformance import Claim, Subject, difference, hard_data

_PAGES = (16, 64)
_CHUNKS = (7, 64)
_FREE_PAGES = 3
# Rows per tile, warps, stages, copy engine or pointers.
_TILES = ((16, 4, 1, False), (16, 4, 3, True), (32, 2, 2, False), (64, 4, 1, True), (64, 8, 2, False))
# Of dQ, and of dK and dV.
_SMALL_GRADIENT_TILES = ((Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)), (Tile(32, 16, 4, 2), Tile(16, 32, 4, 1)))
_LARGE_GRADIENT_TILES = ((Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)), (Tile(128, 32, 8, 2), Tile(32, 128, 8, 1)))
_MOST_FLOAT32_ROWS = 32


@dataclass(frozen=True)
class _Batch:
    """Sequences of ``setting.lengths``, packed; and the same on pages."""

    shape: AttentionShape
    setting: Setting

    @cached_property
    def qkv(self) -> Tensors:
        shape, tokens = self.shape, sum(self.setting.lengths)
        sizes = (
            (shape.query_heads, shape.head_dim), (shape.key_heads, shape.head_dim), (shape.key_heads, shape.value_dim)
        )  # fmt: skip
        where = {"dtype": self.setting.dtype, "device": self.setting.device, "octaves": 1}
        return tuple(hard_data(tokens, *size, seed=31 + i, **where) for i, size in enumerate(sizes))

    @cached_property
    def whole(self) -> Tensors:
        return self.packed(*self.qkv, self.setting.lengths)

    def offsets(self, lengths: Sequence[int]) -> torch.Tensor:
        return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=self.setting.device)

    def rows(self, index: int) -> slice:
        lengths = self.setting.lengths
        return slice(sum(lengths[:index]), sum(lengths[: index + 1]))

    def packed(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int], k_lengths: Sequence[int] = ()
    ) -> Tensors:
        return attention_packed(
            q, k, v, cu_seqlens_q=self.offsets(lengths), cu_seqlens_k=self.offsets(k_lengths or lengths),
            **self.keywords,
        )  # fmt: skip

    @property
    def keywords(self) -> dict[str, object]:
        return {"scale": self.shape.head_dim**-0.5, "backend": self.setting.backend, "return_lse": True}

    def last(self, count: int) -> tuple[list[int], torch.Tensor]:
        """How many of each sequence's last ``count`` rows there are, and which they are."""
        taken = [min(count, length) for length in self.setting.lengths]
        ends = itertools.accumulate(self.setting.lengths)
        index = [torch.arange(end - n, end) for end, n in zip(ends, taken, strict=True)]
        return taken, torch.cat(index).to(self.setting.device)

    def pages(self, page: int) -> dict[str, torch.Tensor]:
        """Fragmented pages in random order; free slots and pages hold NaN, unused table entries nonsense."""
        lengths, device = self.setting.lengths, self.setting.device
        counts = [-(-length // page) for length in lengths]
        num_pages = sum(counts) + _FREE_PAGES
        order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(page)).to(device)
        tables = torch.full((len(counts), max(counts) + 1), 10**6, dtype=torch.int32, device=device)
        caches = [torch.full((num_pages, page, *x.shape[1:]), torch.nan, dtype=x.dtype, device=device) for x in self.qkv[1:]]  # fmt: skip  # noqa: E501
        start = 0
        for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            mine = order[start : start + count]
            tables[b, :count] = mine.int()
            start += count
            position = torch.arange(length, device=device)
            for cache, x in zip(caches, self.qkv[1:], strict=True):
                cache[mine[position // page], position % page] = x[self.rows(b)]
        kv_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
        return {"k_cache": caches[0], "v_cache": caches[1], "block_tables": tables, "kv_lens": kv_lens}


def subjects(shapes: Shapes, setting: Setting) -> Iterator[Subject]:
    for shape in shapes.attention:
        yield Subject("attention_packed", str(shape), partial(_packed_claims, shape, setting))
        yield Subject("attention_paged", str(shape), partial(_paged_claims, shape, setting))


def _packed_claims(shape: AttentionShape, setting: Setting) -> list[Claim]:
    batch = _Batch(shape, setting)
    claims = [
        Claim("rows", lambda: _alone(batch)),
        Claim("neighbours", lambda: _beside_anything(batch)),
        Claim("chunks", lambda: _chunks(batch)),
    ]
    if setting.backend == "triton" and setting.schedules:
        claims.append(schedules_claim(_forward_schedules(batch), _gradient_schedules(batch)))
    lengths = setting.lengths[:-1]
    few = tuple(x[: sum(lengths)].contiguous() for x in batch.qkv)
    claims.append(backward_claim(lambda q, k, v: batch.packed(q, k, v, lengths)[0], few))
    return claims


def _paged_claims(shape: AttentionShape, setting: Setting) -> list[Claim]:
    batch = _Batch(shape, setting)
    return [Claim("pages", lambda: _on_pages(batch)), Claim("decode", lambda: _decoded(batch))]


@torch.no_grad()
def _alone(batch: _Batch) -> Iterator[str | None]:
    for b, length in enumerate(batch.setting.lengths):
        rows = batch.rows(b)
        alone = batch.packed(*(x[rows] for x in batch.qkv), [length])
        yield difference([x[rows] for x in batch.whole], alone, f"a sequence of {length} alone and among others")


@torch.no_grad()
def _beside_anything(batch: _Batch) -> Iterator[str | None]:
    rows = batch.rows(1)
    for poison in (torch.nan, torch.inf):
        hostile = [torch.full_like(x, poison) for x in batch.qkv]
        for mine, x in zip(hostile, batch.qkv, strict=True):
            mine[rows] = x[rows]
        found = batch.packed(*hostile, batch.setting.lengths)
        yield difference([x[rows] for x in found], [x[rows] for x in batch.whole], f"all other sequences {poison}")


@torch.no_grad()
def _chunks(batch: _Batch) -> Iterator[str | None]:
    """The last rows of every sequence as a chunk of their own."""
    _, k, v = batch.qkv
    for count in (1, *_CHUNKS):
        taken, index = batch.last(count)
        found = batch.packed(batch.qkv[0][index], k, v, taken, batch.setting.lengths)
        yield difference(found, [x[index] for x in batch.whole], f"last {count} rows as a chunk and in one piece")


@torch.no_grad()
def _on_pages(batch: _Batch) -> Iterator[str | None]:
    longest = max(batch.setting.lengths)
    for page in _PAGES:
        cache = batch.pages(page)
        for count in (1, *_CHUNKS, longest):
            taken, index = batch.last(count)
            found = attention_paged(
                batch.qkv[0][index], **cache, cu_seqlens_q=batch.offsets(taken), max_seqlen_q=max(taken),
                max_seqlen_k=longest, **batch.keywords,
            )  # fmt: skip
            where = f"last {count} rows on pages of {page} and packed"
            yield difference(found, [x[index] for x in batch.whole], where)


@torch.no_grad()
def _decoded(batch: _Batch) -> Iterator[str | None]:
    """Single rows of the longest sequence, each by the cache as it was then, alone."""
    b = max(range(len(batch.setting.lengths)), key=batch.setting.lengths.__getitem__)
    cache, rows = batch.pages(_PAGES[-1]), batch.rows(b)
    length = batch.setting.lengths[b]
    for n in sorted({1, 2, 17, length // 2, length - 1, length}):
        one = {**cache, "block_tables": cache["block_tables"][b : b + 1], "kv_lens": cache["kv_lens"][:1] * 0 + n}
        at = slice(rows.start + n - 1, rows.start + n)
        found = attention_paged(batch.qkv[0][at], **one, cu_seqlens_q=batch.offsets([1]), **batch.keywords)
        yield difference(found, [x[at] for x in batch.whole], f"row {n - 1} decoded alone and packed")


def _forward_schedules(batch: _Batch) -> tuple[Run, list[tuple[object, Run]]]:
    from rlalign_kernels.attention.tile_plan import tile_plan
    from rlalign_kernels.attention.triton_backend import forward
    from rlalign_kernels.attention.triton_problem import Keys, Masking, shape_of

    q, k, v = batch.qkv
    cu = batch.offsets(batch.setting.lengths)
    keys, masking, shape = Keys(k, v, cu), Masking(batch.shape.head_dim**-0.5, None, 0), shape_of(q, k, v)
    kv_tile = tile_plan(shape.head_dim, shape.value_dim, q.dtype, shape.architecture).kv_tile

    def run(tile: Tile) -> Tensors:
        return forward(q, keys, cu, masking, return_lse=True, tiles=(tile, tile))

    most = _MOST_FLOAT32_ROWS if q.dtype == torch.float32 else 128
    tiles = [Tile(m, kv_tile, warps, stages, tma) for m, warps, stages, tma in _TILES if m <= most]
    return lambda: batch.whole, [(tile, partial(run, tile)) for tile in tiles]


def _gradient_schedules(batch: _Batch) -> tuple[Run, list[tuple[object, Run]]]:
    from rlalign_kernels.attention.triton_gradient import backward
    from rlalign_kernels.attention.triton_problem import Masking

    masking, cu = Masking(batch.shape.head_dim**-0.5, None, 0), batch.offsets(batch.setting.lengths)
    where = {"dtype": batch.setting.dtype, "device": batch.setting.device, "octaves": 1}

    def run(tiles: tuple[Tile, Tile] | None = None) -> Tensors:
        out, lse = batch.whole
        grad = hard_data(*out.shape, seed=41, **where)
        return backward(*batch.qkv, None, out, lse, cu, cu, grad, masking, tiles=tiles)[:3]

    small = batch.setting.dtype == torch.float32 or batch.shape.head_dim > 128
    pairs = _SMALL_GRADIENT_TILES if small else _SMALL_GRADIENT_TILES + _LARGE_GRADIENT_TILES
    return run, [(tiles, partial(run, tiles)) for tiles in pairs]
