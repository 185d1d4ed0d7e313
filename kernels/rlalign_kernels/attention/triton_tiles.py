"""The arithmetic of attention's plan, shared by every Triton kernel: what is here fixes bits, what calls it does not.

Scores S = q k^T are one float32 chain over the head dim. With c = scale * log2(e), per tile of keys:

    m' = max(m, rowmax(S) * c);  p = exp2(fma(S, c, -m'));  a = exp2(m - m')
    den = fma(den, a, fold(p));      acc = acc * a, then + p v

p is rounded to the values' dtype for its product with them and for nothing else. A masked score is -inf and m starts at
the finite FLOOR, so that no branch looks for NaN and a tile without a visible key changes nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rlalign_kernels.triton_math import LN2, LOG2E, fold, tanh

FLOOR = tl.constexpr(-1.0e30)


@triton.jit
def empty_state(M: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr):
    """(m [M], den [M, WIDTH], acc [M, DV]) of no key at all."""
    return tl.full([M], FLOOR, tl.float32), tl.zeros([M, WIDTH], tl.float32), tl.zeros([M, DV], tl.float32)


@triton.jit
def scores(q, k, cap_scale, HAS_CAP: tl.constexpr, PRECISION: tl.constexpr):
    """S [M, N] of q [M, D] and k [N, D]; with a soft cap tanh(S * cap_scale), cap_scale = scale / cap."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if HAS_CAP:
        s = tanh(s * cap_scale)
    return s


@triton.jit
def visible(position, n, num_keys, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """bool [M, N]: whether the query at ``position`` [M] sees key ``n`` [N]."""
    seen = (n < num_keys)[None, :] & (position == position)[:, None]
    if HAS_RIGHT:
        seen = seen & (n[None, :] <= position[:, None] + right)
    if HAS_LEFT:
        seen = seen & (n[None, :] >= position[:, None] - left)
    return seen


@triton.jit
def softmax_step(s, v, m, den, acc, c, M: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    """Take one tile of keys into the state. s [M, N] float32, v [N, DV]."""
    m_new = tl.maximum(m, tl.max(s, 1) * c)
    p = tl.math.exp2(tl.fma(s, c, -m_new[:, None]))
    alpha = tl.math.exp2(m - m_new)
    den = tl.fma(den, tl.broadcast_to(alpha[:, None], [M, WIDTH]), fold(p, M, N, WIDTH))
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return m_new, den, acc


@triton.jit
def merge(m_all, den_all, acc_all, m, den, acc):
    """Take one split's state into the running one; exact when either is empty."""
    m_new = tl.maximum(m_all, m)
    a = tl.math.exp2(m_all - m_new)[:, None]
    b = tl.math.exp2(m - m_new)[:, None]
    den_all = tl.fma(den_all, tl.broadcast_to(a, den_all.shape), den * b)
    acc_all = tl.fma(acc_all, tl.broadcast_to(a, acc_all.shape), acc * b)
    return m_new, den_all, acc_all


@triton.jit
def finish(m, den, acc, sink, M: tl.constexpr, WIDTH: tl.constexpr, HAS_SINK: tl.constexpr):
    """Output [M, DV] float32 and natural log-sum-exp [M]: 0 and -inf for a row that saw no key.

    sink [M]: a logit in natural units that takes its share of every row and carries no value.
    """
    total = tl.reshape(fold(den, M, WIDTH, 1), [M])
    if HAS_SINK:
        m_new = tl.maximum(m, sink * LOG2E)
        alpha = tl.math.exp2(m - m_new)
        total = tl.fma(total, alpha, tl.math.exp2(tl.fma(sink, LOG2E, -m_new)))
        acc = acc * alpha[:, None]
        m = m_new
    none = total == 0.0
    total = tl.where(none, 1.0, total)
    out = acc / total[:, None]
    lse = tl.where(none, float("-inf"), (m + tl.math.log2(total)) * LN2)
    return out, lse


@triton.jit
def load_rows(
    base_ptr, table_ptr, n, num_rows, offs_d, stride_page, stride_row,
    PAGE: tl.constexpr, BOUNDED: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """[N, BLOCK_D] of one head: rows ``n`` of a sequence, contiguous (PAGE 0) or through its page table.

    BOUNDED: rows from ``num_rows`` on are not read and are zeros. ALIGNED: all rows ``n`` lie on one page.
    """
    if PAGE == 0:
        offsets = n.to(tl.int64) * stride_row
    elif ALIGNED:
        page = tl.load(table_ptr + tl.min(n, 0) // PAGE).to(tl.int64)
        offsets = page * stride_page + (n % PAGE) * stride_row
    else:
        if BOUNDED:
            page = tl.load(table_ptr + n // PAGE, mask=n < num_rows, other=0).to(tl.int64)
        else:
            page = tl.load(table_ptr + n // PAGE).to(tl.int64)
        offsets = page * stride_page + (n % PAGE) * stride_row
    ptrs = base_ptr + offsets[:, None] + offs_d[None, :]
    if BOUNDED:
        if DIM < BLOCK_D:
            return tl.load(ptrs, mask=(n < num_rows)[:, None] & (offs_d < DIM)[None, :], other=0.0)
        else:
            return tl.load(ptrs, mask=(n < num_rows)[:, None], other=0.0)
    elif DIM < BLOCK_D:
        return tl.load(ptrs, mask=(offs_d < DIM)[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def load_box(desc, table_ptr, row0, start, column, PAGE: tl.constexpr):
    """[N, D] by a tensor descriptor: rows from ``start`` of a sequence that begins at row0, or through its page table.

    Only for rows that all belong to the sequence: a box does not stop where it ends.
    """
    if PAGE == 0:
        row = row0.to(tl.int32) + start
    else:
        row = tl.load(table_ptr + start // PAGE).to(tl.int32) * PAGE + start % PAGE
    return desc.load([row, column])


@triton.jit
def find_sequence(tile, cu_ptr, num_sequences, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """(b, first): the sequence that tile ``tile`` of a batch belongs to, and that sequence's first tile.

    Sequence b owns the tiles from cu[b] * GROUP // BLOCK + b on. A sequence of n tokens never needs more than the
    distance to the next one's first, so a grid of total // BLOCK + B tiles covers any batch without a host sync.
    """
    low = 0
    high = num_sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(cu_ptr + middle).to(tl.int64) * GROUP // BLOCK + middle <= tile:
            low = middle
        else:
            high = middle - 1
    first = tl.load(cu_ptr + low).to(tl.int64) * GROUP // BLOCK + low
    return low, first.to(tl.int32)
