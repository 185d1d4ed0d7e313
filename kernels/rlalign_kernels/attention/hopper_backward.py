"""Gradient of attention for Hopper in Gluon: the sums of triton_backward in their order, no atomics on gradients.

    p = exp2(fma(S, c, -lse log2 e));  dS = p * (dO v^T - delta);  dV = p^T dO;  dK = scale dS^T q;  dQ = scale dS k

Here are the terms of each row, and dQ: a tile is 128 queries of a head, 64 per consumer warpgroup, and runs through
the keys, ascending. dK and dV: hopper_backward_keys.
Promised: run-to-run the same bits, whatever program computes which tile. Accumulation: float32; p and dS are rounded
to the inputs' dtype for their products.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

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
from rlalign_kernels.attention.triton_tiles import find_sequence as triton_find_sequence
from rlalign_kernels.hopper_common import (
    WARPGROUP_ROWS,
    all_warps_meet,
    barriers,
    boxes,
    copy_in,
    draw,
    leave_counter,
    matrix,
)
from rlalign_kernels.triton_math import LOG2E
from rlalign_kernels.triton_math import fold as triton_fold


@triton.jit(do_not_specialize=["num_sequences"])
def row_terms_kernel(
    out_ptr, grad_ptr, lse_ptr, terms_ptr, cu_q_ptr, num_sequences,
    stride_ot, stride_oh, stride_gt, stride_gh,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """terms float32 [2, HEADS, tiles, BLOCK_M]: -lse log2(e), and delta = sum(dO * O), per tile of one sequence.

    Rows past a sequence's end, and rows that saw no key, are -inf and 0: their weights come out as 0.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1)
    b, first_tile = triton_find_sequence(tile, cu_q_ptr, num_sequences, 1, BLOCK_M)
    q_begin = tl.load(cu_q_ptr + b).to(tl.int32)
    row = (tile - first_tile) * BLOCK_M + tl.arange(0, BLOCK_M)
    mine = row < tl.load(cu_q_ptr + b + 1).to(tl.int32) - q_begin
    token = (q_begin + row).to(tl.int64)
    offs_d = tl.arange(0, VALUE_DIM)
    out_ptrs = out_ptr + (token * stride_ot + head.to(tl.int64) * stride_oh)[:, None] + offs_d[None, :]
    grad_ptrs = grad_ptr + (token * stride_gt + head.to(tl.int64) * stride_gh)[:, None] + offs_d[None, :]
    out = tl.load(out_ptrs, mask=mine[:, None], other=0.0).to(tl.float32)
    grad = tl.load(grad_ptrs, mask=mine[:, None], other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + token * HEADS + head, mask=mine, other=float("inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    place = (head * tl.num_programs(0) + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(terms_ptr + place, -lse * LOG2E)
    delta = tl.reshape(triton_fold(out * grad, BLOCK_M, VALUE_DIM, 1), [BLOCK_M])
    tl.store(terms_ptr + HEADS * tl.num_programs(0) * BLOCK_M + place, delta)


@gluon.jit
def seen(n, i, shift, num_keys, left, right, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr):
    """Whether the i-th query sees key n; both broadcast to a tile."""
    seen = n < num_keys
    if HAS_RIGHT:
        seen = seen & (n <= shift + i + right)
    if HAS_LEFT:
        seen = seen & (n >= shift + i - left)
    return seen


@gluon.jit
def _dq_producer(
    q_desc, do_desc, k_desc, v_desc, terms_desc, q_s, do_s, lse_s, delta_s, k_s, v_s, tile_s,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, tile_full, tile_empty,
    cu_q_ptr, cu_k_ptr, counter_ptr, left, right, num_sequences, num_tiles, num_row_tiles,
    HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """As the forward's; the queries come with the gradient of their output and their terms."""
    loads = 0
    told = 0
    drawn = draw(counter_ptr)
    while drawn < num_tiles:
        head = drawn % HEADS
        tile = num_tiles // HEADS - 1 - drawn // HEADS
        b, first_tile = find_sequence(tile, cu_q_ptr, num_sequences, 1, BLOCK_M)
        row0 = (tile - first_tile) * BLOCK_M
        q_begin = gl.load(cu_q_ptr + b).to(gl.int32)
        num_queries = gl.load(cu_q_ptr + b + 1).to(gl.int32) - q_begin
        if row0 < num_queries:
            k_begin = gl.load(cu_k_ptr + b).to(gl.int32)
            num_keys = gl.load(cu_k_ptr + b + 1).to(gl.int32) - k_begin
            begin, _whole, _part, end = tiles_of_keys(
                row0, num_queries, num_keys, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
            )
            tell_tile(tile_s, tile_full, tile_empty, told, head, q_begin, num_queries, num_keys, row0)
            terms = (head * num_row_tiles + q_begin // WARPGROUP_ROWS + b) * WARPGROUP_ROWS + row0
            for w in gl.static_range(BLOCK_M // WARPGROUP_ROWS):
                full = q_full.index(w)
                mbarrier.wait(q_empty.index(w), (told & 1) ^ 1)
                mbarrier.expect(
                    full, q_desc.block_type.nbytes + do_desc.block_type.nbytes + 2 * terms_desc.block_type.nbytes
                )
                row = row0 + w * WARPGROUP_ROWS
                load_box(q_desc, q_begin, num_queries, row, head * HEAD_DIM, full, q_s.index(w))
                load_box(do_desc, q_begin, num_queries, row, head * HEAD_DIM, full, do_s.index(w))
                place = terms + w * WARPGROUP_ROWS
                copy_in(terms_desc, [place], full, lse_s.index(w))
                place += HEADS * num_row_tiles * WARPGROUP_ROWS
                copy_in(terms_desc, [place], full, delta_s.index(w))
            told += 1
            key_column = head // GROUP * HEAD_DIM
            for tile in range(begin, end):
                stage = loads % STAGES
                phase = (loads // STAGES & 1) ^ 1
                mbarrier.wait(k_empty.index(stage), phase)
                mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
                load_box(k_desc, k_begin, num_keys, tile * BLOCK_N, key_column, k_full.index(stage), k_s.index(stage))
                mbarrier.wait(v_empty.index(stage), phase)
                mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
                load_box(v_desc, k_begin, num_keys, tile * BLOCK_N, key_column, v_full.index(stage), v_s.index(stage))
                loads += 1
        drawn = draw(counter_ptr)
    tell_end(tile_s, tile_full, tile_empty, told)
    leave_counter(counter_ptr, drawn, num_tiles)


@gluon.jit
def _dq_consumer(
    dq_desc, q_s, do_s, lse_s, delta_s, k_s, v_s, dq_s, tile_s,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, tile_full, tile_empty,
    scale, c, left, right, GROUP_INDEX: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """Queries GROUP_INDEX * 64 .. + 63 of a tile."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    ROWS: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    dtype: gl.constexpr = dq_desc.dtype
    q = matrix(q_s.index(GROUP_INDEX))
    do = matrix(do_s.index(GROUP_INDEX))
    row_of = GROUP_INDEX * WARPGROUP_ROWS + gl.arange(0, WARPGROUP_ROWS, ROWS)
    key_of = gl.arange(0, BLOCK_N, gl.SliceLayout(0, S_LAYOUT))
    zero = gl.zeros([WARPGROUP_ROWS, BLOCK_N], gl.float32, S_LAYOUT)
    loads = 0
    heard = 0
    head, q_begin, num_queries, num_keys, row0 = hear_tile(tile_s, tile_full, tile_empty, heard)
    while head >= 0:
        begin, whole, part, end = tiles_of_keys(
            row0, num_queries, num_keys, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
        )
        i = gl.expand_dims(row0 + row_of, 1)
        mbarrier.wait(q_full.index(GROUP_INDEX), heard & 1)
        lse = gl.expand_dims(lse_s.index(GROUP_INDEX).load(ROWS), 1)
        delta = gl.expand_dims(delta_s.index(GROUP_INDEX).load(ROWS), 1)
        dq = gl.zeros([WARPGROUP_ROWS, HEAD_DIM], gl.float32, O_LAYOUT)
        # before the first tile there is no dS: zeros stand for it, times a box that is there
        ds16 = gl.zeros([WARPGROUP_ROWS, BLOCK_N], dtype, P_LAYOUT)
        for tile in range(begin, end):
            load = loads + (tile - begin)
            stage = load % STAGES
            phase = load // STAGES & 1
            before = gl.where(tile > begin, load - 1, load) % STAGES
            mbarrier.wait(k_full.index(stage), phase)
            pending_s = warpgroup_mma(q, matrix(k_s.index(stage)).permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(stage), phase)
            pending_dp = warpgroup_mma(do, matrix(v_s.index(stage)).permute((1, 0)), zero, use_acc=False, is_async=True)
            pending_dq = warpgroup_mma(ds16, matrix(k_s.index(before)), dq, is_async=True)
            s = warpgroup_mma_wait(2, [pending_s])
            p = gl.exp2(gl.fma(s, c, lse.broadcast_to(s.shape)))
            masked = (tile < whole) | (tile >= part)
            if masked:
                n = gl.expand_dims(tile * BLOCK_N + key_of, 0)
                p = gl.where(seen(n, i, num_keys - num_queries, num_keys, left, right, HAS_LEFT, HAS_RIGHT), p, 0.0)
            dp = warpgroup_mma_wait(1, [pending_dp])
            ds = p * (dp - delta)
            # passes at once, and keeps the arithmetic above before the next wait: see the forward
            mbarrier.wait(v_full.index(stage), phase)
            dq, ds = warpgroup_mma_wait(0, [pending_dq, ds])
            mbarrier.arrive(v_empty.index(stage))
            mbarrier.arrive(k_empty.index(before), pred=tile > begin)
            ds16 = gl.convert_layout(ds.to(dtype), P_LAYOUT)
        loads += end - begin
        mbarrier.arrive(q_empty.index(GROUP_INDEX))
        last = (loads - 1) % STAGES
        pending_dq = warpgroup_mma(ds16, matrix(k_s.index(last)), dq, is_async=True)
        dq = warpgroup_mma_wait(0, [pending_dq])
        mbarrier.arrive(k_empty.index(last))
        tma.store_wait(0)
        matrix(dq_s.index(GROUP_INDEX)).store((dq * scale).to(dtype))
        fence_async_shared()
        row = row0 + GROUP_INDEX * WARPGROUP_ROWS
        store_box(dq_desc, q_begin, num_queries, row, head * HEAD_DIM, dq_s.index(GROUP_INDEX))
        heard += 1
        head, q_begin, num_queries, num_keys, row0 = hear_tile(tile_s, tile_full, tile_empty, heard)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_sequences", "num_tiles", "num_row_tiles"])
def hopper_dq_kernel(
    q_desc, do_desc, k_desc, v_desc, terms_desc, dq_desc, cu_q_ptr, cu_k_ptr, counter_ptr,
    scale, c, left, right, num_sequences, num_tiles, num_row_tiles,
    HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Every row of every sequence is written."""
    GROUPS: gl.constexpr = BLOCK_M // WARPGROUP_ROWS
    q_s = boxes(q_desc, GROUPS)
    do_s = boxes(do_desc, GROUPS)
    lse_s = boxes(terms_desc, GROUPS)
    delta_s = boxes(terms_desc, GROUPS)
    dq_s = boxes(dq_desc, GROUPS)
    k_s = boxes(k_desc, STAGES)
    v_s = boxes(v_desc, STAGES)
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
            (_dq_consumer, (
                dq_desc, q_s, do_s, lse_s, delta_s, k_s, v_s, dq_s, tile_s, q_full, q_empty, k_full, k_empty,
                v_full, v_empty, tile_full, tile_empty, scale, c, left, right, gl.constexpr(0), HEAD_DIM, BLOCK_M,
                BLOCK_N, STAGES, HAS_LEFT, HAS_RIGHT,
            )),
            (_dq_consumer, (
                dq_desc, q_s, do_s, lse_s, delta_s, k_s, v_s, dq_s, tile_s, q_full, q_empty, k_full, k_empty,
                v_full, v_empty, tile_full, tile_empty, scale, c, left, right, gl.constexpr(1), HEAD_DIM, BLOCK_M,
                BLOCK_N, STAGES, HAS_LEFT, HAS_RIGHT,
            )),
            (_dq_producer, (
                q_desc, do_desc, k_desc, v_desc, terms_desc, q_s, do_s, lse_s, delta_s, k_s, v_s, tile_s, q_full,
                q_empty, k_full, k_empty, v_full, v_empty, tile_full, tile_empty, cu_q_ptr, cu_k_ptr, counter_ptr,
                left, right, num_sequences, num_tiles, num_row_tiles, HEADS, GROUP, HEAD_DIM, BLOCK_M, BLOCK_N,
                STAGES, HAS_LEFT, HAS_RIGHT,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
