"""Attention of few rows with many keys: a program per split of a sequence's keys, and the last one merges.

Same plan and bits as triton_forward. Programs leave their splits' states in device memory and count themselves; who
comes last merges the states in ascending order, so the order of arrival changes nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlalign_kernels.attention.triton_forward import key_range, place_rows, run_tiles, store_rows
from rlalign_kernels.attention.triton_tiles import FLOOR, empty_state, merge

# States whose loads are in flight together while they are merged.
_UNROLL = tl.constexpr(8)


@triton.jit
def _merged_states(
    part_m_ptr, part_den_ptr, part_acc_ptr, slot0, first, last, stride_split, mine,
    ROWS: tl.constexpr, BLOCK_DV: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """State of rows [ROWS] after splits [first, last], which other programs wrote past this one's cache (.cg)."""
    lane = tl.arange(0, ROWS)
    wide = tl.arange(0, WIDTH)
    offs_dv = tl.arange(0, BLOCK_DV)
    m_all, den_all, acc_all = empty_state(ROWS, BLOCK_DV, WIDTH)
    for low in tl.range(first, last + 1, _UNROLL, num_stages=1):
        for i in tl.static_range(_UNROLL):
            live = low + i <= last
            mask = mine & (lane * 0 + low + i <= last)  # of lanes: the interpreter makes no mask of a scalar
            slot = slot0 + (low + i) * stride_split + lane
            den_ptrs = part_den_ptr + slot[:, None] * WIDTH + wide[None, :]
            acc_ptrs = part_acc_ptr + slot[:, None] * BLOCK_DV + offs_dv[None, :]
            m = tl.load(part_m_ptr + slot, mask=mask, other=FLOOR, cache_modifier=".cg")
            den = tl.load(den_ptrs, mask=mask[:, None], other=0.0, cache_modifier=".cg")
            acc = tl.load(acc_ptrs, mask=mask[:, None], other=0.0, cache_modifier=".cg")
            m, den, acc = merge(m_all, den_all, acc_all, m, den, acc)
            m_all = tl.where(live, m, m_all)
            den_all = tl.where(live, den, den_all)
            acc_all = tl.where(live, acc, acc_all)
    return m_all, den_all, acc_all


@triton.jit(do_not_specialize=["num_splits", "stride_table"])
def attention_decode_kernel(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, out_ptr, lse_ptr, sink_ptr, cu_q_ptr, kv_lens_ptr, table_ptr,
    part_m_ptr, arrived_ptr, c, cap_scale, left, right, num_splits, num_slots,
    stride_qt, stride_qh, stride_kp, stride_kn, stride_kh, stride_vp, stride_vn, stride_vh,
    stride_ot, stride_oh, stride_lt, stride_table,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MERGE_ROWS: tl.constexpr, SPLIT: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SINK: tl.constexpr,
    HAS_LSE: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (splits, key heads, sequences). Sequences of more than BLOCK_M rows are triton_forward's.

    MERGE_ROWS: no sequence here has more rows. part_m: float32, the maxima of num_slots states (at least B x key
    heads x num_splits x MERGE_ROWS), then their sums [WIDTH], then their outputs [BLOCK_DV]; arrived: int32 [B, key
    heads], 0 before and after.
    """
    split = tl.program_id(0)
    kv_head = tl.program_id(1)
    b = tl.program_id(2)
    q_begin = tl.load(cu_q_ptr + b).to(tl.int32)
    num_queries = tl.load(cu_q_ptr + b + 1).to(tl.int32) - q_begin
    num_keys = tl.load(kv_lens_ptr + b).to(tl.int32)
    num_rows = num_queries * GROUP
    begin, whole, part, end = key_range(
        0, num_queries, num_keys, left, right, GROUP, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    first_split = begin // SPLIT
    last_split = tl.maximum(tl.maximum(end - 1, 0) // SPLIT, first_split)
    # where max_seqlen_k was given too small: the count below must come to its end, or later calls' would not
    last_split = tl.minimum(last_split, num_splits - 1)
    if (num_rows == 0) | (num_rows > BLOCK_M) | (split < first_split) | (split > last_split):
        return
    begin = tl.maximum(begin, split * SPLIT)
    end = tl.minimum(end, (split + 1) * SPLIT)
    whole = tl.minimum(tl.maximum(whole, begin), end)
    part = tl.minimum(tl.maximum(part, whole), (split + 1) * SPLIT)
    table_ptr += b.to(tl.int64) * stride_table
    k_ptr += kv_head.to(tl.int64) * stride_kh
    v_ptr += kv_head.to(tl.int64) * stride_vh
    part_den_ptr = part_m_ptr + num_slots
    part_acc_ptr = part_den_ptr + num_slots.to(tl.int64) * WIDTH

    rows = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    mine = rows < num_rows
    position = num_keys - num_queries + rows // GROUP
    q_ptrs = q_ptr + ((q_begin + rows // GROUP).to(tl.int64) * stride_qt + (kv_head * GROUP + rows % GROUP).to(tl.int64) * stride_qh)[:, None]  # fmt: skip  # noqa: E501
    q = tl.load(q_ptrs + offs_d[None, :], mask=mine[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)

    m, den, acc = empty_state(BLOCK_M, BLOCK_DV, WIDTH)
    m_all, den_all, acc_all = empty_state(BLOCK_M, BLOCK_DV, WIDTH)
    if HAS_LEFT:
        m, den, acc, m_all, den_all, acc_all = run_tiles(
            begin, whole, begin, m, den, acc, m_all, den_all, acc_all,
            q, k_ptr, v_ptr, k_desc, v_desc, table_ptr, 0, kv_head, position, num_keys, offs_d, offs_dv,
            c, cap_scale, left, right, stride_kp, stride_kn, stride_vp, stride_vn,
            HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, SPLIT, WIDTH, PAGE,
            HAS_LEFT, HAS_RIGHT, HAS_CAP, True, True, False, PRECISION, 1,
        )  # fmt: skip
    m, den, acc, m_all, den_all, acc_all = run_tiles(
        whole, part, begin, m, den, acc, m_all, den_all, acc_all,
        q, k_ptr, v_ptr, k_desc, v_desc, table_ptr, 0, kv_head, position, num_keys, offs_d, offs_dv,
        c, cap_scale, left, right, stride_kp, stride_kn, stride_vp, stride_vn,
        HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, SPLIT, WIDTH, PAGE,
        HAS_LEFT, HAS_RIGHT, HAS_CAP, False, True, TMA, PRECISION, STAGES,
    )  # fmt: skip
    m, den, acc, m_all, den_all, acc_all = run_tiles(
        part, end, begin, m, den, acc, m_all, den_all, acc_all,
        q, k_ptr, v_ptr, k_desc, v_desc, table_ptr, 0, kv_head, position, num_keys, offs_d, offs_dv,
        c, cap_scale, left, right, stride_kp, stride_kn, stride_vp, stride_vn,
        HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, SPLIT, WIDTH, PAGE,
        HAS_LEFT, HAS_RIGHT, HAS_CAP, True, True, False, PRECISION, 1,
    )  # fmt: skip

    if last_split == first_split:
        m, den, acc = merge(m_all, den_all, acc_all, m, den, acc)
        _, sink, out_ptrs, lse_ptrs, out_mask = place_rows(
            rows, num_rows, q_begin, kv_head, out_ptr, lse_ptr, sink_ptr, stride_ot, stride_oh, stride_lt,
            GROUP, VALUE_DIM, BLOCK_DV, HAS_SINK,
        )  # fmt: skip
        store_rows(m, den, acc, sink, out_ptrs, lse_ptrs, mine, out_mask, BLOCK_M, WIDTH, HAS_SINK, HAS_LSE)
    else:
        place = b.to(tl.int64) * KV_HEADS + kv_head
        slot0 = place * num_splits * MERGE_ROWS
        slot = slot0 + split * MERGE_ROWS + rows
        kept = mine & (rows < MERGE_ROWS)
        tl.store(part_m_ptr + slot, m, mask=kept)
        tl.store(part_den_ptr + slot[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], den, mask=kept[:, None])
        tl.store(part_acc_ptr + slot[:, None] * BLOCK_DV + offs_dv[None, :], acc, mask=kept[:, None])
        # all threads' states are written before one of them counts this program
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + place, 1, sem="acq_rel") == last_split - first_split:
            tl.store(arrived_ptr + place, 0)
            few = tl.arange(0, MERGE_ROWS)
            few_mine, few_sink, few_out, few_lse, few_mask = place_rows(
                few, num_rows, q_begin, kv_head, out_ptr, lse_ptr, sink_ptr, stride_ot, stride_oh, stride_lt,
                GROUP, VALUE_DIM, BLOCK_DV, HAS_SINK,
            )  # fmt: skip
            few_m, few_den, few_acc = _merged_states(
                part_m_ptr, part_den_ptr, part_acc_ptr, slot0, first_split, last_split, MERGE_ROWS, few_mine,
                MERGE_ROWS, BLOCK_DV, WIDTH,
            )  # fmt: skip
            store_rows(
                few_m, few_den, few_acc, few_sink, few_out, few_lse, few_mine, few_mask, MERGE_ROWS, WIDTH,
                HAS_SINK, HAS_LSE,
            )  # fmt: skip
