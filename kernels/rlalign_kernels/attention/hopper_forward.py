"""Attention forward for Hopper in Gluon, over packed rows or pages: triton_forward's plan and bits, warp-specialised.

A tile is 128 queries of one head, 64 per consumer warpgroup. A consumer issues the scores of the next keys before it
multiplies the last weights with their values, so that its softmax (hopper_softmax) runs beside both. Accumulation:
float32; see triton_tiles for the order. The splits' running result waits in shared memory: registers have no room
for it.
Promised: the bits of triton_forward, for every tile size, stage count and order of tiles.
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

from rlalign_kernels.attention.hopper_softmax import empty_state, finish, masked, merge, weigh
from rlalign_kernels.attention.hopper_tiles import (
    TILE_FIELDS,
    TILE_SLOTS,
    find_sequence,
    hear_tile,
    load_box,
    store_box,
    tell_end,
    tell_tile,
    tiles_of_keys,
)
from rlalign_kernels.hopper_common import (
    WARPGROUP_ROWS,
    all_warps_meet,
    as_box,
    barriers,
    boxes,
    column,
    draw,
    leave_counter,
    matrix,
)


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, q_s, k_s, v_s, tile_s,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, tile_full, tile_empty,
    cu_q_ptr, cu_k_ptr, kv_lens_ptr, table_ptr, counter_ptr, left, right, num_sequences, num_tiles, stride_table,
    HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, PAGE: gl.constexpr, FEW_ROWS: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """One warp: draws tiles, tells the consumers, and copies what they need as room comes free."""
    loads = 0
    told = 0
    drawn = draw(counter_ptr)
    while drawn < num_tiles:
        head = drawn % HEADS
        # the last queries of a causal sequence see the most keys: they go first
        tile = num_tiles // HEADS - 1 - drawn // HEADS
        b, first_tile = find_sequence(tile, cu_q_ptr, num_sequences, 1, BLOCK_M)
        row0 = (tile - first_tile) * BLOCK_M
        q_begin = gl.load(cu_q_ptr + b).to(gl.int32)
        num_queries = gl.load(cu_q_ptr + b + 1).to(gl.int32) - q_begin
        if (row0 < num_queries) & (num_queries * GROUP > FEW_ROWS):
            if PAGE == 0:
                k_begin = gl.load(cu_k_ptr + b).to(gl.int32)
                num_keys = gl.load(cu_k_ptr + b + 1).to(gl.int32) - k_begin
            else:
                num_keys = gl.load(kv_lens_ptr + b).to(gl.int32)
            begin, _whole, _part, end = tiles_of_keys(
                row0, num_queries, num_keys, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
            )
            tell_tile(tile_s, tile_full, tile_empty, told, head, q_begin, num_queries, num_keys, row0)
            for w in gl.static_range(BLOCK_M // WARPGROUP_ROWS):
                mbarrier.wait(q_empty.index(w), (told & 1) ^ 1)
                mbarrier.expect(q_full.index(w), q_desc.block_type.nbytes)
                load_box(
                    q_desc, q_begin, num_queries, row0 + w * WARPGROUP_ROWS, head * HEAD_DIM, q_full.index(w),
                    q_s.index(w),
                )  # fmt: skip
            told += 1
            key_column = head // GROUP * HEAD_DIM
            for tile in range(begin, end):
                if PAGE == 0:
                    origin = k_begin
                    length = num_keys
                    row = tile * BLOCK_N
                else:
                    # a tile lies on one page: what is left of the sequence begins there
                    seen = tile * BLOCK_N
                    entry = table_ptr + gl.to_tensor(b).to(gl.int64) * stride_table + seen // PAGE
                    page = gl.load(entry, mask=seen < num_keys, other=0).to(gl.int32)
                    origin = page * PAGE + seen % PAGE
                    length = num_keys - seen
                    row = 0
                stage = loads % STAGES
                phase = (loads // STAGES & 1) ^ 1
                mbarrier.wait(k_empty.index(stage), phase)
                mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
                load_box(k_desc, origin, length, row, key_column, k_full.index(stage), k_s.index(stage))
                mbarrier.wait(v_empty.index(stage), phase)
                mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
                load_box(v_desc, origin, length, row, key_column, v_full.index(stage), v_s.index(stage))
                loads += 1
        drawn = draw(counter_ptr)
    tell_end(tile_s, tile_full, tile_empty, told)
    leave_counter(counter_ptr, drawn, num_tiles)


@gluon.jit
def _first_tile(
    tile, loads, q, k_pipe, position, num_keys, c, left, right,
    BLOCK_N: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr, S_LAYOUT: gl.constexpr, DEN_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
    dtype: gl.constexpr,
):  # fmt: skip
    """(m, den, p) of a split's first tile."""
    k_s, k_full, k_empty = k_pipe
    stage = loads % STAGES
    mbarrier.wait(k_full.index(stage), loads // STAGES & 1)
    zero = gl.zeros([WARPGROUP_ROWS, BLOCK_N], gl.float32, S_LAYOUT)
    pending = warpgroup_mma(q, matrix(k_s.index(stage)).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, [pending])
    mbarrier.arrive(k_empty.index(stage))
    s = masked(s, tile, position, num_keys, left, right, BLOCK_N, HAS_LEFT, HAS_RIGHT, S_LAYOUT)
    m, den = empty_state(WIDTH, S_LAYOUT, DEN_LAYOUT)
    m, den, _alpha, p = weigh(s, m, den, c, BLOCK_N, WIDTH, DEN_LAYOUT)
    return m, den, gl.convert_layout(p.to(dtype), P_LAYOUT)


@gluon.jit
def _run_tiles(
    low, high, first, loads0, m, den, acc, p, q, k_pipe, v_pipe, position, num_keys, c, left, right,
    BLOCK_N: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr, MASKED: gl.constexpr, S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr,
    DEN_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """Tiles [low, high); the weights of the tile before ``low`` wait in ``p``, those of the last one will."""
    k_s, k_full, k_empty = k_pipe
    v_s, v_full, v_empty = v_pipe
    for tile in range(low, high):
        loads = loads0 + (tile - first)
        stage = loads % STAGES
        before = (loads - 1) % STAGES
        mbarrier.wait(k_full.index(stage), loads // STAGES & 1)
        zero = gl.zeros([WARPGROUP_ROWS, BLOCK_N], gl.float32, S_LAYOUT)
        pending_s = warpgroup_mma(q, matrix(k_s.index(stage)).permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), (loads - 1) // STAGES & 1)
        pending_acc = warpgroup_mma(p, matrix(v_s.index(before)), acc, is_async=True)
        s = warpgroup_mma_wait(1, [pending_s])
        mbarrier.arrive(k_empty.index(stage))
        if MASKED:
            s = masked(s, tile, position, num_keys, left, right, BLOCK_N, HAS_LEFT, HAS_RIGHT, S_LAYOUT)
        m, den, alpha, weights = weigh(s, m, den, c, BLOCK_N, WIDTH, DEN_LAYOUT)
        # passes at once: a branch that the assembler moves no arithmetic across, for it would put the softmax behind
        # the next wait; and the weights go through that wait, so that the compiler doesn't either
        mbarrier.wait(v_full.index(before), (loads - 1) // STAGES & 1)
        acc, weights, den = warpgroup_mma_wait(0, [pending_acc, weights, den])
        mbarrier.arrive(v_empty.index(before))
        p = gl.convert_layout(weights.to(dtype), P_LAYOUT)
        acc = acc * column(alpha, O_LAYOUT)
    return m, den, acc, p


@gluon.jit
def _last_product(loads, acc, p, v_pipe, STAGES: gl.constexpr):
    """acc with the weights that still wait."""
    v_s, v_full, v_empty = v_pipe
    stage = (loads - 1) % STAGES
    mbarrier.wait(v_full.index(stage), (loads - 1) // STAGES & 1)
    pending = warpgroup_mma(p, matrix(v_s.index(stage)), acc, is_async=True)
    acc = warpgroup_mma_wait(0, [pending])
    mbarrier.arrive(v_empty.index(stage))
    return acc


@gluon.jit
def _consumer(
    out_desc, lse_ptr, sink_ptr, q_s, k_s, v_s, acc_s, tile_s,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, tile_full, tile_empty, c, left, right, GROUP_INDEX: gl.constexpr,
    HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, SPLIT: gl.constexpr,
    WIDTH: gl.constexpr, STAGES: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    HAS_SINK: gl.constexpr, HAS_LSE: gl.constexpr, ONE_SPLIT: gl.constexpr,
):  # fmt: skip
    """One warpgroup: rows GROUP_INDEX * 64 .. + 63 of every tile that it hears of."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    DEN_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    SPLIT_TILES: gl.constexpr = SPLIT // BLOCK_N
    dtype: gl.constexpr = out_desc.dtype
    k_pipe = (k_s, k_full, k_empty)
    v_pipe = (v_s, v_full, v_empty)
    row_of = GROUP_INDEX * WARPGROUP_ROWS + gl.arange(0, WARPGROUP_ROWS, gl.SliceLayout(1, S_LAYOUT))
    q = matrix(q_s.index(GROUP_INDEX))
    out_s = acc_s.index(GROUP_INDEX) if ONE_SPLIT else as_box(acc_s.index(GROUP_INDEX), out_desc)
    loads = 0
    heard = 0
    head, q_begin, num_queries, num_keys, row0 = hear_tile(tile_s, tile_full, tile_empty, heard)
    while head >= 0:
        begin, whole, part, end = tiles_of_keys(
            row0, num_queries, num_keys, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
        )
        position = num_keys - num_queries + row0 + row_of
        mbarrier.wait(q_full.index(GROUP_INDEX), heard & 1)
        m_all, den_all = empty_state(WIDTH, S_LAYOUT, DEN_LAYOUT)
        if ONE_SPLIT:
            first_split = 0
            num_splits: gl.constexpr = 1
        else:
            first_split = begin // SPLIT_TILES
            num_splits = (end - 1) // SPLIT_TILES - first_split + 1
        for split in range(num_splits):
            if ONE_SPLIT:
                low = begin
                high = end
            else:
                low = gl.maximum(begin, (first_split + split) * SPLIT_TILES)
                high = gl.minimum(end, (first_split + split + 1) * SPLIT_TILES)
            m, den, p = _first_tile(
                low, loads, q, k_pipe, position, num_keys, c, left, right,
                BLOCK_N, WIDTH, STAGES, HAS_LEFT, HAS_RIGHT, S_LAYOUT, DEN_LAYOUT, P_LAYOUT, dtype,
            )  # fmt: skip
            acc = gl.zeros([WARPGROUP_ROWS, HEAD_DIM], gl.float32, O_LAYOUT)
            rest = low + 1
            if HAS_LEFT:
                m, den, acc, p = _run_tiles(
                    rest, gl.minimum(whole, high), low, loads, m, den, acc, p, q, k_pipe, v_pipe, position, num_keys, c,
                    left, right, BLOCK_N, WIDTH, STAGES, HAS_LEFT, HAS_RIGHT, True, S_LAYOUT, O_LAYOUT, DEN_LAYOUT,
                    P_LAYOUT, dtype,
                )  # fmt: skip
                rest = gl.maximum(rest, gl.minimum(whole, high))
            m, den, acc, p = _run_tiles(
                rest, gl.minimum(part, high), low, loads, m, den, acc, p, q, k_pipe, v_pipe, position, num_keys, c,
                left, right, BLOCK_N, WIDTH, STAGES, HAS_LEFT, HAS_RIGHT, False, S_LAYOUT, O_LAYOUT, DEN_LAYOUT,
                P_LAYOUT, dtype,
            )  # fmt: skip
            m, den, acc, p = _run_tiles(
                gl.maximum(rest, part), high, low, loads, m, den, acc, p, q, k_pipe, v_pipe, position, num_keys, c,
                left, right, BLOCK_N, WIDTH, STAGES, HAS_LEFT, HAS_RIGHT, True, S_LAYOUT, O_LAYOUT, DEN_LAYOUT,
                P_LAYOUT, dtype,
            )  # fmt: skip
            loads += high - low
            last = split == num_splits - 1
            mbarrier.arrive(q_empty.index(GROUP_INDEX), pred=last)
            acc = _last_product(loads, acc, p, v_pipe, STAGES)
            if ONE_SPLIT:
                acc = acc + 0.0
            else:
                if split == 0:
                    # the output of the tile before may still be leaving from this memory
                    tma.store_wait(0)
                    # as merged into nothing: -0 becomes 0
                    acc = acc + 0.0
                else:
                    acc_all = acc_s.index(GROUP_INDEX).load(O_LAYOUT)
                    m, den, acc = merge(m_all, den_all, acc_all, m, den, acc, DEN_LAYOUT, O_LAYOUT)
                m_all = m
                den_all = den
            if last:
                out, lse = finish(m, den, acc, sink_ptr, head, WIDTH, HAS_SINK, S_LAYOUT, O_LAYOUT)
                if HAS_LSE:
                    row = row0 + row_of
                    gl.store(lse_ptr + (q_begin + row) * HEADS + head, lse, mask=row < num_queries)
                if ONE_SPLIT:
                    tma.store_wait(0)
                matrix(out_s).store(out.to(dtype))
                fence_async_shared()
                store_box(out_desc, q_begin, num_queries, row0 + GROUP_INDEX * WARPGROUP_ROWS, head * HEAD_DIM, out_s)
            elif not ONE_SPLIT:
                acc_s.index(GROUP_INDEX).store(acc)
        heard += 1
        head, q_begin, num_queries, num_keys, row0 = hear_tile(tile_s, tile_full, tile_empty, heard)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_sequences", "num_tiles", "stride_table"])
def hopper_forward_kernel(
    q_desc, k_desc, v_desc, out_desc, lse_ptr, sink_ptr, cu_q_ptr, cu_k_ptr, kv_lens_ptr, table_ptr, counter_ptr,
    c, left, right, num_sequences, num_tiles, stride_table,
    HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    SPLIT: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    HAS_SINK: gl.constexpr, HAS_LSE: gl.constexpr, ONE_SPLIT: gl.constexpr, PAGE: gl.constexpr,
    FEW_ROWS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Grid: as many programs as fit the GPU, at most. ONE_SPLIT: no sequence has more than SPLIT keys.

    PAGE: 0, or a multiple of BLOCK_N: k and v are then caches, read through tables by kv_lens. FEW_ROWS: sequences of
    no more rows (queries x heads of a group) are another launch's.
    """
    GROUPS: gl.constexpr = BLOCK_M // WARPGROUP_ROWS
    q_s = boxes(q_desc, GROUPS)
    k_s = boxes(k_desc, STAGES)
    v_s = boxes(v_desc, STAGES)
    if ONE_SPLIT:
        acc_s = boxes(out_desc, GROUPS)
    else:
        acc_s = gl.allocate_shared_memory(
            gl.float32, [GROUPS, WARPGROUP_ROWS, HEAD_DIM], gl.NVMMASharedLayout(128, 32, 2)
        )
    tile_s = gl.allocate_shared_memory(gl.int32, [TILE_SLOTS * TILE_FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = barriers(GROUPS, 1)
    q_empty = barriers(GROUPS, 1)
    k_full = barriers(STAGES, 1)
    k_empty = barriers(STAGES, GROUPS)
    v_full = barriers(STAGES, 1)
    v_empty = barriers(STAGES, GROUPS)
    tile_full = barriers(TILE_SLOTS, 1)
    tile_empty = barriers(TILE_SLOTS, GROUPS)
    fence_async_shared()
    all_warps_meet()
    gl.warp_specialize(
        [
            (_consumer, (
                out_desc, lse_ptr, sink_ptr, q_s, k_s, v_s, acc_s, tile_s, q_full, q_empty, k_full, k_empty,
                v_full, v_empty, tile_full, tile_empty, c, left, right, gl.constexpr(0), HEADS, HEAD_DIM,
                BLOCK_M, BLOCK_N, SPLIT, WIDTH, STAGES, HAS_LEFT, HAS_RIGHT, HAS_SINK, HAS_LSE, ONE_SPLIT,
            )),
            (_consumer, (
                out_desc, lse_ptr, sink_ptr, q_s, k_s, v_s, acc_s, tile_s, q_full, q_empty, k_full, k_empty,
                v_full, v_empty, tile_full, tile_empty, c, left, right, gl.constexpr(1), HEADS, HEAD_DIM,
                BLOCK_M, BLOCK_N, SPLIT, WIDTH, STAGES, HAS_LEFT, HAS_RIGHT, HAS_SINK, HAS_LSE, ONE_SPLIT,
            )),
            (_producer, (
                q_desc, k_desc, v_desc, q_s, k_s, v_s, tile_s, q_full, q_empty, k_full, k_empty, v_full, v_empty,
                tile_full, tile_empty, cu_q_ptr, cu_k_ptr, kv_lens_ptr, table_ptr, counter_ptr, left, right,
                num_sequences, num_tiles, stride_table, HEADS, GROUP, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, PAGE,
                FEW_ROWS, HAS_LEFT, HAS_RIGHT,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
