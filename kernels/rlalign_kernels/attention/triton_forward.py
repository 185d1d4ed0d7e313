"""Attention forward in stock Triton, over packed rows or pages: any lengths, chunks and batches, one plan.

A program holds BLOCK_M rows of one sequence and key head: a row is a (query position, head of the group) pair, so that
a group's heads share the keys they read. It runs through all of its keys.
Promised: forward bits depend on the row's own keys alone. Accumulation: float32; see triton_tiles for the order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlalign_kernels.attention.triton_tiles import (
    FLOOR,
    empty_state,
    find_sequence,
    finish,
    load_box,
    load_rows,
    merge,
    scores,
    softmax_step,
    visible,
)


@triton.jit
def key_range(
    row0, num_queries, num_keys, left, right,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """Of the rows from ``row0``: tiles [begin, end) that any row sees, and [whole, part) that every row sees whole."""
    shift = num_keys - num_queries
    first = shift + row0 // GROUP
    last = shift + tl.minimum((row0 + BLOCK_M - 1) // GROUP, num_queries - 1)
    begin = 0
    whole = 0
    end = num_keys
    part = num_keys
    if HAS_LEFT:
        begin = tl.maximum(first - left, 0) // BLOCK_N * BLOCK_N
        whole = tl.cdiv(tl.maximum(last - left, 0), BLOCK_N) * BLOCK_N
    if HAS_RIGHT:
        end = tl.minimum(num_keys, last + right + 1)
        part = tl.minimum(num_keys, first + right + 1)
    part = tl.maximum(part, 0) // BLOCK_N * BLOCK_N
    # no tile is whole: all of them are looked at key by key
    none = whole >= part
    whole = tl.where(none, begin, whole)
    part = tl.where(none, begin, part)
    return begin, whole, part, end


@triton.jit
def run_tiles(
    low, high, begin, m, den, acc, m_all, den_all, acc_all,
    q, k_ptr, v_ptr, k_desc, v_desc, table_ptr, row0, kv_head, position, num_keys, offs_d, offs_dv,
    c, cap_scale, left, right, stride_kp, stride_kn, stride_vp, stride_vn,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SPLIT: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_CAP: tl.constexpr, MASKED: tl.constexpr,
    ONE_SPLIT: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles [low, high) of a run of keys that began at ``begin``."""
    for start in tl.range(low, high, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        if TMA:
            k = load_box(k_desc, table_ptr, row0, start, kv_head * HEAD_DIM, PAGE)
        else:
            k = load_rows(
                k_ptr, table_ptr, n, num_keys, offs_d, stride_kp, stride_kn, PAGE, MASKED, HEAD_DIM, BLOCK_D,
                PAGE >= BLOCK_N,
            )  # fmt: skip
        s = scores(q, k, cap_scale, HAS_CAP, PRECISION)
        if MASKED:
            s = tl.where(visible(position, n, num_keys, left, right, HAS_LEFT, HAS_RIGHT), s, float("-inf"))
        if TMA:
            v = load_box(v_desc, table_ptr, row0, start, kv_head * VALUE_DIM, PAGE)
        else:
            v = load_rows(
                v_ptr, table_ptr, n, num_keys, offs_dv, stride_vp, stride_vn, PAGE, MASKED, VALUE_DIM, BLOCK_DV,
                PAGE >= BLOCK_N,
            )  # fmt: skip
        if not ONE_SPLIT:  # noqa: SIM102  a constexpr: decided when compiled
            if (start % SPLIT == 0) & (start > begin):
                m_all, den_all, acc_all = merge(m_all, den_all, acc_all, m, den, acc)
                m = tl.full([BLOCK_M], FLOOR, tl.float32)
                if MASKED:
                    # where every row sees a key, its factor exp2(FLOOR - m) = 0 clears these
                    den = tl.zeros([BLOCK_M, WIDTH], tl.float32)
                    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        m, den, acc = softmax_step(s, v, m, den, acc, c, BLOCK_M, BLOCK_N, WIDTH, PRECISION)
    return m, den, acc, m_all, den_all, acc_all


@triton.jit
def place_rows(
    rows, num_rows, q_begin, kv_head, out_ptr, lse_ptr, sink_ptr, stride_ot, stride_oh, stride_lt,
    GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_SINK: tl.constexpr,
):  # fmt: skip
    """Where rows' results go: (mine, sink, out_ptrs, lse_ptrs, out_mask)."""
    offs_dv = tl.arange(0, BLOCK_DV)
    mine = rows < num_rows
    head = (kv_head * GROUP + rows % GROUP).to(tl.int64)
    token = (q_begin + rows // GROUP).to(tl.int64)
    sink = tl.zeros(rows.shape, tl.float32)
    if HAS_SINK:
        sink = tl.load(sink_ptr + head, mask=mine, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + (token * stride_ot + head * stride_oh)[:, None] + offs_dv[None, :]
    return mine, sink, out_ptrs, lse_ptr + token * stride_lt + head, mine[:, None] & (offs_dv < VALUE_DIM)[None, :]


@triton.jit
def store_rows(
    m, den, acc, sink, out_ptrs, lse_ptrs, mine, out_mask,
    M: tl.constexpr, WIDTH: tl.constexpr, HAS_SINK: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    out, lse = finish(m, den, acc, sink, M, WIDTH, HAS_SINK)
    tl.store(out_ptrs, out.to(out_ptrs.dtype.element_ty), mask=out_mask)
    if HAS_LSE:
        tl.store(lse_ptrs, lse, mask=mine)


@triton.jit(do_not_specialize=["num_sequences", "stride_table"])
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, out_ptr, lse_ptr, sink_ptr, cu_q_ptr, cu_k_ptr, kv_lens_ptr, table_ptr,
    c, cap_scale, left, right, num_sequences,
    stride_qt, stride_qh, stride_kp, stride_kn, stride_kh, stride_vp, stride_vn, stride_vh,
    stride_ot, stride_oh, stride_lt, stride_table,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SPLIT: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SINK: tl.constexpr,
    HAS_LSE: tl.constexpr, FEW_ROWS: tl.constexpr, ONLY_FEW: tl.constexpr, ONE_SPLIT: tl.constexpr,
    TMA: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: row tiles x key heads, or with ONLY_FEW sequences x key heads.

    ONLY_FEW: for sequences of at most BLOCK_M rows, a tile each. FEW_ROWS: sequences of no more rows are another
    launch's. ONE_SPLIT: no sequence has more than one split.
    """
    pid = tl.program_id(0)
    kv_head = pid % KV_HEADS
    if ONLY_FEW:
        b = pid // KV_HEADS
        row0 = 0
    else:
        # the last tiles of a causal sequence have the most keys: they go first
        tile = tl.num_programs(0) // KV_HEADS - 1 - pid // KV_HEADS
        b, first_tile = find_sequence(tile, cu_q_ptr, num_sequences, GROUP, BLOCK_M)
        row0 = (tile - first_tile) * BLOCK_M
    q_begin = tl.load(cu_q_ptr + b).to(tl.int32)
    num_queries = tl.load(cu_q_ptr + b + 1).to(tl.int32) - q_begin
    num_rows = num_queries * GROUP
    if ONLY_FEW:
        if (num_rows == 0) | (num_rows > BLOCK_M):
            return
    elif (row0 >= num_rows) | (num_rows <= FEW_ROWS):
        return
    k_begin = 0
    if PAGE == 0:
        k_begin = tl.load(cu_k_ptr + b).to(tl.int32)
        num_keys = tl.load(cu_k_ptr + b + 1).to(tl.int32) - k_begin
        k_ptr += k_begin.to(tl.int64) * stride_kn
        v_ptr += k_begin.to(tl.int64) * stride_vn
    else:
        num_keys = tl.load(kv_lens_ptr + b).to(tl.int32)
        table_ptr += b.to(tl.int64) * stride_table
    k_ptr += kv_head.to(tl.int64) * stride_kh
    v_ptr += kv_head.to(tl.int64) * stride_vh

    begin, whole, part, end = key_range(
        row0, num_queries, num_keys, left, right, GROUP, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )

    rows = row0 + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    mine = rows < num_rows
    head = (kv_head * GROUP + rows % GROUP).to(tl.int64)
    token = (q_begin + rows // GROUP).to(tl.int64)
    position = num_keys - num_queries + rows // GROUP
    q_mask = mine[:, None] & (offs_d < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + (token * stride_qt + head * stride_qh)[:, None] + offs_d[None, :], mask=q_mask, other=0.0)

    m, den, acc = empty_state(BLOCK_M, BLOCK_DV, WIDTH)
    m_all, den_all, acc_all = empty_state(BLOCK_M, BLOCK_DV, WIDTH)
    if HAS_LEFT:
        m, den, acc, m_all, den_all, acc_all = run_tiles(
            begin, whole, begin, m, den, acc, m_all, den_all, acc_all,
            q, k_ptr, v_ptr, k_desc, v_desc, table_ptr, k_begin, kv_head, position, num_keys, offs_d, offs_dv,
            c, cap_scale, left, right, stride_kp, stride_kn, stride_vp, stride_vn,
            HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, SPLIT, WIDTH, PAGE,
            HAS_LEFT, HAS_RIGHT, HAS_CAP, True, ONE_SPLIT, False, PRECISION, 1,
        )  # fmt: skip
    m, den, acc, m_all, den_all, acc_all = run_tiles(
        whole, part, begin, m, den, acc, m_all, den_all, acc_all,
        q, k_ptr, v_ptr, k_desc, v_desc, table_ptr, k_begin, kv_head, position, num_keys, offs_d, offs_dv,
        c, cap_scale, left, right, stride_kp, stride_kn, stride_vp, stride_vn,
        HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, SPLIT, WIDTH, PAGE,
        HAS_LEFT, HAS_RIGHT, HAS_CAP, False, ONE_SPLIT, TMA, PRECISION, STAGES,
    )  # fmt: skip
    m, den, acc, m_all, den_all, acc_all = run_tiles(
        part, end, begin, m, den, acc, m_all, den_all, acc_all,
        q, k_ptr, v_ptr, k_desc, v_desc, table_ptr, k_begin, kv_head, position, num_keys, offs_d, offs_dv,
        c, cap_scale, left, right, stride_kp, stride_kn, stride_vp, stride_vn,
        HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, SPLIT, WIDTH, PAGE,
        HAS_LEFT, HAS_RIGHT, HAS_CAP, True, ONE_SPLIT, False, PRECISION, 1,
    )  # fmt: skip

    mine, sink, out_ptrs, lse_ptrs, out_mask = place_rows(
        rows, num_rows, q_begin, kv_head, out_ptr, lse_ptr, sink_ptr, stride_ot, stride_oh, stride_lt,
        GROUP, VALUE_DIM, BLOCK_DV, HAS_SINK,
    )  # fmt: skip
    m, den, acc = merge(m_all, den_all, acc_all, m, den, acc)
    store_rows(m, den, acc, sink, out_ptrs, lse_ptrs, mine, out_mask, BLOCK_M, WIDTH, HAS_SINK, HAS_LSE)
