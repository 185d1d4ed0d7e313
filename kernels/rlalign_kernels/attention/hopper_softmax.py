"""The softmax of attention's plan in Gluon, for one warpgroup: triton_tiles' arithmetic on a thread's own rows.

State of 64 rows: m [64] over S_LAYOUT, den [64, WIDTH] in DEN_LAYOUT, acc [64, D] in O_LAYOUT, all float32.
Promised: triton_tiles' bits, for every layout.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from rlalign_kernels.attention.triton_tiles import FLOOR
from rlalign_kernels.hopper_common import WARPGROUP_ROWS, column, fold
from rlalign_kernels.triton_math import LN2, LOG2E


@gluon.jit
def empty_state(WIDTH: gl.constexpr, S_LAYOUT: gl.constexpr, DEN_LAYOUT: gl.constexpr):
    """(m, den) of no key at all."""
    m = gl.full([WARPGROUP_ROWS], FLOOR, gl.float32, gl.SliceLayout(1, S_LAYOUT))
    return m, gl.zeros([WARPGROUP_ROWS, WIDTH], gl.float32, DEN_LAYOUT)


@gluon.jit
def masked(
    s, tile, position, num_keys, left, right,
    BLOCK_N: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, S_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scores [M, N] of one tile with -inf where a query doesn't see a key."""
    n = gl.expand_dims(tile * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, S_LAYOUT)), 0)
    last = gl.to_tensor(num_keys) - 1
    if HAS_RIGHT:
        last = gl.expand_dims(gl.minimum(position + right, last), 1)
    seen = n <= last
    if HAS_LEFT:
        seen = seen & (n >= gl.expand_dims(position - left, 1))
    return gl.where(seen, s, float("-inf"))


@gluon.jit
def weigh(
    s, m, den, c,
    BLOCK_N: gl.constexpr, WIDTH: gl.constexpr, DEN_LAYOUT: gl.constexpr,
):  # fmt: skip
    """(m, den, alpha, p) after one tile's scores s [64, BLOCK_N]: p are its weights, alpha the factor of what was."""
    m_new = gl.maximum(m, gl.max(s, 1) * c)
    alpha = gl.exp2(m - m_new)
    p = gl.exp2(gl.fma(s, c, gl.expand_dims(-m_new, 1)))
    added = gl.convert_layout(fold(p, WARPGROUP_ROWS, BLOCK_N, WIDTH), DEN_LAYOUT)
    den = gl.fma(den, column(alpha, DEN_LAYOUT).broadcast_to([WARPGROUP_ROWS, WIDTH]), added)
    return m_new, den, alpha, p


@gluon.jit
def merge(m_all, den_all, acc_all, m, den, acc, DEN_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr):
    """triton_tiles.merge."""
    m_new = gl.maximum(m_all, m)
    a = gl.exp2(m_all - m_new)
    b = gl.exp2(m - m_new)
    den = gl.fma(den_all, column(a, DEN_LAYOUT).broadcast_to(den.shape), den * column(b, DEN_LAYOUT))
    acc = gl.fma(acc_all, column(a, O_LAYOUT).broadcast_to(acc.shape), acc * column(b, O_LAYOUT))
    return m_new, den, acc


@gluon.jit
def finish(
    m, den, acc, sink_ptr, head, WIDTH: gl.constexpr, HAS_SINK: gl.constexpr, S_LAYOUT: gl.constexpr,
    O_LAYOUT: gl.constexpr,
):  # fmt: skip
    """triton_tiles.finish."""
    # a thread holds whole rows of den, so that the last folds need no other
    rows: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0]], [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [],
        [WARPGROUP_ROWS, WIDTH],
    )  # fmt: skip
    total = fold(gl.convert_layout(den, rows), WARPGROUP_ROWS, WIDTH, 1).reshape([WARPGROUP_ROWS])
    total = gl.convert_layout(total, gl.SliceLayout(1, S_LAYOUT))
    if HAS_SINK:
        sink = gl.load(sink_ptr + head).to(gl.float32)
        m_new = gl.maximum(m, sink * LOG2E)
        alpha = gl.exp2(m - m_new)
        total = gl.fma(total, alpha, gl.exp2(gl.fma(sink, LOG2E, -m_new)))
        acc = acc * column(alpha, O_LAYOUT)
        m = m_new
    none = total == 0.0
    out = acc / column(gl.where(none, 1.0, total), O_LAYOUT)
    lse = gl.where(none, float("-inf"), (m + gl.log2(total)) * LN2)
    return out, lse
