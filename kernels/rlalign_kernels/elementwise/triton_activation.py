"""silu, gelu and their products with a second tensor, forward and backward, for tensors of any strides.

float32 throughout, in forms that stay accurate where a factor cancels or overflows:

    silu(x) = x / (1 + e^-x)      gelu(x) = x/2 (1 + erf(x / sqrt 2))      gelu_tanh(x) = x / (1 + e^-2u)

with u = sqrt(2/pi) (x + 0.044715 x^3), of which (1 + tanh u) / 2 is the logistic function of 2u. Rounded to the dtype
once, gated ones once after the activation and once after the product. Exponential and quotient are accurate to the last
places for float32 and cheaper for 16-bit dtypes, where that is far below what rounding the result costs; so is erf:
libdevice's for float32, else Abramowitz and Stegun's 7.1.26 in its complementary form, which keeps small tails.
Promised: forward, an element's bits depend on that element only. Backward: likewise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlalign_kernels.elementwise.triton_rows import LOG2E, divide, exp, row_starts

SILU, GELU, GELU_TANH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SQRT_HALF = tl.constexpr(0.7071067811865476)
# 1 / sqrt(2 pi)
DENSITY = tl.constexpr(0.3989422804014327)
# 2 sqrt(2/pi)
TWICE_SCALE = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def _exponent(x, KIND: tl.constexpr):
    """z of the logistic function 1 / (1 + e^-z) that is x's factor."""
    if KIND == SILU:
        return x
    else:
        return (x * TWICE_SCALE) * tl.fma(x * x, CUBIC, 1.0)


@triton.jit
def _below(x, PRECISE: tl.constexpr):
    """(normal distribution function, e^(-x^2 / 2)) at x."""
    if PRECISE:
        return tl.fma(tl.math.erf(x * SQRT_HALF), 0.5, 0.5), exp(-0.5 * x * x, PRECISE)
    else:
        bell = tl.math.exp2((x * x) * (-0.5 * LOG2E))
        # a root's reciprocal is one instruction, a quotient several
        t = tl.fma(tl.abs(x), 0.3275911 * SQRT_HALF, 1.0)
        t = tl.math.rsqrt(t * t)
        p = tl.fma(t, 0.5 * 1.061405429, -0.5 * 1.453152027)
        p = tl.fma(t, p, 0.5 * 1.421413741)
        p = tl.fma(t, p, -0.5 * 0.284496736)
        p = tl.fma(t, p, 0.5 * 0.254829592)
        tail = (p * t) * bell
        return tl.where(x < 0.0, tail, 1.0 - tail), bell


@triton.jit
def _activate(x, KIND: tl.constexpr, PRECISE: tl.constexpr):
    if KIND == GELU:
        below, _ = _below(x, PRECISE)
        return below * x
    else:
        return divide(x, 1.0 + exp(-_exponent(x, KIND), PRECISE), PRECISE)


@triton.jit
def _derivative(x, KIND: tl.constexpr, PRECISE: tl.constexpr):
    """(activation, derivative) at float32 x."""
    if KIND == GELU:
        below, bell = _below(x, PRECISE)
        return below * x, tl.fma(x * bell, DENSITY, below)
    else:
        z = _exponent(x, KIND)
        small = exp(-tl.abs(z), PRECISE)
        large = divide(1.0, 1.0 + small, PRECISE)
        share = tl.where(z < 0.0, small * large, large)
        slope = (small * large) * large
        if KIND == GELU_TANH:
            # where the slope is 0, what it multiplies may have overflowed
            slope = tl.where(slope == 0.0, 0.0, slope * (TWICE_SCALE * tl.fma(x * x, 3.0 * CUBIC, 1.0)))
        return share * x, tl.fma(x, slope, share)


@triton.jit
def _places(num_rows, num_columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """(rows [R, 1], columns [1, C] int64, which exist, place in a contiguous tensor) of this program."""
    per_row = tl.cdiv(num_columns, BLOCK_C)
    block = tl.program_id(0)
    rows = (block // per_row) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    columns = (block % per_row).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    live = (rows < num_rows) & (columns < num_columns)
    return rows, columns, live, rows.to(tl.int64) * num_columns + columns


@triton.jit(do_not_specialize=["num_rows"])
def activation_forward_kernel(
    x_ptr, up_ptr, out_ptr,
    num_rows, inner, num_columns, stride_xo, stride_xi, stride_xc, stride_uo, stride_ui, stride_uc,
    KIND: tl.constexpr, GATED: tl.constexpr, PRECISE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows, columns, live, place = _places(num_rows, num_columns, BLOCK_R, BLOCK_C)
    x = tl.load(x_ptr + row_starts(rows, inner, stride_xo, stride_xi) + columns * stride_xc, mask=live, other=0.0)
    y = _activate(x.to(tl.float32), KIND, PRECISE).to(x.dtype)
    if GATED:
        up = tl.load(up_ptr + row_starts(rows, inner, stride_uo, stride_ui) + columns * stride_uc, mask=live, other=0.0)
        y = (y.to(tl.float32) * up.to(tl.float32)).to(x.dtype)
    tl.store(out_ptr + place, y, mask=live)


@triton.jit(do_not_specialize=["num_rows"])
def activation_backward_kernel(
    grad_ptr, x_ptr, up_ptr, dx_ptr, dup_ptr,
    num_rows, inner, num_columns, stride_go, stride_gi, stride_gc, stride_xo, stride_xi, stride_xc,
    stride_uo, stride_ui, stride_uc,
    KIND: tl.constexpr, GATED: tl.constexpr, PRECISE: tl.constexpr, NEED_X: tl.constexpr, NEED_UP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows, columns, live, place = _places(num_rows, num_columns, BLOCK_R, BLOCK_C)
    grad_ptrs = grad_ptr + row_starts(rows, inner, stride_go, stride_gi) + columns * stride_gc
    x_ptrs = x_ptr + row_starts(rows, inner, stride_xo, stride_xi) + columns * stride_xc
    grad = tl.load(grad_ptrs, mask=live, other=0.0).to(tl.float32)
    x = tl.load(x_ptrs, mask=live, other=0.0)
    y, derivative = _derivative(x.to(tl.float32), KIND, PRECISE)
    if NEED_UP:
        tl.store(dup_ptr + place, (grad * y).to(x.dtype), mask=live)
    if NEED_X:
        if GATED:
            up_ptrs = up_ptr + row_starts(rows, inner, stride_uo, stride_ui) + columns * stride_uc
            grad = grad * tl.load(up_ptrs, mask=live, other=0.0).to(tl.float32)
        tl.store(dx_ptr + place, (grad * derivative).to(x.dtype), mask=live)
