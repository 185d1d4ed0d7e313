"""From the blocks' numbers to a row's: groups of blocks fold in halves and are merged ascending.

Per group, with m' = max(m, max of its blocks' m) and a = exp2(blocks' m - m'): s = fma(s, exp2(m - m'), tree(s a)), and
w likewise of w + (m - m') s. Then log-sum-exp = m log 2 + log s, log-prob = d log 2 - log s with the target's d,
entropy = log s - (w / s) log 2. A row whose target or settings can't be, or whose sums overflow, gives NaN: the host
reads nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlalign_kernels.rows import LEAST_TEMPERATURE as _LEAST
from rlalign_kernels.vocab.triton_tiles import (
    FLOOR,
    LN2,
    LOG2E,
    add_product,
    behind,
    chain_end,
    load_box,
    log,
    row_scale,
    soft_cap,
    spread,
    tree_dot,
)

LEAST_TEMPERATURE = tl.constexpr(_LEAST)


@triton.jit
def _merge(
    m_ptr, s_ptr, w_ptr, offs_m, num_rows, num_blocks, M: tl.constexpr, GROUP: tl.constexpr, WEIGHTED: tl.constexpr
):  # fmt: skip
    """(m, s, w) [M] over all blocks; the pointers lead to [blocks, rows]."""
    m = tl.full([M], FLOOR, tl.float32)
    s = tl.zeros([M], tl.float32)
    w = tl.zeros([M], tl.float32)
    for first in range(0, num_blocks, GROUP):
        block = first + tl.arange(0, GROUP)
        offsets = block.to(tl.int64)[None, :] * num_rows + offs_m[:, None]
        inside = (offs_m < num_rows)[:, None] & (block < num_blocks)[None, :]
        m_part = tl.load(m_ptr + offsets, mask=inside, other=FLOOR)
        s_part = tl.load(s_ptr + offsets, mask=inside, other=0.0)
        m_new = tl.maximum(m, tl.max(m_part, 1))
        step = m_part - spread(m_new, M, GROUP)
        a = tl.math.exp2(step)
        alpha = tl.math.exp2(m - m_new)
        if WEIGHTED:
            w_part = tl.load(w_ptr + offsets, mask=inside, other=0.0)
            w = tl.fma(tl.fma(m - m_new, s, w), alpha, tree_dot(tl.fma(step, s_part, w_part), a, M, GROUP))
        s = tl.fma(s, alpha, tree_dot(s_part, a, M, GROUP))
        m = m_new
    return m, s, w


@triton.jit
def _settings_hold(
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, offs_m, num_rows, HAS_ROWS: tl.constexpr,
    UNTRUNCATED: tl.constexpr,
):  # fmt: skip
    """bool [M]: settings within their bounds and, with UNTRUNCATED, no filter that could leave an id out."""
    if HAS_ROWS:
        inside = offs_m < num_rows
        temperature = tl.load(temperature_ptr + offs_m, mask=inside, other=1.0)
        top_k = tl.load(top_k_ptr + offs_m, mask=inside, other=0)
        top_p = tl.load(top_p_ptr + offs_m, mask=inside, other=1.0)
        min_p = tl.load(min_p_ptr + offs_m, mask=inside, other=0.0)
        hold = (temperature == 0.0) | (temperature >= LEAST_TEMPERATURE) & (temperature < float("inf"))
        hold = hold & (top_k >= 0) & (top_p > 0.0) & (top_p <= 1.0) & (min_p >= 0.0) & (min_p < 1.0)
        if UNTRUNCATED:
            hold = hold & ((temperature == 0.0) | ((top_k == 0) & (top_p == 1.0) & (min_p == 0.0)))
        return hold
    else:
        return offs_m >= 0


@triton.jit
def _sums_hold(m, s):
    """bool [M]: not of logits so large, over their temperature, that rounding m leaves exp2 nothing, or infinity."""
    return (s < float("inf")) & ((s > 0.0) | (m <= FLOOR))


@triton.jit
def _target_logits(
    hidden_ptr, weight_ptr, bias_ptr, mask_ptr, limit_ptr, last_ptr, offs_m, target, num_rows, num_ids, depth,
    stride_hidden, stride_weight, stride_mask, cap, M: tl.constexpr, BLOCK_K: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_MASK: tl.constexpr, HAS_CUT: tl.constexpr,
):  # fmt: skip
    """float32 [M] logits at ``target``: the diagonal of a product of M rows with M targets' weights."""
    known = (target >= 0) & (target < num_ids)
    target = tl.where(known, target, 0)
    weights = weight_ptr + target.to(tl.int64)[:, None] * stride_weight
    acc = tl.zeros([M, M], tl.float32)
    lost = acc
    for k in range(0, depth, BLOCK_K):
        h = load_box(None, hidden_ptr, tl.program_id(0) * M, k, num_rows, depth, stride_hidden, M, BLOCK_K, False)
        offs_k = k + tl.arange(0, BLOCK_K)
        w = tl.load(weights + offs_k[None, :], mask=(offs_k < depth)[None, :], other=0.0)
        acc, lost = add_product(h, w, acc, lost)
    acc = chain_end(acc, lost, hidden_ptr.dtype.element_ty == tl.float32)
    diagonal = tl.arange(0, M)[:, None] == tl.arange(0, M)[None, :]
    x = tl.max(tl.where(diagonal, acc, float("-inf")), 1)
    if HAS_BIAS:
        x = x + tl.load(bias_ptr + target).to(tl.float32)
    if HAS_CAP:
        x = soft_cap(x, cap)
    if HAS_MASK:
        kept = tl.load(mask_ptr + offs_m.to(tl.int64) * stride_mask + target, mask=offs_m < num_rows, other=0)
        x = tl.where(kept != 0, x, float("-inf"))
    if HAS_CUT:
        limit = tl.load(limit_ptr + offs_m, mask=offs_m < num_rows, other=0.0)
        last = tl.load(last_ptr + offs_m, mask=offs_m < num_rows, other=0)
        x = tl.where(behind(x, target, limit, last), float("-inf"), x)
    return x, known


@triton.jit
def _logprob(x, c, m, log_sum):
    """Natural log-prob of logits x [M]; the largest one's may round to no more than 0."""
    logprob = tl.fma(tl.fma(x, c, -m), LN2, -log_sum)
    return tl.where(logprob > 0.0, 0.0, logprob)


@triton.jit(do_not_specialize=["num_rows"])
def score_kernel(
    hidden_ptr, weight_ptr, bias_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, mask_ptr, limit_ptr,
    last_ptr, targets_ptr, kept_ptr, parts_ptr, out_ptr, num_rows, num_ids, depth, stride_hidden, stride_weight,
    stride_mask, stride_out, cap, BLOCK: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_CUT: tl.constexpr, UNTRUNCATED: tl.constexpr,
):  # fmt: skip
    """out float32 [5, rows]: log-prob, entropy, log-sum-exp; for the gradient m and s."""
    offs_m = tl.program_id(0) * M + tl.arange(0, M)
    inside = offs_m < num_rows
    target = tl.load(targets_ptr + offs_m, mask=inside, other=0)
    kept = tl.load(kept_ptr + offs_m, mask=inside, other=0) != 0
    x, known = _target_logits(
        hidden_ptr, weight_ptr, bias_ptr, mask_ptr, limit_ptr, last_ptr, offs_m, target, num_rows, num_ids, depth,
        stride_hidden, stride_weight, stride_mask, cap, M, BLOCK_K, HAS_BIAS, HAS_CAP, HAS_MASK, HAS_CUT,
    )  # fmt: skip
    num_blocks = tl.cdiv(num_ids, BLOCK)
    field = num_blocks.to(tl.int64) * num_rows
    m, s, w = _merge(
        parts_ptr, parts_ptr + field, parts_ptr + 2 * field, offs_m, num_rows, num_blocks, M, GROUP, True
    )  # fmt: skip
    c, _ = row_scale(temperature_ptr, offs_m, num_rows, HAS_ROWS)
    hold = _settings_hold(
        temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, offs_m, num_rows, HAS_ROWS, UNTRUNCATED
    )  # fmt: skip
    log_sum = log(s)
    entropy = tl.fma(tl.div_rn(w, s), -LN2, log_sum)
    entropy = tl.where(entropy < 0.0, 0.0, entropy)
    valid = known & hold & _sums_hold(m, s)
    nan = float("nan")
    ptrs = out_ptr + offs_m
    tl.store(ptrs, tl.where(kept, tl.where(valid, _logprob(x, c, m, log_sum), nan), 0.0), mask=inside)
    tl.store(ptrs + stride_out, tl.where(kept, tl.where(valid, entropy, nan), 0.0), mask=inside)
    tl.store(ptrs + 2 * stride_out, tl.where(kept, tl.where(valid, tl.fma(m, LN2, log_sum), nan), 0.0), mask=inside)
    tl.store(ptrs + 3 * stride_out, tl.where(valid, m, nan), mask=inside)
    tl.store(ptrs + 4 * stride_out, tl.where(valid, s, nan), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def draw_kernel(
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, parts_ptr, token_ptr, out_ptr, num_rows, num_ids, stride_out,
    BLOCK: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, UNTRUNCATED: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """token int64 [rows]; out float32 [2, rows]: its log-prob, and with RAW that at temperature 1."""
    offs_m = tl.program_id(0) * M + tl.arange(0, M)
    inside = offs_m < num_rows
    num_blocks = tl.cdiv(num_ids, BLOCK)
    field = num_blocks.to(tl.int64) * num_rows
    best = tl.full([M], float("-inf"), tl.float32)
    token = tl.full([M], 0x7FFFFFFF, tl.int32)
    logit = tl.full([M], float("-inf"), tl.float32)
    for first in range(0, num_blocks, GROUP):
        block = first + tl.arange(0, GROUP)
        ptrs = parts_ptr + 2 * field + block.to(tl.int64)[None, :] * num_rows + offs_m[:, None]
        read = inside[:, None] & (block < num_blocks)[None, :]
        noisy = tl.load(ptrs, mask=read, other=float("-inf"))
        ids = tl.load(ptrs + field, mask=read, other=0.0).to(tl.int32, bitcast=True)
        found = tl.load(ptrs + 2 * field, mask=read, other=float("-inf"))
        top = tl.max(noisy, 1)
        lowest = tl.min(tl.where((noisy == top[:, None]) & read, ids, 0x7FFFFFFF), 1)
        value = tl.max(tl.where(ids == lowest[:, None], found, float("-inf")), 1)
        better = (top > best) | ((first == 0) & (top == top))
        best = tl.where(better, top, best)
        token = tl.where(better, lowest, token)
        logit = tl.where(better, value, logit)
    m, s, _ = _merge(parts_ptr, parts_ptr + field, parts_ptr, offs_m, num_rows, num_blocks, M, GROUP, False)
    c, _ = row_scale(temperature_ptr, offs_m, num_rows, True)
    hold = _settings_hold(
        temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, offs_m, num_rows, True, UNTRUNCATED
    )  # fmt: skip
    # nothing was greater than -inf: every id is out, or the row is NaN
    hold = hold & (best > float("-inf")) & _sums_hold(m, s)
    nan = float("nan")
    tl.store(token_ptr + offs_m, tl.where(token < num_ids, token, 0).to(tl.int64), mask=inside)
    logprob = tl.where(hold, _logprob(logit, c, m, log(s)), nan)
    tl.store(out_ptr + offs_m, logprob, mask=inside)
    if RAW:
        m, s, _ = _merge(
            parts_ptr + 5 * field, parts_ptr + 6 * field, parts_ptr, offs_m, num_rows, num_blocks, M, GROUP, False
        )  # fmt: skip
        one = tl.full([M], LOG2E, tl.float32)
        raw = tl.where(hold & _sums_hold(m, s), _logprob(logit, one, m, log(s)), nan)
        tl.store(out_ptr + stride_out + offs_m, raw, mask=inside)
