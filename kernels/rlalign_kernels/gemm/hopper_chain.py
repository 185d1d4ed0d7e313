"""The plan of ``chain_plan`` for Hopper in Gluon, warp-specialised: rows [R, K], cols [C, K] -> rows @ cols.T + bias.

Rows are tokens and columns weight rows, or with SWAP the other way round and the tile is stored transposed: so a tile
can be 192 weight rows wide, and few tokens still fill it. out [tokens, weight rows] either way.
bfloat16 or float16 in, float32 accumulation, rounded once. A program is persistent: one producer warp copies boxes of
64 rows and BLOCK_K numbers into a ring in shared memory, which is filled once before the warps part; GROUPS consumer
warpgroups multiply them, 64 rows of the tile each, and a finished tile leaves by the copy engine, which writes nothing
that lies outside. Leaves of the tree wait in registers: LEAVES > 1 takes fewer columns.
Promised: the bits of triton_chain, for every tile, number of stages and of programs.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from rlalign_kernels.gemm import triton_chain
from rlalign_kernels.hopper_common import WARPGROUP_ROWS, all_warps_meet, barriers, boxes, copy_in, copy_out

_tile_of = gluon.jit(triton_chain.tile_of.fn)


@gluon.jit
def _origin(tile, num_rows, num_cols, GROUPS: gl.constexpr, COLS: gl.constexpr, TURNS: gl.constexpr):
    """(first row, first column) of a tile."""
    ROWS: gl.constexpr = GROUPS * WARPGROUP_ROWS
    tile_row, tile_col = _tile_of(tile, (num_rows + ROWS - 1) // ROWS, (num_cols + COLS - 1) // COLS, TURNS)
    return tile_row * ROWS, tile_col * COLS


@gluon.jit
def _copy(
    rows_desc, cols_desc, more_desc, rows_s, cols_s, more_s, full, row, col, k_tile, stage,
    GROUPS: gl.constexpr, COLS: gl.constexpr, MORE: gl.constexpr,
):  # fmt: skip
    """Set the boxes of (row, col) and ``k_tile`` on their way to ``stage`` of the ring."""
    BLOCK_K: gl.constexpr = rows_desc.block_type.shape[1]
    ROW_BYTES: gl.constexpr = cols_desc.block_type.nbytes // COLS
    k = k_tile * BLOCK_K
    mbarrier.expect(full.index(stage), (GROUPS * WARPGROUP_ROWS + COLS + MORE) * ROW_BYTES)
    for g in gl.static_range(GROUPS):
        copy_in(rows_desc, [row + g * WARPGROUP_ROWS, k], full.index(stage), rows_s.index(stage * GROUPS + g))
    copy_in(cols_desc, [col, k], full.index(stage), cols_s.index(stage))
    if MORE > 0:
        copy_in(more_desc, [col + COLS, k], full.index(stage), more_s.index(stage))


@gluon.jit
def _producer(
    rows_desc, cols_desc, more_desc, rows_s, cols_s, more_s, full, empty, num_rows, num_cols, k_tiles, num_tiles,
    LEAVES: gl.constexpr, GROUPS: gl.constexpr, COLS: gl.constexpr, MORE: gl.constexpr, STAGES: gl.constexpr,
    TURNS: gl.constexpr,
):  # fmt: skip
    """One warp: all tiles' boxes after the first ringful, in the order in which the consumers want them.

    k_tiles: of one leaf.
    """
    under_way = gl.minimum(LEAVES * k_tiles, STAGES)
    loads = under_way
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        row, col = _origin(tile, num_rows, num_cols, GROUPS, COLS + MORE, TURNS)
        for k_tile in range(gl.where(tile == gl.program_id(0), under_way, 0), LEAVES * k_tiles):
            stage = loads % STAGES
            mbarrier.wait(empty.index(stage), (loads // STAGES & 1) ^ 1)
            _copy(
                rows_desc, cols_desc, more_desc, rows_s, cols_s, more_s, full, row, col, k_tile, stage,
                GROUPS, COLS, MORE,
            )  # fmt: skip
            loads += 1


@gluon.jit
def _chain(
    loads, k_tiles, rows_s, cols_s, more_s, full, empty,
    GROUP_INDEX: gl.constexpr, GROUPS: gl.constexpr, COLS: gl.constexpr, MORE: gl.constexpr, STAGES: gl.constexpr,
    LAYOUT: gl.constexpr, MORE_LAYOUT: gl.constexpr,
):  # fmt: skip
    """float32 [64, COLS] and [64, MORE] of the ring's next ``k_tiles`` boxes; two products are under way at a time."""
    acc = gl.zeros([WARPGROUP_ROWS, COLS], gl.float32, LAYOUT)
    if MORE > 0:
        more = gl.zeros([WARPGROUP_ROWS, MORE], gl.float32, MORE_LAYOUT)
    for k_tile in range(k_tiles):
        load = loads + k_tile
        stage = load % STAGES
        mbarrier.wait(full.index(stage), load // STAGES & 1)
        rows = rows_s.index(stage * GROUPS + GROUP_INDEX)
        pending = warpgroup_mma(rows, cols_s.index(stage).permute((1, 0)), acc, is_async=True)
        if MORE > 0:
            pending_more = warpgroup_mma(rows, more_s.index(stage).permute((1, 0)), more, is_async=True)
            acc, more = warpgroup_mma_wait(2, [pending, pending_more])
        else:
            acc = warpgroup_mma_wait(1, [pending])
        mbarrier.arrive(empty.index((load + STAGES - 1) % STAGES), pred=k_tile > 0)
    if MORE > 0:
        acc, more = warpgroup_mma_wait(0, [acc, more])
    else:
        acc = warpgroup_mma_wait(0, [acc])
        more = acc
    mbarrier.arrive(empty.index((loads + k_tiles - 1) % STAGES))
    return acc + 0.0, more + 0.0


@gluon.jit
def _tree(
    loads, k_tiles, rows_s, cols_s, more_s, full, empty,
    LEAVES: gl.constexpr, GROUP_INDEX: gl.constexpr, GROUPS: gl.constexpr, COLS: gl.constexpr, MORE: gl.constexpr,
    STAGES: gl.constexpr, LAYOUT: gl.constexpr, MORE_LAYOUT: gl.constexpr,
):  # fmt: skip
    """The sums of the ring's next LEAVES chains."""
    if LEAVES == 1:
        return _chain(
            loads, k_tiles, rows_s, cols_s, more_s, full, empty,
            GROUP_INDEX, GROUPS, COLS, MORE, STAGES, LAYOUT, MORE_LAYOUT,
        )  # fmt: skip
    else:
        HALF: gl.constexpr = LEAVES // 2
        low, low_more = _tree(
            loads, k_tiles, rows_s, cols_s, more_s, full, empty,
            HALF, GROUP_INDEX, GROUPS, COLS, MORE, STAGES, LAYOUT, MORE_LAYOUT,
        )  # fmt: skip
        high, high_more = _tree(
            loads + HALF * k_tiles, k_tiles, rows_s, cols_s, more_s, full, empty,
            HALF, GROUP_INDEX, GROUPS, COLS, MORE, STAGES, LAYOUT, MORE_LAYOUT,
        )  # fmt: skip
        return low + high, low_more + high_more


@gluon.jit
def _write(acc, out_desc, out_s, row, col, COLS: gl.constexpr, CHUNK: gl.constexpr, SWAP: gl.constexpr):
    """acc [64, COLS] from (row, col) on, CHUNK columns at a time."""
    if COLS > CHUNK:
        HALF: gl.constexpr = COLS // 2
        low, high = acc.reshape([WARPGROUP_ROWS, 2, HALF]).permute([0, 2, 1]).split()
        _write(low, out_desc, out_s, row, col, HALF, CHUNK, SWAP)
        _write(high, out_desc, out_s, row, col + HALF, HALF, CHUNK, SWAP)
    else:
        # what was in this memory before has left it
        tma.store_wait(0)
        rounded = acc.to(out_desc.dtype)
        if SWAP:
            out_s.permute((1, 0)).store(rounded)
            fence_async_shared()
            copy_out(out_desc, [col, row], out_s)
        else:
            out_s.store(rounded)
            fence_async_shared()
            copy_out(out_desc, [row, col], out_s)


@gluon.jit
def _finish(
    acc, out_desc, bias_ptr, out_s, row, col, num_rows, num_cols,
    COLS: gl.constexpr, CHUNK: gl.constexpr, SWAP: gl.constexpr, HAS_BIAS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Add the bias, which lies along rows where those are weights, and write."""
    if HAS_BIAS:
        if SWAP:
            n = row + gl.arange(0, WARPGROUP_ROWS, gl.SliceLayout(1, LAYOUT))
            acc += gl.expand_dims(gl.load(bias_ptr + n, mask=n < num_rows, other=0.0).to(gl.float32), 1)
        else:
            n = col + gl.arange(0, COLS, gl.SliceLayout(0, LAYOUT))
            acc += gl.expand_dims(gl.load(bias_ptr + n, mask=n < num_cols, other=0.0).to(gl.float32), 0)
    _write(acc, out_desc, out_s, row, col, COLS, CHUNK, SWAP)


@gluon.jit
def _consumer(
    out_desc, bias_ptr, rows_s, cols_s, more_s, out_s, full, empty, num_rows, num_cols, k_tiles, num_tiles,
    GROUP_INDEX: gl.constexpr, LEAVES: gl.constexpr, GROUPS: gl.constexpr, COLS: gl.constexpr, MORE: gl.constexpr,
    STAGES: gl.constexpr, TURNS: gl.constexpr, CHUNK: gl.constexpr, SWAP: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """One warpgroup: rows GROUP_INDEX * 64 .. + 63 of every tile of its program."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    MORE_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MORE if MORE > 0 else COLS, 16])
    loads = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        row, col = _origin(tile, num_rows, num_cols, GROUPS, COLS + MORE, TURNS)
        row += GROUP_INDEX * WARPGROUP_ROWS
        acc, more = _tree(
            loads, k_tiles, rows_s, cols_s, more_s, full, empty,
            LEAVES, GROUP_INDEX, GROUPS, COLS, MORE, STAGES, LAYOUT, MORE_LAYOUT,
        )  # fmt: skip
        loads += LEAVES * k_tiles
        box = out_s.index(GROUP_INDEX)
        _finish(
            acc, out_desc, bias_ptr, box, row, col, num_rows, num_cols, COLS, CHUNK, SWAP, HAS_BIAS, LAYOUT
        )  # fmt: skip
        if MORE > 0:
            _finish(
                more, out_desc, bias_ptr, box, row, col + COLS, num_rows, num_cols,
                MORE, CHUNK, SWAP, HAS_BIAS, MORE_LAYOUT,
            )  # fmt: skip
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_rows", "num_cols", "k_tiles", "num_tiles"])
def hopper_linear_kernel(
    rows_desc, cols_desc, more_desc, out_desc, bias_ptr, num_rows, num_cols, k_tiles, num_tiles,
    LEAVES: gl.constexpr, GROUPS: gl.constexpr, COLS: gl.constexpr, MORE: gl.constexpr, STAGES: gl.constexpr,
    TURNS: gl.constexpr, CHUNK: gl.constexpr, SWAP: gl.constexpr, HAS_BIAS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Grid: as many programs as fit the GPU, at most. A tile has COLS + MORE columns, powers of two or MORE = 0.

    Boxes: [64, BLOCK_K] of rows, [COLS, BLOCK_K] and [MORE, BLOCK_K] of columns, and of out [64, CHUNK] or, with SWAP,
    [CHUNK, 64]. With LEAVES > 1 a leaf is a multiple of BLOCK_K.
    """
    rows_s = boxes(rows_desc, STAGES * GROUPS)
    cols_s = boxes(cols_desc, STAGES)
    more_s = boxes(more_desc, STAGES) if MORE > 0 else cols_s
    out_s = boxes(out_desc, GROUPS)
    full = barriers(STAGES, 1)
    empty = barriers(STAGES, GROUPS)
    fence_async_shared()
    all_warps_meet()
    # the first ringful needs no producer: it is under way while the warps are being told what to do
    row, col = _origin(gl.program_id(0), num_rows, num_cols, GROUPS, COLS + MORE, TURNS)
    for k_tile in range(gl.minimum(LEAVES * k_tiles, STAGES)):
        _copy(
            rows_desc, cols_desc, more_desc, rows_s, cols_s, more_s, full, row, col, k_tile, k_tile, GROUPS, COLS, MORE
        )  # fmt: skip
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_consumer, (
                    out_desc, bias_ptr, rows_s, cols_s, more_s, out_s, full, empty, num_rows, num_cols, k_tiles,
                    num_tiles, gl.constexpr(0), LEAVES, GROUPS, COLS, MORE, STAGES, TURNS, CHUNK, SWAP, HAS_BIAS,
                )),
                (_producer, (
                    rows_desc, cols_desc, more_desc, rows_s, cols_s, more_s, full, empty, num_rows, num_cols, k_tiles,
                    num_tiles, LEAVES, GROUPS, COLS, MORE, STAGES, TURNS,
                )),
            ],
            [1],
            [PRODUCER_REGISTERS],
        )  # fmt: skip
    elif GROUPS == 2:
        gl.warp_specialize(
            [
                (_consumer, (
                    out_desc, bias_ptr, rows_s, cols_s, more_s, out_s, full, empty, num_rows, num_cols, k_tiles,
                    num_tiles, gl.constexpr(0), LEAVES, GROUPS, COLS, MORE, STAGES, TURNS, CHUNK, SWAP, HAS_BIAS,
                )),
                (_consumer, (
                    out_desc, bias_ptr, rows_s, cols_s, more_s, out_s, full, empty, num_rows, num_cols, k_tiles,
                    num_tiles, gl.constexpr(1), LEAVES, GROUPS, COLS, MORE, STAGES, TURNS, CHUNK, SWAP, HAS_BIAS,
                )),
                (_producer, (
                    rows_desc, cols_desc, more_desc, rows_s, cols_s, more_s, full, empty, num_rows, num_cols, k_tiles,
                    num_tiles, LEAVES, GROUPS, COLS, MORE, STAGES, TURNS,
                )),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer, (
                    out_desc, bias_ptr, rows_s, cols_s, more_s, out_s, full, empty, num_rows, num_cols, k_tiles,
                    num_tiles, gl.constexpr(0), LEAVES, GROUPS, COLS, MORE, STAGES, TURNS, CHUNK, SWAP, HAS_BIAS,
                )),
                (_consumer, (
                    out_desc, bias_ptr, rows_s, cols_s, more_s, out_s, full, empty, num_rows, num_cols, k_tiles,
                    num_tiles, gl.constexpr(1), LEAVES, GROUPS, COLS, MORE, STAGES, TURNS, CHUNK, SWAP, HAS_BIAS,
                )),
                (_consumer, (
                    out_desc, bias_ptr, rows_s, cols_s, more_s, out_s, full, empty, num_rows, num_cols, k_tiles,
                    num_tiles, gl.constexpr(2), LEAVES, GROUPS, COLS, MORE, STAGES, TURNS, CHUNK, SWAP, HAS_BIAS,
                )),
                (_producer, (
                    rows_desc, cols_desc, more_desc, rows_s, cols_s, more_s, full, empty, num_rows, num_cols, k_tiles,
                    num_tiles, LEAVES, GROUPS, COLS, MORE, STAGES, TURNS,
                )),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
