"""What the element-wise kernels share: reading rows, the row sum's plan, and functions in written-out operations.

Kernels are compiled with ``enable_fp_fusion=False``: products and sums are one operation only where an fma is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton import knobs

LOG2E = tl.constexpr(1.4426950408889634)
# log2(e) as a float32 and what that lacks
LOG2E_HIGH = tl.constexpr(1.44269502162933349609375)
LOG2E_LOW = tl.constexpr(1.92596299112661746887e-8)
ROUND = tl.constexpr(12582912.0)


def check_device(operator: str, x: torch.Tensor) -> None:
    """Raises ValueError or NotImplementedError where Triton can't run on ``x``."""
    if x.is_cuda:
        return
    if not knobs.runtime.interpret:
        raise ValueError(f"{operator}: x.device={x.device} is not supported with backend='triton'; use a CUDA device")
    if x.dtype == torch.bfloat16:
        raise NotImplementedError(f"{operator}: x.dtype={x.dtype}: Triton's interpreter takes float32 and float16 only")


@triton.jit
def row_starts(rows, inner, stride_outer, stride_inner):
    """int64 offsets of rows [R]."""
    return (rows // inner).to(tl.int64) * stride_outer + (rows % inner).to(tl.int64) * stride_inner


@triton.jit
def load_columns(ptr, starts, live, stride, H: tl.constexpr, LANES: tl.constexpr):
    """Rows at ``starts`` [R] as a tuple of [R, LANES] tiles; zeros beyond H and where not ``live`` [R]."""
    tiles = ()
    for i in tl.static_range((H + LANES - 1) // LANES):
        c = i * LANES + tl.arange(0, LANES)
        ptrs = ptr + starts[:, None] + (c.to(tl.int64) * stride)[None, :]
        if (i + 1) * LANES <= H:
            tiles += (tl.load(ptrs, mask=live[:, None], other=0.0),)
        else:
            tiles += (tl.load(ptrs, mask=live[:, None] & (c < H)[None, :], other=0.0),)
    return tiles


@triton.jit
def load_vector(ptr, stride, i: tl.constexpr, H: tl.constexpr, LANES: tl.constexpr):
    """Columns of lane pass ``i`` of a vector [H], as [1, LANES]; zeros beyond H."""
    c = i * LANES + tl.arange(0, LANES)
    if (i + 1) * LANES <= H:
        return tl.load(ptr + c * stride)[None, :]
    else:
        return tl.load(ptr + c * stride, mask=c < H, other=0.0)[None, :]


@triton.jit
def store_columns(ptr, starts, live, i: tl.constexpr, tile, H: tl.constexpr, LANES: tl.constexpr):
    """Columns of lane pass ``i`` [R, LANES] to rows of contiguous columns."""
    c = i * LANES + tl.arange(0, LANES)
    ptrs = ptr + starts[:, None] + c[None, :]
    if (i + 1) * LANES <= H:
        tl.store(ptrs, tile, mask=live[:, None])
    else:
        tl.store(ptrs, tile, mask=live[:, None] & (c < H)[None, :])


@triton.jit
def fold(x, ROWS: tl.constexpr, LANES: tl.constexpr, PAIRS: tl.constexpr = 3):
    """[ROWS, LANES] -> [ROWS]: neighbours three times, then halves. A sum of two has one order whatever the layout."""
    if LANES == 1:
        return tl.reshape(x, [ROWS])
    elif PAIRS > 0:
        return fold(tl.sum(tl.reshape(x, [ROWS, LANES // 2, 2]), 2), ROWS, LANES // 2, PAIRS - 1)
    else:
        return fold(tl.sum(tl.reshape(x, [ROWS, 2, LANES // 2]), 1), ROWS, LANES // 2, PAIRS)


@triton.jit
def fold_rows(x, ROWS: tl.constexpr, LANES: tl.constexpr):
    """[ROWS, LANES] -> [LANES] by halves."""
    if ROWS == 1:
        return tl.reshape(x, [LANES])
    else:
        return fold_rows(tl.sum(tl.reshape(x, [2, ROWS // 2, LANES]), 0), ROWS // 2, LANES)


@triton.jit
def exp(x, PRECISE: tl.constexpr):
    """e^x. PRECISE: to 2 units in the last place; otherwise the exponent of 2 is rounded once, 1e-5 at |x| = 88."""
    if PRECISE:
        x = tl.minimum(tl.maximum(x, -104.0), 104.0)
        n = (x * LOG2E_HIGH + ROUND) - ROUND
        rest = tl.fma(x, LOG2E_LOW, tl.fma(x, LOG2E_HIGH, -n))
        return tl.math.exp2(rest) * tl.math.exp2(n)
    else:
        return tl.math.exp2(x * LOG2E)


@triton.jit
def divide(a, b, PRECISE: tl.constexpr):
    """a / b, correctly rounded if PRECISE, else to 2 units in the last place of float32."""
    if PRECISE:
        return tl.div_rn(a, b)
    else:
        return a / b
