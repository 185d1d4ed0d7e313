"""RMSNorm and LayerNorm forward: ``y = (h - mean) / sqrt(mean((h - mean)^2) + eps) * weight + bias``, h = x + residual.

RMSNorm has no mean and no bias. Rows [T, H] of any strides, float32, bfloat16 or float16. The row is read once and held
in registers; its sums are float32, in the order of row_plan (backward's in the compiler's). ``1 / sqrt`` is a correctly
rounded root and quotient.
Promised: forward, a row's bits depend on that row, weight and bias only; backward, the same bits in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from rlalign_kernels.elementwise.triton_rows import (
    fold,
    fold_rows,
    load_columns,
    load_vector,
    row_starts,
    store_columns,
)


@triton.jit(do_not_specialize=["num_rows"])
def norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, out_ptr, sum_ptr, mean_ptr, inverse_ptr,
    num_rows, inner, stride_xo, stride_xi, stride_xc, stride_ro, stride_ri, stride_rc, stride_w, stride_b, eps, offset,
    H: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, CENTERED: tl.constexpr, CAST: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_OFFSET: tl.constexpr,
    SAVE: tl.constexpr,
):  # fmt: skip
    """CAST: the normalised row is rounded to x's dtype before the weight. SAVE: mean and 1 / sqrt go to memory."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < num_rows
    written = rows.to(tl.int64) * H
    h = load_columns(x_ptr, row_starts(rows, inner, stride_xo, stride_xi), live, stride_xc, H, LANES)
    if HAS_RESIDUAL:
        starts = row_starts(rows, inner, stride_ro, stride_ri)
        residual = load_columns(residual_ptr, starts, live, stride_rc, H, LANES)
        total = ()
        for i in tl.static_range(len(h)):
            both = (h[i].to(tl.float32) + residual[i].to(tl.float32)).to(h[i].dtype)
            store_columns(sum_ptr, written, live, i, both, H, LANES)
            total += (both,)
        h = total
    mean = tl.zeros([ROWS], tl.float32)
    if CENTERED:
        lanes = tl.zeros([ROWS, LANES], tl.float32)
        for i in tl.static_range(len(h)):
            lanes = lanes + h[i].to(tl.float32)
        mean = tl.div_rn(fold(lanes, ROWS, LANES), 1.0 * H)
    squares = tl.zeros([ROWS, LANES], tl.float32)
    for i in tl.static_range(len(h)):
        value = _deviation(h[i], mean, i, H, LANES, CENTERED)
        squares = tl.fma(value, value, squares)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(fold(squares, ROWS, LANES), 1.0 * H) + eps))
    if SAVE:
        tl.store(inverse_ptr + rows, inverse, mask=live)
        if CENTERED:
            tl.store(mean_ptr + rows, mean, mask=live)
    for i in tl.static_range(len(h)):
        y = _deviation(h[i], mean, i, H, LANES, CENTERED) * inverse[:, None]
        if CAST:
            y = y.to(h[i].dtype).to(tl.float32)
        if HAS_WEIGHT:
            weight = load_vector(weight_ptr, stride_w, i, H, LANES)
            scale = weight.to(tl.float32)
            if HAS_OFFSET:
                scale = scale + offset
                if CAST:
                    scale = scale.to(weight.dtype).to(tl.float32)
            if HAS_BIAS:
                bias = load_vector(bias_ptr, stride_b, i, H, LANES).to(tl.float32)
                y = tl.fma(y, tl.broadcast_to(scale, y.shape), tl.broadcast_to(bias, y.shape))
            else:
                y = y * scale
        store_columns(out_ptr, written, live, i, y.to(h[i].dtype), H, LANES)


@triton.jit
def _deviation(tile, mean, i: tl.constexpr, H: tl.constexpr, LANES: tl.constexpr, CENTERED: tl.constexpr):
    """float32 [R, LANES] less the row's mean; zeros beyond H."""
    value = tile.to(tl.float32)
    if CENTERED:
        value = value - mean[:, None]
        if (i + 1) * LANES > H:
            value = tl.where((i * LANES + tl.arange(0, LANES) < H)[None, :], value, 0.0)
    return value


@triton.jit(do_not_specialize=["num_rows", "step"])
def norm_backward_kernel(
    grad_ptr, grad_sum_ptr, h_ptr, weight_ptr, mean_ptr, inverse_ptr, dh_ptr, dweight_ptr, dbias_ptr,
    num_rows, inner, stride_go, stride_gi, stride_gc, stride_so, stride_si, stride_sc, stride_ho, stride_hi, stride_hc,
    stride_w, offset, step,
    H: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, CENTERED: tl.constexpr, HAS_SUM: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, NEED_H: tl.constexpr, NEED_WEIGHT: tl.constexpr, NEED_BIAS: tl.constexpr,
    STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program takes a tile of every ``step`` rows, so that all programs together read memory in its order.
    ``dweight``, ``dbias``: float32 [programs, H] of a program's rows.

    STAGES > 1: rows are read that far ahead, and the weight stays in registers. OVERLAP: what adds up the programs'
    sums may be launched before this kernel ends.
    dh = inverse * (s - mean(s) - n * mean(s * n)) + grad_sum with n the normalised row and s = grad * weight.
    HAS_SUM: h = x + residual was handed out, and its gradient comes back in grad_sum.
    """
    part = tl.program_id(0)
    if OVERLAP:
        gdc_launch_dependents()
    # a load within the loop would be made ahead too, row after row
    KEEP: tl.constexpr = HAS_WEIGHT and STAGES > 1
    zeros = ()
    kept = ()
    for i in tl.static_range((H + WIDTH - 1) // WIDTH):
        zeros += (tl.zeros([ROWS, WIDTH], tl.float32),)
        if KEEP:
            kept += (load_vector(weight_ptr, stride_w, i, H, WIDTH),)
    dweight = zeros
    dbias = zeros
    for start in tl.range(part * ROWS, num_rows, step, num_stages=STAGES):
        rows = start + tl.arange(0, ROWS)
        live = rows < num_rows
        h = load_columns(h_ptr, row_starts(rows, inner, stride_ho, stride_hi), live, stride_hc, H, WIDTH)
        grad = load_columns(grad_ptr, row_starts(rows, inner, stride_go, stride_gi), live, stride_gc, H, WIDTH)
        inverse = tl.load(inverse_ptr + rows, mask=live, other=0.0)
        mean = inverse
        if CENTERED:
            mean = tl.load(mean_ptr + rows, mask=live, other=0.0)
        if NEED_H:
            along = tl.zeros([ROWS, WIDTH], tl.float32)
            plain = tl.zeros([ROWS, WIDTH], tl.float32)
            for i in tl.static_range(len(h)):
                s = grad[i].to(tl.float32)
                if KEEP:
                    s = s * (kept[i].to(tl.float32) + offset)
                elif HAS_WEIGHT:
                    s = s * (load_vector(weight_ptr, stride_w, i, H, WIDTH).to(tl.float32) + offset)
                n = _deviation(h[i], mean, i, H, WIDTH, CENTERED) * inverse[:, None]
                along = tl.fma(s, n, along)
                plain = plain + s
            if CENTERED:  # both sums at once: a reduction waits for other warps
                along_sum, plain_sum = tl.split(tl.sum(tl.join(along, plain), 1))
            else:
                along_sum = tl.sum(along, 1)
                plain_sum = tl.zeros([ROWS], tl.float32)
            along_mean = tl.div_rn(along_sum, 1.0 * H)[:, None]
            plain_mean = tl.div_rn(plain_sum, 1.0 * H)[:, None]
            starts = row_starts(rows, inner, stride_so, stride_si)
            for i in tl.static_range(len(h)):
                s = grad[i].to(tl.float32)
                if KEEP:
                    s = s * (kept[i].to(tl.float32) + offset)
                elif HAS_WEIGHT:
                    s = s * (load_vector(weight_ptr, stride_w, i, H, WIDTH).to(tl.float32) + offset)
                n = _deviation(h[i], mean, i, H, WIDTH, CENTERED) * inverse[:, None]
                dh = tl.fma(n, tl.broadcast_to(-along_mean, n.shape), s - plain_mean) * inverse[:, None]
                if HAS_SUM:
                    dh = dh + _load_tile(grad_sum_ptr, starts, live, stride_sc, i, H, WIDTH).to(tl.float32)
                store_columns(dh_ptr, rows.to(tl.int64) * H, live, i, dh.to(h[i].dtype), H, WIDTH)
        if NEED_WEIGHT:
            more = ()
            for i in tl.static_range(len(h)):
                n = _deviation(h[i], mean, i, H, WIDTH, CENTERED) * inverse[:, None]
                more += (tl.fma(grad[i].to(tl.float32), n, dweight[i]),)
            dweight = more
        if NEED_BIAS:
            more = ()
            for i in tl.static_range(len(h)):
                more += (dbias[i] + grad[i].to(tl.float32),)
            dbias = more
    one = tl.full([1], 0, tl.int32)
    for i in tl.static_range((H + WIDTH - 1) // WIDTH):
        if NEED_WEIGHT:
            tile = fold_rows(dweight[i], ROWS, WIDTH)[None, :]
            store_columns(dweight_ptr, (one + part).to(tl.int64) * H, one == 0, i, tile, H, WIDTH)
        if NEED_BIAS:
            tile = fold_rows(dbias[i], ROWS, WIDTH)[None, :]
            store_columns(dbias_ptr, (one + part).to(tl.int64) * H, one == 0, i, tile, H, WIDTH)


@triton.jit
def _load_tile(ptr, starts, live, stride, i: tl.constexpr, H: tl.constexpr, LANES: tl.constexpr):
    c = i * LANES + tl.arange(0, LANES)
    ptrs = ptr + starts[:, None] + (c.to(tl.int64) * stride)[None, :]
    return tl.load(ptrs, mask=live[:, None] & (c < H)[None, :], other=0.0)


@triton.jit(do_not_specialize=["num_parts"])
def norm_parts_kernel(
    parts_ptr, out_ptr, num_parts, H,
    PARTS: tl.constexpr, TURNS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """out [N, H] of float32 parts [N, num_parts, H], at most PARTS * TURNS: part p belongs to lane p mod PARTS, which
    adds in ascending order; then lanes by halves. A part that is not there adds 0. OVERLAP: as in norm_backward_kernel.
    """
    which = tl.program_id(1).to(tl.int64)
    parts_ptr += which * num_parts * H
    out_ptr += which * H
    if OVERLAP:
        gdc_wait()
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    parts = ()  # all on their way before the first is needed
    for turn in tl.static_range(TURNS):
        p = turn * PARTS + tl.arange(0, PARTS)
        mask = (p < num_parts)[:, None] & (c < H)[None, :]
        parts += (tl.load(parts_ptr + p[:, None].to(tl.int64) * H + c[None, :], mask=mask, other=0.0),)
    total = tl.zeros([PARTS, BLOCK], tl.float32)
    for turn in tl.static_range(TURNS):
        total += parts[turn]
    tl.store(out_ptr + c, fold_rows(total, PARTS, BLOCK).to(out_ptr.dtype.element_ty), mask=c < H)
