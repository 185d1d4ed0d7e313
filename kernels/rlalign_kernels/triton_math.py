"""Sums and functions whose bits no layout, tile or compiler version may change, for every Triton kernel."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _halve(x, M: tl.constexpr, N: tl.constexpr):
    low, high = tl.split(tl.permute(tl.reshape(x, [M, 2, N // 2]), [0, 2, 1]))
    return low + high


@triton.jit
def fold(x, M: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr):
    """[M, N] -> [M, WIDTH] by adding halves: an order of summation that no layout can change, unlike tl.sum's."""
    if N > WIDTH:
        return fold(_halve(x, M, N), M, N // 2, WIDTH)
    else:
        return x


@triton.jit
def tanh(x):
    """Elementwise in written-out operations, so that every layout and version gives the same bits.

    Below 1/4, where 1 - 2 / (1 + e^2x) would cancel, its Taylor polynomial: both are within 4e-7 of it, relative.
    """
    y = x * x
    t = tl.fma(y, 0.021869488536155203, -0.05396825396825397)
    t = tl.fma(y, t, 0.13333333333333333)
    t = tl.fma(y, t, -0.3333333333333333)
    near = tl.fma(x * y, t, x)
    far = 1.0 - 2.0 / (1.0 + tl.math.exp2(tl.minimum(tl.abs(x), 20.0) * (2.0 * LOG2E)))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0.0, -far, far))
