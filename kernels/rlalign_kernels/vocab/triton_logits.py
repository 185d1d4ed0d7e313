"""Kernels that write one number per row and id, for a bounded part of either: logits, or the loss's gradient at them.

With upstream gradients g of log-prob, entropy and log-sum-exp, and d, m and s as in the scan: the gradient at an id is
exp2(d) / s (g_lse - g_lp - g_ent (d log 2 - log s + entropy)), plus g_lp at the target, over temperature, times the
soft cap's slope 1 - (x / cap)^2; 0 outside the support.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlalign_kernels.vocab.triton_tiles import (
    LN2,
    ZERO_EXP,
    blocks,
    cut_off,
    exponents,
    log,
    restrict,
    row_scale,
    rows_and_logits,
    spread,
)


@triton.jit(do_not_specialize=["num_rows", "num_programs"])
def logits_kernel(
    hidden_box, weight_box, hidden_ptr, weight_ptr, bias_ptr, out_ptr, num_rows, num_ids, depth, stride_hidden,
    stride_weight, stride_out, cap, num_programs, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SWAP: tl.constexpr, TMA: tl.constexpr, FLATTEN: tl.constexpr, ROW_TILES: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """out float32 [rows, ids]: the logits whose statistics the scan takes, bit for bit."""
    num_tiles = tl.cdiv(num_rows, BLOCK_M) * tl.cdiv(num_ids, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_tiles, num_programs, flatten=FLATTEN):
        offs_m, id_tile, x = rows_and_logits(
            tile, hidden_box, weight_box, hidden_ptr, weight_ptr, bias_ptr, num_rows, num_ids, depth, stride_hidden,
            stride_weight, cap, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, TMA, ROW_TILES, HAS_BIAS, HAS_CAP,
        )  # fmt: skip
        ids = id_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * stride_out + ids[None, :]
        tl.store(ptrs, x, mask=(offs_m < num_rows)[:, None] & (ids < num_ids)[None, :])


@triton.jit
def _gradient_block(
    x, first, offs_m, c, kept, hit, m, a, b, g_hit, mask_ptr, limit_ptr, last_ptr, out_ptr, num_rows, num_ids,
    stride_mask, stride_out, cap, first_id, M: tl.constexpr, N: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_CUT: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """Logits x [M, N] of ids first ...; hit [M]: the target's number among this call's ids."""
    ids = first + tl.arange(0, N)
    z = restrict(x, offs_m, ids, mask_ptr, num_rows, num_ids, stride_mask, HAS_MASK, False)
    if HAS_CUT:
        z = cut_off(z, offs_m, ids, limit_ptr, last_ptr, num_rows, first_id)
    d = exponents(tl.where(kept[:, None], z, 0.0), c, m, M, N)
    p = tl.math.exp2(d)
    if CLAMP:
        d = tl.maximum(d, ZERO_EXP)
    gradient = p * tl.fma(d, spread(b, M, N), spread(a, M, N))
    gradient = tl.where(ids[None, :] == hit[:, None], gradient + g_hit[:, None], gradient)
    if HAS_CAP:
        part = x * (1.0 / cap)
        gradient = gradient * (1.0 - part * part)
    if HAS_MASK or HAS_CUT:
        gradient = tl.where(z > float("-inf"), gradient, 0.0)
    ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * stride_out + ids[None, :]
    inside = (offs_m < num_rows)[:, None] & (ids < num_ids)[None, :]
    tl.store(ptrs, gradient.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_programs", "first_id"])
def gradient_kernel(
    hidden_box, weight_box, hidden_ptr, weight_ptr, bias_ptr, temperature_ptr, mask_ptr, limit_ptr, last_ptr,
    targets_ptr, kept_ptr, stats_ptr, upstream_ptr, out_ptr, num_rows, num_ids, depth, stride_hidden, stride_weight,
    stride_mask, stride_stats, stride_upstream, stride_out, cap, first_id, num_programs, BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr, TMA: tl.constexpr,
    FLATTEN: tl.constexpr, ROW_TILES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr, HAS_MASK: tl.constexpr, HAS_CUT: tl.constexpr, HAS_ENTROPY: tl.constexpr,
):  # fmt: skip
    """out [rows, ids] in the weights' dtype, of ids first_id ...; upstream float32 [3, rows], stats as scored."""
    num_tiles = tl.cdiv(num_rows, BLOCK_M) * tl.cdiv(num_ids, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_tiles, num_programs, flatten=FLATTEN):
        offs_m, id_tile, x = rows_and_logits(
            tile, hidden_box, weight_box, hidden_ptr, weight_ptr, bias_ptr, num_rows, num_ids, depth, stride_hidden,
            stride_weight, cap, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, TMA, ROW_TILES, HAS_BIAS, HAS_CAP,
        )  # fmt: skip
        inside = offs_m < num_rows
        c, _ = row_scale(temperature_ptr, offs_m, num_rows, HAS_TEMPERATURE)
        kept = tl.load(kept_ptr + offs_m, mask=inside, other=0) != 0
        hit = tl.load(targets_ptr + offs_m, mask=inside, other=0) - first_id
        entropy = tl.load(stats_ptr + stride_stats + offs_m, mask=inside, other=0.0)
        # rows that do not count have probability 0 everywhere
        m = tl.where(kept, tl.load(stats_ptr + 3 * stride_stats + offs_m, mask=inside, other=0.0), 1.0e30)
        s = tl.load(stats_ptr + 4 * stride_stats + offs_m, mask=inside, other=1.0)
        share = tl.div_rn(tl.full([BLOCK_M], 1.0, tl.float32), s)
        scale = c * LN2 if HAS_TEMPERATURE else tl.full([BLOCK_M], 1.0, tl.float32)
        scale = tl.where(kept, scale, 0.0)
        g_hit = tl.load(upstream_ptr + offs_m, mask=inside, other=0.0)
        g_lse = tl.load(upstream_ptr + 2 * stride_upstream + offs_m, mask=inside, other=0.0)
        a = g_lse - g_hit
        b = tl.zeros([BLOCK_M], tl.float32)
        if HAS_ENTROPY:
            g_entropy = tl.load(upstream_ptr + stride_upstream + offs_m, mask=inside, other=0.0)
            a = a - g_entropy * (entropy - log(s))
            b = tl.where(kept, g_entropy * scale * share * (-LN2), 0.0)
        a = tl.where(kept, a * scale * share, 0.0)
        g_hit = tl.where(kept, g_hit * scale, 0.0)
        CLAMP: tl.constexpr = HAS_BIAS or HAS_MASK or HAS_CUT
        parts = blocks(x, BLOCK_M, BLOCK_N, BLOCK)
        for i in tl.static_range(BLOCK_N // BLOCK):
            _gradient_block(
                parts[i], id_tile * BLOCK_N + i * BLOCK, offs_m, c, kept, hit, m, a, b, g_hit, mask_ptr, limit_ptr,
                last_ptr, out_ptr, num_rows, num_ids, stride_mask, stride_out, cap, first_id, BLOCK_M, BLOCK, HAS_CAP,
                HAS_MASK, HAS_CUT, CLAMP,
            )  # fmt: skip
