"""Matrix products whose every row has the bits that it would have alone.

Plan: K in absolute blocks of 384; each block is a product from zero over a tile of 16 rows (padded); block results are
added in ascending order. Columns in absolute blocks of 2,048. Nothing of it depends on the number of rows. Where the
machine's library gives a row of a 16-row tile bits that depend on its place, or keeps them in no taller tile, another
of ``BASES``: the first whose bits 128 rows or more keep, or else the one kept by the tallest.
Schedule: row tiles from one row up to 4,096, and batched products, each only for shapes that a probe has found equal on
this machine.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.nn.functional import pad

from rlalign_kernels.conformance import CONFORMANCE, probe_data, same_bits

ROW_TILE = 16
# Tried in this order where 16 rows are not position independent: BLAS kernels for AVX2 work on 6 rows at a time.
BASES = (16, 48, 32, 64, 96, 192)
MAX_ROWS = 256
# Products this small (rows * N * K) are tried at every row count, not at multiples of the base alone: there, padding
# would cost as much as the product.
MAX_EXACT_WORK = 2**22
# Small products want taller tiles than that; large ones gain nothing from them, and would take long to probe.
TALL_ROWS = (512, 1024, 2048, 4096)
MAX_TALL_WORK = 2**27
# Numbers that a schedule is compared by.
MIN_COMPARED = 2048
K_BLOCK = 384
N_BLOCK = 2048
MAX_BATCH = 128
# Batch sizes that are tried; one between them is cut into two. All 128 would take five times as long.
BATCH_SIZES = (*range(1, 33), *range(36, 65, 4), *range(72, MAX_BATCH + 1, 8))
MAX_BATCH_ROWS = 4096


@dataclass(frozen=True)
class GemmSchedule:
    """``base``: rows of the defining tile. ``rows``: row counts that keep its bits, ascending.

    ``fused_add``: ``addmm`` into the output equals product, then add.
    """

    base: int
    rows: tuple[int, ...]
    fused_add: bool
    _tiles: dict[int, tuple[tuple[int, int], ...]] = field(default_factory=dict, repr=False, compare=False)

    def tiles(self, num_rows: int) -> tuple[tuple[int, int], ...]:
        """Cover ``num_rows`` with (start, rows) tiles of proven sizes; the last one may reach past the end."""
        found = self._tiles.get(num_rows)
        if found is None:
            found = self._tiles[num_rows] = tuple(self._cover(num_rows))
        return found

    def _cover(self, num_rows: int) -> Iterator[tuple[int, int]]:
        start = 0
        while start < num_rows:
            left = num_rows - start
            if left <= self.base:
                rows = min(size for size in self.rows if size >= left)
            elif left in self.rows:
                rows = left
            else:
                # Whole base tiles, so that what follows stays on a 64-byte boundary.
                rows = max(size for size in self.rows if size < left + self.base and size % self.base == 0)
            yield start, rows
            start += rows

    def report(self) -> dict[str, object]:
        return {"base": self.base, "rows": _ranges(self.rows), "fused_add": self.fused_add}


def _ranges(sizes: tuple[int, ...]) -> list[str]:
    """Runs of consecutive sizes as "first-last"."""
    runs: list[list[int]] = []
    for size in sizes:
        if runs and size == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], size]
        else:
            runs.append([size])
    return ["-".join(map(str, run)) for run in runs]


def aligned(x: torch.Tensor) -> torch.Tensor:
    """Contiguous ``x`` on a 64-byte boundary: libraries may choose a kernel by alignment."""
    x = x.contiguous()
    return x if x.data_ptr() % 64 == 0 else x.clone()


@functools.cache
def _zero_rows(num_rows: int, depth: int, device: torch.device) -> torch.Tensor:
    """Padding: never written to."""
    return torch.zeros(num_rows, depth, device=device)


def pad_rows(x: torch.Tensor, num_rows: int) -> torch.Tensor:
    """x [r, K] followed by zero rows: float32 [num_rows, K]; x itself if it has as many."""
    missing = num_rows - x.shape[0]
    return torch.cat((x, _zero_rows(missing, x.shape[1], x.device))) if missing else x


def fill_tile(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [r, K] with the zero rows that ``product_nt`` would add for every product; x itself if that adds none."""
    if not 0 < x.shape[0] < ROW_TILE or weight.shape[1] > K_BLOCK:
        return x
    return pad_rows(x, gemm_schedule(*weight.shape).tiles(x.shape[0])[-1][1])


def product_nt(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """float32 ``x @ weight.T``: x [M, K], weight [N, K] -> [M, N]. Not differentiable; see ``linear``."""
    x, weight = aligned(x), aligned(weight)
    num_rows, depth = x.shape
    width = weight.shape[0]
    if ROW_TILE <= width <= N_BLOCK and 0 < depth <= K_BLOCK:
        tiles = gemm_schedule(width, depth).tiles(num_rows)
        if len(tiles) == 1:
            rows = tiles[0][1]
            product = torch.mm(x if rows == num_rows else pad_rows(x, rows), weight.t())
            return product if rows == num_rows else product[:num_rows]
    if width < ROW_TILE:
        # Narrow products take another code path in BLAS libraries; zero columns keep them on the usual one.
        return product_nt(x, pad(weight, (0, 0, 0, ROW_TILE - width)))[:, :width].contiguous()
    if depth == 0:
        return x.new_zeros(num_rows, width)
    if width <= N_BLOCK:
        return _product_columns(x, weight, None)
    out = x.new_empty(num_rows, width)
    for start in range(0, width, N_BLOCK):
        block, columns = weight[start : start + N_BLOCK], out[:, start : start + N_BLOCK]
        if block.shape[0] < ROW_TILE:
            columns.copy_(product_nt(x, block))
        else:
            _product_columns(x, block, columns)
    return out


def _product_columns(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """One block of columns, into ``out`` if that is given."""
    num_rows, depth = x.shape
    schedule = gemm_schedule(weight.shape[0], depth)
    weight_t = weight.t()
    tiles = schedule.tiles(num_rows)
    if len(tiles) == 1 and (out is None or tiles[0][1] == num_rows):
        product = _tile(pad_rows(x, tiles[0][1]), weight_t, out, schedule.fused_add)
        return product if tiles[0][1] == num_rows else product[:num_rows]
    if out is None:
        out = x.new_empty(num_rows, weight.shape[0])
    for start, rows in tiles:
        if start + rows > num_rows:
            if num_rows < rows or depth % 16:
                padded = pad_rows(x[start:], rows)
                out[start:] = _tile(padded, weight_t, None, schedule.fused_add)[: num_rows - start]
                continue
            # Rows do not depend on their position: redo a few earlier ones rather than copy and pad.
            start = num_rows - rows
        _tile(x[start : start + rows], weight_t, out[start : start + rows], schedule.fused_add)
    return out


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
    work = max(weight_t.numel() for _, weight_t in operands)
    rows = {size for size in range(1, MAX_ROWS + 1) if size % base == 0 or size * work <= MAX_EXACT_WORK}
    rows |= {size // base * base for size in TALL_ROWS if size <= num_rows}
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
        # on 64-byte boundaries, as every tile of a real call
        places = _places(x.shape[0], size, -(-size // ROW_TILE) * ROW_TILE, weight_t.shape[1])
        if not all(same_bits(torch.mm(x[i : i + size], weight_t), truth[i : i + size]) for i in places):
            continue
        start = tile.flip(0)
        adds = not accumulates or same_bits(torch.addmm(start, x[:size], weight_t), start + tile)
        # A size between the base's multiples is not worth giving up addmm for all the others.
        if adds or size % base == 0:
            rows.add(size)
            fused &= adds
    return rows, fused


def _places(num_rows: int, size: int, step: int, width: int) -> range:
    """First rows of as many tiles of ``size`` rows as it takes to compare enough numbers: of a few, whose sums have two
    or three terms, all may have equal bits by chance."""
    enough = -(-MIN_COMPARED // (size * width))
    return range(0, num_rows - size + 1, step)[:enough]


def _by_row_tile(x: torch.Tensor, weight_t: torch.Tensor, base: int) -> torch.Tensor:
    return torch.cat([torch.mm(x[i : i + base], weight_t) for i in range(0, x.shape[0], base)])


@dataclass(frozen=True)
class BatchSchedule:
    """``base``: rows of the defining tile. ``largest[n]``: the largest proven ``bmm`` batch up to n, 0 if none is."""

    base: int
    largest: tuple[int, ...]

    @property
    def proven(self) -> bool:
        """Whether a batch of one is, and thereby every batch by parts."""
        return self.largest[1] == 1

    def report(self) -> dict[str, object]:
        failed = [n for n in BATCH_SIZES if n < len(self.largest) and self.largest[n] != n]
        return {"base": self.base, "largest": len(self.largest) - 1, "failed": failed}


def product_batched(a: torch.Tensor, b: torch.Tensor, schedule: BatchSchedule) -> torch.Tensor:
    """float32 ``a[i] @ b[i]``: a [n, R, K], b [n, K, N] or its transposed view -> [n, R, N].

    R, K, N are those that the schedule was made for; K <= 384 (one block of the plan).
    """
    batch = a.shape[0]
    largest = schedule.largest
    if batch < len(largest) and largest[batch] == batch:
        return torch.bmm(a, b)
    out = a.new_empty(batch, a.shape[1], b.shape[2])
    start = 0
    while start < batch:
        size = largest[min(batch - start, len(largest) - 1)]
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


def batch_bases(depth: int, width: int, transposed: bool) -> tuple[int, ...]:
    """Base tiles whose rows are position free in [R, depth] @ [depth, width], in the order of ``BASES``."""
    key = ("bmm bases", depth, width, _layout_name(transposed))
    return CONFORMANCE.get(key, lambda: _probe_bases(depth, width, transposed))


def _layout_name(transposed: bool) -> str:
    return "nt" if transposed else "nn"


def _probe_bases(depth: int, width: int, transposed: bool) -> tuple[int, ...]:
    b = _batch_operand(1, depth, width, transposed)[0]
    x = probe_data(MAX_ROWS, depth, seed=6)
    if _position_free(x, b, BASES[0]):
        return BASES[:1]
    return tuple(base for base in BASES[1:] if _position_free(x, b, base))


def _batch_operand(batch: int, depth: int, width: int, transposed: bool) -> torch.Tensor:
    """Random [batch, depth, width], in memory as the real call's operand."""
    b = probe_data(batch, width, depth, seed=7)
    return b.transpose(1, 2) if transposed else b.reshape(batch, depth, width)


def batch_schedule(
    base: int, rows: int, shape: tuple[int, int], full: tuple[int, int], transposed: bool
) -> BatchSchedule:
    """Proven batches of [rows, K] @ [K, N] with shape = (K, N), where the plan's product has the shape ``full``.

    A smaller K stands for a product whose further terms are zeros, a smaller N for one whose further columns nobody
    needs. Rows need not be a multiple of the base.
    """
    key = ("bmm", base, rows, *shape, *full, _layout_name(transposed))
    return CONFORMANCE.get(key, lambda: BatchSchedule(base, _largest_batches(base, rows, shape, full, transposed)))


def _largest_batches(
    base: int, rows: int, shape: tuple[int, int], full: tuple[int, int], transposed: bool
) -> tuple[int, ...]:
    depth, width = shape
    limit = max(1, min(MAX_BATCH, MAX_BATCH_ROWS // rows, 2**24 // (rows * full[0] * full[1])))
    b = _batch_operand(limit, *full, transposed)
    a = probe_data(limit, rows, full[0], seed=8)
    a[:, :, depth:] = 0.0
    # The plan's product takes whole base tiles.
    padded = pad(a, (0, 0, 0, -rows % base))
    truth = torch.stack([_by_row_tile(padded[i], b[i], base)[:rows, :width] for i in range(limit)])
    a = a[:, :, :depth].contiguous()
    b = b.transpose(1, 2)[:, :width].contiguous().transpose(1, 2) if transposed else b[:, :depth].contiguous()
    tried = [size for size in BATCH_SIZES if size <= limit]
    proven = {
        size
        for size in tried
        if all(
            same_bits(torch.bmm(a[i : i + size], b[i : i + size]), truth[i : i + size])
            for i in _places(limit, size, size, rows * width)
        )
    }
    return tuple(max((size for size in proven if size <= n), default=0) for n in range(tried[-1] + 1))
