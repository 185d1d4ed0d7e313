"""Gradient of keys and values for Hopper in Gluon; formulas and promises are hopper_backward's.

A tile is 128 keys of a key head, 64 per consumer warpgroup, which runs through its group's heads, in each through the
queries, ascending. Scores are transposed, [keys, queries], so that p and dS need no transposition.
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

from rlalign_kernels.attention import triton_backward
from rlalign_kernels.attention.hopper_backward import seen
from rlalign_kernels.attention.hopper_tiles import (
    TILE_FIELDS,
    TILE_SLOTS,
    find_sequence,
    hear_tile,
    load_box,
    store_box,
    tell_end,
    tell_tile,
)
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

query_range = gluon.jit(triton_backward.query_range.fn)


@gluon.jit
def _dkv_producer(
    q_desc, do_desc, k_desc, v_desc, terms_desc, q_s, do_s, lse_s, delta_s, k_s, v_s, tile_s,
    kv_full, kv_empty, q_full, q_empty, do_full, do_empty, tile_full, tile_empty,
    cu_q_ptr, cu_k_ptr, counter_ptr, left, right, num_sequences, num_tiles, num_row_tiles,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """As the forward's; a box of queries comes with their terms."""
    loads = 0
    told = 0
    drawn = draw(counter_ptr)
    while drawn < num_tiles:
        kv_head = drawn % KV_HEADS
        # the first keys of a causal sequence are seen by the most queries: they go first
        tile = drawn // KV_HEADS
        b, first_tile = find_sequence(tile, cu_k_ptr, num_sequences, 1, BLOCK_N)
        n0 = (tile - first_tile) * BLOCK_N
        k_begin = gl.load(cu_k_ptr + b).to(gl.int32)
        num_keys = gl.load(cu_k_ptr + b + 1).to(gl.int32) - k_begin
        q_begin = gl.load(cu_q_ptr + b).to(gl.int32)
        num_queries = gl.load(cu_q_ptr + b + 1).to(gl.int32) - q_begin
        begin, _whole, _part, end = query_range(
            n0, num_queries, num_keys, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
        )
        if (n0 < num_keys) & (begin < end):
            tell_tile(tile_s, tile_full, tile_empty, told, kv_head, k_begin, num_queries, num_keys, n0)
            for w in gl.static_range(BLOCK_N // WARPGROUP_ROWS):
                mbarrier.wait(kv_empty.index(w), (told & 1) ^ 1)
                mbarrier.expect(kv_full.index(w), k_desc.block_type.nbytes + v_desc.block_type.nbytes)
                row = n0 + w * WARPGROUP_ROWS
                load_box(k_desc, k_begin, num_keys, row, kv_head * HEAD_DIM, kv_full.index(w), k_s.index(w))
                load_box(v_desc, k_begin, num_keys, row, kv_head * HEAD_DIM, kv_full.index(w), v_s.index(w))
            told += 1
            first_row_tile = q_begin // BLOCK_M + b
            for g in range(GROUP):
                head = kv_head * GROUP + g
                for m0 in range(begin, end, BLOCK_M):
                    stage = loads % STAGES
                    phase = (loads // STAGES & 1) ^ 1
                    terms = (head * num_row_tiles + first_row_tile) * BLOCK_M + m0
                    mbarrier.wait(q_empty.index(stage), phase)
                    mbarrier.expect(q_full.index(stage), q_desc.block_type.nbytes + terms_desc.block_type.nbytes)
                    load_box(q_desc, q_begin, num_queries, m0, head * HEAD_DIM, q_full.index(stage), q_s.index(stage))
                    copy_in(terms_desc, [terms], q_full.index(stage), lse_s.index(stage))
                    terms += KV_HEADS * GROUP * num_row_tiles * BLOCK_M
                    mbarrier.wait(do_empty.index(stage), phase)
                    mbarrier.expect(do_full.index(stage), do_desc.block_type.nbytes + terms_desc.block_type.nbytes)
                    load_box(
                        do_desc, q_begin, num_queries, m0, head * HEAD_DIM, do_full.index(stage), do_s.index(stage)
                    )
                    copy_in(terms_desc, [terms], do_full.index(stage), delta_s.index(stage))
                    loads += 1
        drawn = draw(counter_ptr)
    tell_end(tile_s, tile_full, tile_empty, told)
    leave_counter(counter_ptr, drawn, num_tiles)


@gluon.jit
def _dkv_consumer(
    dk_desc, dv_desc, q_s, do_s, lse_s, delta_s, k_s, v_s, dk_s, dv_s, tile_s,
    kv_full, kv_empty, q_full, q_empty, do_full, do_empty, tile_full, tile_empty,
    scale, c, left, right, GROUP_INDEX: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """Keys GROUP_INDEX * 64 .. + 63 of a tile. Scores are transposed, [keys, queries]."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    QUERIES: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    dtype: gl.constexpr = dk_desc.dtype
    k = matrix(k_s.index(GROUP_INDEX))
    v = matrix(v_s.index(GROUP_INDEX))
    key_of = GROUP_INDEX * WARPGROUP_ROWS + gl.arange(0, WARPGROUP_ROWS, gl.SliceLayout(1, S_LAYOUT))
    query_of = gl.arange(0, BLOCK_M, QUERIES)
    zero = gl.zeros([WARPGROUP_ROWS, BLOCK_M], gl.float32, S_LAYOUT)
    loads = 0
    heard = 0
    kv_head, k_begin, num_queries, num_keys, n0 = hear_tile(tile_s, tile_full, tile_empty, heard)
    while kv_head >= 0:
        begin, whole, part, end = query_range(
            n0, num_queries, num_keys, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
        )
        num_blocks = (end - begin + BLOCK_M - 1) // BLOCK_M
        n = gl.expand_dims(n0 + key_of, 1)
        mbarrier.wait(kv_full.index(GROUP_INDEX), heard & 1)
        dk = gl.zeros([WARPGROUP_ROWS, HEAD_DIM], gl.float32, O_LAYOUT)
        dv = gl.zeros([WARPGROUP_ROWS, HEAD_DIM], gl.float32, O_LAYOUT)
        # before the first block there is no dS: zeros stand for it, times a box that is there
        ds16 = gl.zeros([WARPGROUP_ROWS, BLOCK_M], dtype, P_LAYOUT)
        m0 = begin
        for block in range(num_blocks * GROUP):
            load = loads + block
            stage = load % STAGES
            phase = load // STAGES & 1
            before = gl.where(block > 0, load - 1, load) % STAGES
            mbarrier.wait(q_full.index(stage), phase)
            pending_s = warpgroup_mma(k, matrix(q_s.index(stage)).permute((1, 0)), zero, use_acc=False, is_async=True)
            mbarrier.wait(do_full.index(stage), phase)
            pending_dp = warpgroup_mma(v, matrix(do_s.index(stage)).permute((1, 0)), zero, use_acc=False, is_async=True)
            pending_dk = warpgroup_mma(ds16, matrix(q_s.index(before)), dk, is_async=True)
            s = warpgroup_mma_wait(2, [pending_s])
            p = gl.exp2(gl.fma(s, c, gl.expand_dims(lse_s.index(stage).load(QUERIES), 0)))
            masked = (m0 < whole) | (m0 >= part)
            if masked:
                i = gl.expand_dims(m0 + query_of, 0)
                p = gl.where(seen(n, i, num_keys - num_queries, num_keys, left, right, HAS_LEFT, HAS_RIGHT), p, 0.0)
            p16 = gl.convert_layout(p.to(dtype), P_LAYOUT)
            pending_dv = warpgroup_mma(p16, matrix(do_s.index(stage)), dv, is_async=True)
            dp = warpgroup_mma_wait(2, [pending_dp])
            ds = p * (dp - gl.expand_dims(delta_s.index(stage).load(QUERIES), 0))
            # passes at once, and keeps the arithmetic above before the next wait: see the forward
            mbarrier.wait(do_full.index(stage), phase)
            dk, ds = warpgroup_mma_wait(1, [pending_dk, ds])
            mbarrier.arrive(q_empty.index(before), pred=block > 0)
            ds16 = gl.convert_layout(ds.to(dtype), P_LAYOUT)
            dv = warpgroup_mma_wait(0, [pending_dv])
            mbarrier.arrive(do_empty.index(stage))
            # the next head's queries follow the last ones of this
            m0 = gl.where(m0 + BLOCK_M < end, m0 + BLOCK_M, begin)
        loads += num_blocks * GROUP
        last = (loads - 1) % STAGES
        pending_dk = warpgroup_mma(ds16, matrix(q_s.index(last)), dk, is_async=True)
        tma.store_wait(0)
        matrix(dv_s.index(GROUP_INDEX)).store(dv.to(dtype))
        dk = warpgroup_mma_wait(0, [pending_dk])
        mbarrier.arrive(q_empty.index(last))
        mbarrier.arrive(kv_empty.index(GROUP_INDEX))
        matrix(dk_s.index(GROUP_INDEX)).store((dk * scale).to(dtype))
        fence_async_shared()
        row = n0 + GROUP_INDEX * WARPGROUP_ROWS
        store_box(dv_desc, k_begin, num_keys, row, kv_head * HEAD_DIM, dv_s.index(GROUP_INDEX))
        store_box(dk_desc, k_begin, num_keys, row, kv_head * HEAD_DIM, dk_s.index(GROUP_INDEX))
        heard += 1
        kv_head, k_begin, num_queries, num_keys, n0 = hear_tile(tile_s, tile_full, tile_empty, heard)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_sequences", "num_tiles", "num_row_tiles"])
def hopper_dkv_kernel(
    q_desc, do_desc, k_desc, v_desc, terms_desc, dk_desc, dv_desc, cu_q_ptr, cu_k_ptr, counter_ptr,
    scale, c, left, right, num_sequences, num_tiles, num_row_tiles,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Keys that no query sees are not written."""
    GROUPS: gl.constexpr = BLOCK_N // WARPGROUP_ROWS
    k_s = boxes(k_desc, GROUPS)
    v_s = boxes(v_desc, GROUPS)
    dk_s = boxes(dk_desc, GROUPS)
    dv_s = boxes(dv_desc, GROUPS)
    q_s = boxes(q_desc, STAGES)
    do_s = boxes(do_desc, STAGES)
    lse_s = boxes(terms_desc, STAGES)
    delta_s = boxes(terms_desc, STAGES)
    tile_s = gl.allocate_shared_memory(gl.int32, [TILE_SLOTS * TILE_FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    kv_full = barriers(GROUPS, 1)
    kv_empty = barriers(GROUPS, 1)
    q_full = barriers(STAGES, 1)
    q_empty = barriers(STAGES, GROUPS)
    do_full = barriers(STAGES, 1)
    do_empty = barriers(STAGES, GROUPS)
    tile_full = barriers(TILE_SLOTS, 1)
    tile_empty = barriers(TILE_SLOTS, GROUPS)
    fence_async_shared()
    all_warps_meet()
    gl.warp_specialize(
        [
            (_dkv_consumer, (
                dk_desc, dv_desc, q_s, do_s, lse_s, delta_s, k_s, v_s, dk_s, dv_s, tile_s, kv_full, kv_empty,
                q_full, q_empty, do_full, do_empty, tile_full, tile_empty, scale, c, left, right, gl.constexpr(0),
                GROUP, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, HAS_LEFT, HAS_RIGHT,
            )),
            (_dkv_consumer, (
                dk_desc, dv_desc, q_s, do_s, lse_s, delta_s, k_s, v_s, dk_s, dv_s, tile_s, kv_full, kv_empty,
                q_full, q_empty, do_full, do_empty, tile_full, tile_empty, scale, c, left, right, gl.constexpr(1),
                GROUP, HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, HAS_LEFT, HAS_RIGHT,
            )),
            (_dkv_producer, (
                q_desc, do_desc, k_desc, v_desc, terms_desc, q_s, do_s, lse_s, delta_s, k_s, v_s, tile_s, kv_full,
                kv_empty, q_full, q_empty, do_full, do_empty, tile_full, tile_empty, cu_q_ptr, cu_k_ptr,
                counter_ptr, left, right, num_sequences, num_tiles, num_row_tiles, KV_HEADS, GROUP, HEAD_DIM,
                BLOCK_M, BLOCK_N, STAGES, HAS_LEFT, HAS_RIGHT,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
