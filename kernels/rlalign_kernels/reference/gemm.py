"""Matrix products whose every row has the bits that it would have alone.

Plan: K in absolute blocks of 384; each block is a product from zero over a tile of 16 rows (padded); block results are
added in ascending order. Columns in absolute blocks of 2,048. Nothing of it depends on the number of rows. Where the
machine's library gives a row of a 16-row tile bits that depend on its place, another of ``BASES`` that is free of that.
Schedule: row tiles up to 4,096 and batched products, each only for shapes that a probe has found equal on this machine.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from rlalign_kernels.conformance import CONFORMANCE, probe_data, same_bits

ROW_TILE = 16
# Tried in this order where 16 rows are not position independent: BLAS kernels for AVX2 work on 6 rows at a time.
BASES = (16, 48, 32, 64, 96, 192)
MAX_ROWS = 256
# Small products want taller tiles than that; large ones gain nothing from them, and would take long to probe.
TALL_ROWS = (512, 1024, 2048, 4096)
MAX_TALL_WORK = 2**27
K_BLOCK = 384
N_BLOCK = 2048
MAX_BATCH = 128
MAX_BATCH_ROWS = 4096


@dataclass(frozen=True)
class GemmSchedule:
    """``base``: rows of the defining tile. ``rows``: multiples of it that keep its bits, ascending.

    ``fused_add``: ``addmm`` into the output equals product, then add.
    """

    base: int
    rows: tuple[int, ...]
    fused_add: bool

    def report(self) -> dict[str, object]:
        return {"base": self.base, "rows": list(self.rows), "fused_add": self.fused_add}


@functools.lru_cache(maxsize=4096)
def row_tiles(num_rows: int, base: int, allowed: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Cover ``num_rows`` with (start, rows) tiles of allowed sizes; the last one may reach past the end."""
    tiles = []
    start = 0
    while start < num_rows:
        wanted = -(-(num_rows - start) // base) * base
        rows = max(size for size in allowed if size <= wanted)
        tiles.append((start, rows))
        start += rows
    return tuple(tiles)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """Contiguous ``x`` on a 64-byte boundary: libraries may choose a kernel by alignment."""
    x = x.contiguous()
    return x if x.data_ptr() % 64 == 0 else x.clone()


def product_nt(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """float32 ``x @ weight.T``: x [M, K], weight [N, K] -> [M, N]. Not differentiable; see ``linear``."""
    x, weight = aligned(x), aligned(weight)
    num_rows, depth = x.shape
    width = weight.shape[0]
    if width < ROW_TILE:
        # Narrow products take another code path in BLAS libraries; zero columns keep them on the usual one.
        return product_nt(x, pad(weight, (0, 0, 0, ROW_TILE - width)))[:, :width].contiguous()
    if depth == 0:
        return x.new_zeros(num_rows, width)
    if width <= N_BLOCK:
        return _product_columns(x, weight, None)
    out = x.new_empty(num_rows, width)
    for start in range(0, width, N_BLOCK):
        _product_columns(x, weight[start : start + N_BLOCK], out[:, start : start + N_BLOCK])
    return out


def _product_columns(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """One block of columns, into ``out`` if that is given."""
    num_rows, depth = x.shape
    schedule = gemm_schedule(weight.shape[0], depth)
    weight_t = weight.t()
    tiles = row_tiles(num_rows, schedule.base, schedule.rows)
    if len(tiles) == 1 and tiles[0][1] == num_rows:
        return _tile(x, weight_t, out, schedule.fused_add)
    if out is None:
        if len(tiles) == 1:
            return _padded_tile(x, weight_t, tiles[0][1], schedule.fused_add)
        out = x.new_empty(num_rows, weight.shape[0])
    for start, rows in tiles:
        if start + rows > num_rows:
            if num_rows < rows or depth % 16:
                out[start:] = _padded_tile(x[start:], weight_t, rows, schedule.fused_add)
                continue
            # Rows do not depend on their position: redo a few earlier ones rather than copy and pad.
            start = num_rows - rows
        _tile(x[start : start + rows], weight_t, out[start : start + rows], schedule.fused_add)
    return out


def _padded_tile(x: torch.Tensor, weight_t: torch.Tensor, rows: int, fused_add: bool) -> torch.Tensor:
    """The product of fewer rows than a tile has."""
    return _tile(pad(x, (0, 0, 0, rows - x.shape[0])), weight_t, None, fused_add)[: x.shape[0]]


def _tile(x: torch.Tensor, weight_t: torch.Tensor, out: torch.Tensor | None, fused_add: bool) -> torch.Tensor:
    """One row tile: K blocks ascending."""
    depth = x.shape[1]
    if depth <= K_BLOCK:
        return torch.mm(x, weight_t, out=out)
    out = torch.mm(x[:, :K_BLOCK], weight_t[:K_BLOCK], out=out)
    for start in range(K_BLOCK, depth, K_BLOCK):
        x_block, w_block = x[:, start : start + K_BLOCK], weight_t[start : start + K_BLOCK]
        if fused_add:
            torch.addmm(out, x_block, w_block, out=out)
        else:
            out.add_(torch.mm(x_block, w_block))
    return out


def gemm_schedule(width: int, depth: int) -> GemmSchedule:
    """Proven row tiles for N = width <= 2,048 columns and K = depth; measured at first use."""
    return CONFORMANCE.get(("gemm", width, depth), lambda: _probe_gemm(width, depth))


def _probe_gemm(width: int, depth: int) -> GemmSchedule:
    blocks = sorted({K_BLOCK, depth % K_BLOCK or K_BLOCK}) if depth > K_BLOCK else [depth]
    tall = max((rows for rows in TALL_ROWS if rows * width * max(blocks) <= MAX_TALL_WORK), default=MAX_ROWS)
    operands = [_probe_operands(tall, width, block, depth) for block in blocks]
    best = None
    for base in BASES:
        found = _probe_base(operands, base, accumulates=depth > K_BLOCK)
        if found is not None and (best is None or max(found.rows) > max(best.rows)):
            best = found
        if best is not None and max(best.rows) >= MAX_ROWS // 2:
            return best
    if best is not None:
        return best
    raise RuntimeError(
        f"linear: on this machine a row's bits depend on its position in float32 products of {list(BASES)} rows "
        f"with N={width}, K={depth}; no invariant schedule is known for it"
    )


def _probe_base(operands: list[tuple[torch.Tensor, torch.Tensor]], base: int, accumulates: bool) -> GemmSchedule | None:
    if not all(_position_free(x[:MAX_ROWS], weight_t, base) for x, weight_t in operands):
        return None
    num_rows = operands[0][0].shape[0]
    rows = {*range(base, MAX_ROWS + 1, base), *(size // base * base for size in TALL_ROWS if size <= num_rows)}
    fused = True
    for x, weight_t in operands:
        rows, block_fused = _probe_block(x, weight_t, base, rows, accumulates)
        fused &= block_fused
    return GemmSchedule(base, tuple(sorted(rows)), fused)


def _probe_operands(num_rows: int, width: int, block: int, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One K block with the row strides that the real call has."""
    x, weight = probe_data(num_rows, block, seed=3), probe_data(width, block, seed=4)
    x_strided, weight_strided = x.new_empty(num_rows, depth), x.new_empty(width, depth)
    x_strided[:, :block], weight_strided[:, :block] = x, weight
    return x_strided[:, :block], weight_strided[:, :block].t()


def _position_free(x: torch.Tensor, weight_t: torch.Tensor, base: int) -> bool:
    """True if each row of a ``base``-row product has the same bits at three other places, among other rows."""
    num_rows = x.shape[0] // base * base
    x, truth = x[:num_rows], _by_row_tile(x[:num_rows], weight_t, base)
    generator = torch.Generator().manual_seed(5)
    for order in (torch.arange(num_rows).roll(1), torch.randperm(num_rows, generator=generator).roll(3)):
        shuffled = torch.empty_strided(x.shape, x.stride()).copy_(x[order])
        if not same_bits(_by_row_tile(shuffled, weight_t, base), truth[order]):
            return False
    return True


def _probe_block(
    x: torch.Tensor, weight_t: torch.Tensor, base: int, candidates: set[int], accumulates: bool
) -> tuple[set[int], bool]:
    """Row tiles equal to the base tile for one K block, and whether ``addmm`` equals product plus add."""
    truth = _by_row_tile(x[: x.shape[0] // base * base], weight_t, base)
    rows, fused = {base}, True
    for size in candidates:
        tile = torch.mm(x[:size], weight_t)
        if same_bits(tile, truth[:size]):
            rows.add(size)
        if accumulates and size in rows:
            start = tile.flip(0)
            fused &= same_bits(torch.addmm(start, x[:size], weight_t), start + tile)
    return rows, fused


def _by_row_tile(x: torch.Tensor, weight_t: torch.Tensor, base: int) -> torch.Tensor:
    return torch.cat([torch.mm(x[i : i + base], weight_t) for i in range(0, x.shape[0], base)])


@dataclass(frozen=True)
class BatchSchedule:
    """``base``: rows of the defining tile. ``largest``: by row count, the largest proven ``bmm`` batch up to each size.

    ``largest[rows][n]`` is at most n, and 0 where only the loop over base tiles is proven.
    """

    base: int
    largest: dict[int, tuple[int, ...]]

    def report(self) -> dict[str, object]:
        """Batch sizes up to the largest, less those that failed."""
        failed = {str(rows): [n for n, size in enumerate(sizes) if size != n] for rows, sizes in self.largest.items()}
        return {"base": self.base, "tried": {str(r): len(s) - 1 for r, s in self.largest.items()}, "failed": failed}


def product_batched(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, schedule: BatchSchedule) -> torch.Tensor:
    """float32 ``out[i] = a[i] @ b[i]``: a [n, R, K], b [n, K, N] or its transposed view, out [n, R, N] contiguous.

    R is one of the schedule's row counts and K <= 384 (one block of the plan).
    """
    batch, rows, _ = a.shape
    largest = schedule.largest[rows]
    start = 0
    while start < batch:
        size = largest[min(batch - start, len(largest) - 1)]
        if size == batch:
            return torch.bmm(a, b, out=out)
        if size:
            torch.bmm(a[start : start + size], b[start : start + size], out=out[start : start + size])
        else:
            _loop_tiles(a[start], b[start], out[start], schedule.base)
        start += max(size, 1)
    return out


def _loop_tiles(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, base: int) -> None:
    """The defining schedule of one batch entry."""
    for row in range(0, a.shape[0], base):
        torch.mm(a[row : row + base], b, out=out[row : row + base])


def batch_schedules(row_counts: tuple[int, ...], depth: int, width: int, transposed: bool) -> dict[int, BatchSchedule]:
    """Schedules by base tile, for every base whose rows are position free. ``row_counts``: in units of the base."""
    key = ("bmm", depth, width, "nt" if transposed else "nn")
    found = CONFORMANCE.get(key, lambda: _BatchVerdict(_probe_batched(row_counts, depth, width, transposed)))
    return found.schedules


@dataclass(frozen=True)
class _BatchVerdict:
    schedules: dict[int, BatchSchedule]

    def report(self) -> list[dict[str, object]]:
        return [schedule.report() for schedule in self.schedules.values()]


def _probe_batched(row_counts: tuple[int, ...], depth: int, width: int, transposed: bool) -> dict[int, BatchSchedule]:
    b = probe_data(MAX_BATCH, width, depth, seed=7)
    b = b.transpose(1, 2) if transposed else b.reshape(MAX_BATCH, depth, width)
    x = probe_data(MAX_ROWS, depth, seed=6)
    schedules = {}
    for base in BASES:
        if _position_free(x, b[0], base):
            largest = {count * base: _largest_batches(count * base, base, b) for count in row_counts}
            schedules[base] = BatchSchedule(base, largest)
            if base == BASES[0]:
                break
    return schedules


def _largest_batches(rows: int, base: int, b: torch.Tensor) -> tuple[int, ...]:
    _, depth, width = b.shape
    limit = max(1, min(MAX_BATCH, MAX_BATCH_ROWS // rows, 2**24 // (rows * depth * width)))
    a = probe_data(limit, rows, depth, seed=8)
    truth = torch.stack([_by_row_tile(a[i], b[i], base) for i in range(limit)])
    largest = [0]
    for size in range(1, limit + 1):
        proven = same_bits(torch.bmm(a[:size], b[:size]), truth[:size])
        largest.append(size if proven else largest[-1])
    return tuple(largest)
