"""Gradient of attention in stock Triton: recomputed from the saved log-sum-exp, no atomics.

    delta = sum(dO * O);  p = exp2(fma(S, c, -lse));  dS = p * (dO v^T - delta)
    dV = p^T dO, dK = scale dS^T q: per tile of keys; heads of the group in order, in each the queries ascending
    dQ = scale dS k: per tile of rows, keys ascending

Promised: run-to-run the same bits; each sum is one float32 chain, so tiles are schedule. Not promised: the same bits of
dK and dV in another packing. p and dS are rounded to the inputs' dtype for their products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlalign_kernels.attention.triton_forward import key_range
from rlalign_kernels.attention.triton_tiles import find_sequence, load_rows, scores, visible
from rlalign_kernels.triton_math import LOG2E, fold


@triton.jit(do_not_specialize=["num_rows"])
def attention_delta_kernel(
    out_ptr, grad_ptr, delta_ptr, num_rows, stride_ot, stride_oh, stride_gt, stride_gh,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """delta [T, Hq] float32 of out and its gradient [T, Hq, Dv]; a row is a (token, head) pair."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_dv = tl.arange(0, BLOCK_DV)
    mask = (rows < num_rows)[:, None] & (offs_dv < VALUE_DIM)[None, :]
    token = rows // HEADS
    head = rows % HEADS
    out = tl.load(out_ptr + (token * stride_ot + head * stride_oh)[:, None] + offs_dv[None, :], mask=mask, other=0.0)
    grad = tl.load(grad_ptr + (token * stride_gt + head * stride_gh)[:, None] + offs_dv[None, :], mask=mask, other=0.0)
    delta = fold(out.to(tl.float32) * grad.to(tl.float32), BLOCK_M, BLOCK_DV, 1)
    tl.store(delta_ptr + rows, tl.reshape(delta, [BLOCK_M]), mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_tokens"])
def attention_sink_kernel(
    sink_ptr, lse_ptr, delta_ptr, grad_ptr, num_tokens, HEADS: tl.constexpr, BLOCK_T: tl.constexpr
):
    """Gradient [Hq] float32 of the sinks: -sum over tokens of exp(sink - lse) * delta, tokens ascending."""
    head = tl.program_id(0)
    sink = tl.load(sink_ptr + head).to(tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    for start in tl.range(0, num_tokens, BLOCK_T):
        token = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        mask = token < num_tokens
        lse = tl.load(lse_ptr + token * HEADS + head, mask=mask, other=float("inf"))
        delta = tl.load(delta_ptr + token * HEADS + head, mask=mask, other=0.0)
        lse = tl.where(lse == float("-inf"), float("inf"), lse)  # of a sink at -inf and no key
        total += tl.math.exp2((sink - lse) * LOG2E) * delta
    tl.store(grad_ptr + head, -tl.sum(total, 0))


@triton.jit
def _weights(s, lse, dp, delta, c, seen, HAS_CAP: tl.constexpr, MASKED: tl.constexpr):
    """p and dS (before scale) from scores and dO v^T, all [M, N]; lse and delta broadcast to that."""
    p = tl.math.exp2(tl.fma(s, c, -lse * LOG2E))
    if MASKED:
        p = tl.where(seen, p, 0.0)
    ds = p * (dp - delta)
    if HAS_CAP:
        ds = ds * (1.0 - s * s)
    return p, ds


@triton.jit
def _dq_tiles(
    low, high, dq, q, do, lse, delta, k_ptr, v_ptr, position, num_keys, offs_d, offs_dv, c, cap_scale, left, right,
    stride_kn, stride_vn,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_CAP: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    for start in tl.range(low, high, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, k_ptr, n, num_keys, offs_d, 0, stride_kn, 0, MASKED, HEAD_DIM, BLOCK_D, False)
        v = load_rows(v_ptr, v_ptr, n, num_keys, offs_dv, 0, stride_vn, 0, MASKED, VALUE_DIM, BLOCK_DV, False)
        s = scores(q, k, cap_scale, HAS_CAP, PRECISION)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        seen = visible(position, n, num_keys, left, right, HAS_LEFT, HAS_RIGHT)
        _, ds = _weights(s, lse[:, None], dp, delta[:, None], c, seen, HAS_CAP, MASKED)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["num_sequences"])
def attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, cu_q_ptr, cu_k_ptr,
    scale, c, cap_scale, left, right, num_sequences,
    stride_qt, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_gt, stride_gh, stride_dt, stride_dh,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: row tiles x key heads, as in the forward."""
    pid = tl.program_id(0)
    kv_head = pid % KV_HEADS
    tile = tl.num_programs(0) // KV_HEADS - 1 - pid // KV_HEADS
    b, first_tile = find_sequence(tile, cu_q_ptr, num_sequences, GROUP, BLOCK_M)
    row0 = (tile - first_tile) * BLOCK_M
    q_begin = tl.load(cu_q_ptr + b).to(tl.int32)
    num_queries = tl.load(cu_q_ptr + b + 1).to(tl.int32) - q_begin
    if row0 >= num_queries * GROUP:
        return
    k_begin = tl.load(cu_k_ptr + b).to(tl.int32)
    num_keys = tl.load(cu_k_ptr + b + 1).to(tl.int32) - k_begin
    k_ptr += k_begin.to(tl.int64) * stride_kn + kv_head.to(tl.int64) * stride_kh
    v_ptr += k_begin.to(tl.int64) * stride_vn + kv_head.to(tl.int64) * stride_vh

    rows = row0 + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    mine = rows < num_queries * GROUP
    head = (kv_head * GROUP + rows % GROUP).to(tl.int64)
    token = (q_begin + rows // GROUP).to(tl.int64)
    position = num_keys - num_queries + rows // GROUP
    d_mask = mine[:, None] & (offs_d < HEAD_DIM)[None, :]
    dv_mask = mine[:, None] & (offs_dv < VALUE_DIM)[None, :]
    q = tl.load(q_ptr + (token * stride_qt + head * stride_qh)[:, None] + offs_d[None, :], mask=d_mask, other=0.0)
    do = tl.load(do_ptr + (token * stride_gt + head * stride_gh)[:, None] + offs_dv[None, :], mask=dv_mask, other=0.0)
    lse = tl.load(lse_ptr + token * (KV_HEADS * GROUP) + head, mask=mine, other=float("inf"))
    delta = tl.load(delta_ptr + token * (KV_HEADS * GROUP) + head, mask=mine, other=0.0)
    # a row that saw no key: its weights exp(S - lse) must be 0, not infinite
    lse = tl.where(lse == float("-inf"), float("inf"), lse)

    begin, whole, part, end = key_range(
        row0, num_queries, num_keys, left, right, GROUP, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if HAS_LEFT:
        dq = _dq_tiles(
            begin, whole, dq, q, do, lse, delta, k_ptr, v_ptr, position, num_keys, offs_d, offs_dv, c, cap_scale,
            left, right, stride_kn, stride_vn, HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_DV,
            HAS_LEFT, HAS_RIGHT, HAS_CAP, True, PRECISION, 1,
        )  # fmt: skip
    dq = _dq_tiles(
        whole, part, dq, q, do, lse, delta, k_ptr, v_ptr, position, num_keys, offs_d, offs_dv, c, cap_scale,
        left, right, stride_kn, stride_vn, HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_DV,
        HAS_LEFT, HAS_RIGHT, HAS_CAP, False, PRECISION, STAGES,
    )  # fmt: skip
    dq = _dq_tiles(
        part, end, dq, q, do, lse, delta, k_ptr, v_ptr, position, num_keys, offs_d, offs_dv, c, cap_scale,
        left, right, stride_kn, stride_vn, HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_DV,
        HAS_LEFT, HAS_RIGHT, HAS_CAP, True, PRECISION, 1,
    )  # fmt: skip
    dq_ptrs = dq_ptr + (token * stride_dt + head * stride_dh)[:, None] + offs_d[None, :]
    tl.store(dq_ptrs, (dq * scale).to(dq_ptr.dtype.element_ty), mask=d_mask)


@triton.jit
def query_range(
    n0, num_queries, num_keys, left, right,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """Of the keys from ``n0``: query tiles [begin, end) that see any of them, and [whole, part) that see all."""
    shift = num_keys - num_queries
    last = n0 + BLOCK_N - 1
    begin = 0
    whole = 0
    end = num_queries
    part = num_queries
    if HAS_RIGHT:
        begin = tl.maximum(n0 - right - shift, 0) // BLOCK_M * BLOCK_M
        whole = tl.cdiv(tl.maximum(last - right - shift, 0), BLOCK_M) * BLOCK_M
    if HAS_LEFT:
        end = tl.minimum(num_queries, last + left - shift + 1)
        part = tl.minimum(num_queries, n0 + left - shift + 1)
    part = tl.maximum(part, 0) // BLOCK_M * BLOCK_M
    none = (whole >= part) | (last >= num_keys)
    whole = tl.where(none, begin, whole)
    part = tl.where(none, begin, part)
    return begin, whole, part, end


@triton.jit
def _dkv_tiles(
    low, high, dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, n, num_queries, num_keys, offs_d, offs_dv,
    c, cap_scale, left, right, stride_qt, stride_gt, stride_lt,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_CAP: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One head's queries [low, high). Scores are transposed, [N, M], so that p and dS need no transposition."""
    for start in tl.range(low, high, BLOCK_M, num_stages=STAGES):
        i = start + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, q_ptr, i, num_queries, offs_d, 0, stride_qt, 0, MASKED, HEAD_DIM, BLOCK_D, False)
        do = load_rows(do_ptr, do_ptr, i, num_queries, offs_dv, 0, stride_gt, 0, MASKED, VALUE_DIM, BLOCK_DV, False)
        if MASKED:
            lse = tl.load(lse_ptr + i.to(tl.int64) * stride_lt, mask=i < num_queries, other=float("inf"))
            delta = tl.load(delta_ptr + i.to(tl.int64) * stride_lt, mask=i < num_queries, other=0.0)
        else:
            lse = tl.load(lse_ptr + i.to(tl.int64) * stride_lt)
            delta = tl.load(delta_ptr + i.to(tl.int64) * stride_lt)
        s = scores(k, q, cap_scale, HAS_CAP, PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        position = num_keys - num_queries + i
        seen = tl.trans(visible(position, n, num_keys, left, right, HAS_LEFT, HAS_RIGHT))
        seen = seen & (i < num_queries)[None, :] & (lse > float("-inf"))[None, :]
        p, ds = _weights(s, lse[None, :], dp, delta[None, :], c, seen, HAS_CAP, MASKED)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["num_sequences"])
def attention_dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_q_ptr, cu_k_ptr,
    scale, c, cap_scale, left, right, num_sequences,
    stride_qt, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_gt, stride_gh,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: key tiles x key heads. dk [S, Hkv, D] and dv [S, Hkv, Dv] are contiguous."""
    HEADS: tl.constexpr = KV_HEADS * GROUP
    pid = tl.program_id(0)
    kv_head = pid % KV_HEADS
    # the first keys of a causal sequence are seen by the most queries: they go first
    tile = pid // KV_HEADS
    b, first_tile = find_sequence(tile, cu_k_ptr, num_sequences, 1, BLOCK_N)
    n0 = (tile - first_tile) * BLOCK_N
    k_begin = tl.load(cu_k_ptr + b).to(tl.int32)
    num_keys = tl.load(cu_k_ptr + b + 1).to(tl.int32) - k_begin
    if n0 >= num_keys:
        return
    q_begin = tl.load(cu_q_ptr + b).to(tl.int32)
    num_queries = tl.load(cu_q_ptr + b + 1).to(tl.int32) - q_begin
    n = n0 + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    token = k_begin.to(tl.int64)
    k_ptr += token * stride_kn + kv_head.to(tl.int64) * stride_kh
    v_ptr += token * stride_vn + kv_head.to(tl.int64) * stride_vh
    k = load_rows(k_ptr, k_ptr, n, num_keys, offs_d, 0, stride_kn, 0, True, HEAD_DIM, BLOCK_D, False)
    v = load_rows(v_ptr, v_ptr, n, num_keys, offs_dv, 0, stride_vn, 0, True, VALUE_DIM, BLOCK_DV, False)
    begin, whole, part, end = query_range(n0, num_queries, num_keys, left, right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for g in range(GROUP):
        head = kv_head * GROUP + g
        row = q_begin.to(tl.int64)
        q_head = q_ptr + row * stride_qt + head.to(tl.int64) * stride_qh
        do_head = do_ptr + row * stride_gt + head.to(tl.int64) * stride_gh
        lse_head = lse_ptr + row * HEADS + head
        delta_head = delta_ptr + row * HEADS + head
        dk, dv = _dkv_tiles(
            begin, whole, dk, dv, k, v, q_head, do_head, lse_head, delta_head, n, num_queries, num_keys, offs_d,
            offs_dv, c, cap_scale, left, right, stride_qt, stride_gt, HEADS, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_D,
            BLOCK_DV, HAS_LEFT, HAS_RIGHT, HAS_CAP, True, PRECISION, 1,
        )  # fmt: skip
        dk, dv = _dkv_tiles(
            whole, part, dk, dv, k, v, q_head, do_head, lse_head, delta_head, n, num_queries, num_keys, offs_d,
            offs_dv, c, cap_scale, left, right, stride_qt, stride_gt, HEADS, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_D,
            BLOCK_DV, HAS_LEFT, HAS_RIGHT, HAS_CAP, False, PRECISION, STAGES,
        )  # fmt: skip
        dk, dv = _dkv_tiles(
            part, end, dk, dv, k, v, q_head, do_head, lse_head, delta_head, n, num_queries, num_keys, offs_d,
            offs_dv, c, cap_scale, left, right, stride_qt, stride_gt, HEADS, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_D,
            BLOCK_DV, HAS_LEFT, HAS_RIGHT, HAS_CAP, True, PRECISION, 1,
        )  # fmt: skip
    rows = (token + n) * KV_HEADS + kv_head
    k_mask = (n < num_keys)[:, None] & (offs_d < HEAD_DIM)[None, :]
    v_mask = (n < num_keys)[:, None] & (offs_dv < VALUE_DIM)[None, :]
    tl.store(dk_ptr + rows[:, None] * HEAD_DIM + offs_d[None, :], (dk * scale).to(dk_ptr.dtype.element_ty), mask=k_mask)
    tl.store(dv_ptr + rows[:, None] * VALUE_DIM + offs_dv[None, :], dv.to(dv_ptr.dtype.element_ty), mask=v_mask)
