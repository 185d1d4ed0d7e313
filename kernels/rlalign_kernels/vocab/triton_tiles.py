"""The arithmetic of the output layer's plan, shared by its Triton kernels: what is here fixes bits.

Logits x = cap tanh((h w + b) / cap), in float32; soft cap and bias where there are any. With c = log2(e) / temperature,
per block of ids: m = max(x) c, at least FLOOR; d = fma(x, c, -m); p = exp2(d); s = tree(p); w = tree(p d).
Powers are of 2 throughout; d and m are log-probs in units of log 2. Fused multiply-adds are written out where the
compiler could choose between two.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.random import philox_impl

from rlalign_kernels.triton_math import fold, tanh

FLOOR = tl.constexpr(-1.0e30)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# exp2 is exactly 0 below this; keeps 0 * (-inf) out of the entropy
ZERO_EXP = tl.constexpr(-200.0)


@triton.jit
def place(tile, num_rows, num_ids, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROW_TILES: tl.constexpr):
    """(row tile, id tile) number ``tile``: ROW_TILES tiles of rows side by side, through all ids."""
    row_tiles = tl.cdiv(num_rows, BLOCK_M)
    band = ROW_TILES * tl.cdiv(num_ids, BLOCK_N)
    first = tile // band * ROW_TILES
    height = tl.minimum(row_tiles - first, ROW_TILES)
    inside = tile % band
    return first + inside % height, inside // height


@triton.jit
def load_box(
    box, ptr, first, k, num_rows, depth, stride, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """[ROWS, BLOCK_K] of a matrix [num_rows, depth]; zeros outside of it."""
    if TMA:
        return box.load([first, k])
    else:
        offs_r = first + tl.arange(0, ROWS)
        offs_k = k + tl.arange(0, BLOCK_K)
        ptrs = ptr + offs_r.to(tl.int64)[:, None] * stride + offs_k[None, :]
        return tl.load(ptrs, mask=(offs_r < num_rows)[:, None] & (offs_k < depth)[None, :], other=0.0)


@triton.jit
def add_product(a, b, acc, lost):
    """acc + a b^T as ``linear`` sums it. Tensor cores continue one chain; float32 adds blocks of k, each a chain from
    0, and keeps what every addition rounds away in ``lost``."""
    if a.dtype == tl.float32:
        block = tl.dot(a, tl.trans(b), input_precision="ieee")
        total = acc + block
        back = total - acc
        return total, lost + ((acc - (total - back)) + (block - back))
    else:
        return tl.dot(a, tl.trans(b), acc), lost


@triton.jit
def chain_end(acc, lost, COMPENSATED: tl.constexpr):
    """The sum; an infinite one has lost infinitely much."""
    if COMPENSATED:
        return tl.where(tl.abs(acc) < float("inf"), acc + lost, acc)
    else:
        return acc


@triton.jit
def logits_tile(
    hidden_box, weight_box, hidden_ptr, weight_ptr, bias_ptr, row_tile, id_tile, num_rows, num_ids, depth,
    stride_hidden, stride_weight, cap, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr, TMA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_M, BLOCK_N] logits; rows and ids outside of the matrices have no meaning."""
    row = row_tile * BLOCK_M
    column = id_tile * BLOCK_N
    acc = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
    lost = acc
    for step in range(tl.cdiv(depth, BLOCK_K)):
        k = step * BLOCK_K
        h = load_box(hidden_box, hidden_ptr, row, k, num_rows, depth, stride_hidden, BLOCK_M, BLOCK_K, TMA)
        w = load_box(weight_box, weight_ptr, column, k, num_ids, depth, stride_weight, BLOCK_N, BLOCK_K, TMA)
        if SWAP:
            acc, lost = add_product(w, h, acc, lost)
        else:
            acc, lost = add_product(h, w, acc, lost)
    acc = chain_end(acc, lost, hidden_ptr.dtype.element_ty == tl.float32)
    if SWAP:
        acc = tl.trans(acc)
    if HAS_BIAS:
        offs_n = column + tl.arange(0, BLOCK_N)
        acc = acc + tl.load(bias_ptr + offs_n, mask=offs_n < num_ids, other=0.0).to(tl.float32)[None, :]
    if HAS_CAP:
        acc = soft_cap(acc, cap)
    return acc


@triton.jit
def rows_and_logits(
    tile, hidden_box, weight_box, hidden_ptr, weight_ptr, bias_ptr, num_rows, num_ids, depth, stride_hidden,
    stride_weight, cap, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr,
    TMA: tl.constexpr, ROW_TILES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
):  # fmt: skip
    """(rows [BLOCK_M], id tile, their logits) of tile number ``tile``."""
    row_tile, id_tile = place(tile, num_rows, num_ids, BLOCK_M, BLOCK_N, ROW_TILES)
    x = logits_tile(
        hidden_box, weight_box, hidden_ptr, weight_ptr, bias_ptr, row_tile, id_tile, num_rows, num_ids, depth,
        stride_hidden, stride_weight, cap, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, TMA, HAS_BIAS, HAS_CAP,
    )  # fmt: skip
    return row_tile * BLOCK_M + tl.arange(0, BLOCK_M), id_tile, x


@triton.jit
def soft_cap(x, cap):
    return tanh(x * (1.0 / cap)) * cap


@triton.jit
def row_scale(temperature_ptr, offs_m, num_rows, HAS_TEMPERATURE: tl.constexpr):
    """(c, greedy) [BLOCK_M]: log2(e) / temperature, greedy rows (temperature 0) counting as 1."""
    if HAS_TEMPERATURE:
        temperature = tl.load(temperature_ptr + offs_m, mask=offs_m < num_rows, other=1.0)
        greedy = temperature == 0.0
        one = tl.full(offs_m.shape, LOG2E, tl.float32)
        return tl.where(greedy, LOG2E, tl.div_rn(one, tl.where(greedy, 1.0, temperature))), greedy
    else:
        return tl.full(offs_m.shape, LOG2E, tl.float32), offs_m < 0


@triton.jit
def log(x):
    """Natural logarithm of normal float32 x to 0.84 units in the last place, in written-out operations.

    The hardware's errs by 2e-7 around 1, where the sums of confident rows are. 0 gives -inf.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -8388608  # the multiple of 2^23 that leaves a mantissa in [2/3, 4/3)
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    s = f * f
    r = tl.fma(s, -0.130310059, -0.121483989)
    t = tl.fma(s, 0.140869141, 0.139814854)
    r = tl.fma(r, s, -0.166846126)
    t = tl.fma(t, s, 0.200120345)
    r = tl.fma(r, s, -0.249996200)
    r = tl.fma(t, f, r)
    r = tl.fma(r, f, 0.333331972)
    r = tl.fma(r, f, -0.5)
    r = tl.fma(r, s, f)
    # 2^-23: the exponent as a number
    r = tl.fma(exponent.to(tl.float32) * 1.1920928955078125e-07, LN2, r)
    r = tl.where(x == x, r, x)
    return tl.where(x == 0.0, float("-inf"), r)


@triton.jit
def halves(x, M: tl.constexpr, N: tl.constexpr):
    """Left and right half of [M, N]."""
    return tl.split(tl.permute(tl.reshape(x, [M, 2, N // 2]), [0, 2, 1]))


@triton.jit
def blocks(x, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    """[M, N] as one or two of the plan's blocks of ids, ascending."""
    if N == BLOCK:
        return (x,)
    else:
        return halves(x, M, N)


@triton.jit
def tree(x, M: tl.constexpr, N: tl.constexpr):
    """Row sums [M] of [M, N] by adding halves: an order that no layout can change, unlike tl.sum's."""
    return tl.reshape(fold(x, M, N, 1), [M])


@triton.jit
def tree_dot(x, y, M: tl.constexpr, N: tl.constexpr):
    """Row sums [M] of x y, both [M, N]."""
    x_low, x_high = halves(x, M, N)
    y_low, y_high = halves(y, M, N)
    return tree(tl.fma(x_high, y_high, x_low * y_low), M, N // 2)


@triton.jit
def spread(x, M: tl.constexpr, N: tl.constexpr):
    """[M] -> [M, N]."""
    return tl.broadcast_to(x[:, None], [M, N])


@triton.jit
def exponents(x, c, m, M: tl.constexpr, N: tl.constexpr):
    """d [M, N]: log2 of the weights of logits x [M, N] relative to m [M]."""
    return tl.fma(x, spread(c, M, N), spread(-m, M, N))


@triton.jit
def block_maximum(x, c):
    """m [M] of logits [M, N] that may be -inf."""
    return tl.maximum(tl.max(x, 1) * c, FLOOR)


@triton.jit
def restrict(
    x, offs_m, ids, mask_ptr, num_rows, num_ids, stride_mask, HAS_MASK: tl.constexpr, RAGGED: tl.constexpr
):  # fmt: skip
    """-inf outside of the vocabulary and of the rows' supports (bool [rows, ids])."""
    if RAGGED:
        x = tl.where((ids < num_ids)[None, :], x, float("-inf"))
    if HAS_MASK:
        ptrs = mask_ptr + offs_m.to(tl.int64)[:, None] * stride_mask + ids[None, :]
        kept = tl.load(ptrs, mask=(offs_m < num_rows)[:, None] & (ids < num_ids)[None, :], other=0)
        x = tl.where(kept != 0, x, float("-inf"))
    return x


@triton.jit
def cut_off(x, offs_m, ids, limit_ptr, last_ptr, num_rows, first_id):
    """-inf behind the last id that a row keeps, in the order of descending logits x [rows, ids], ids ascending among
    equals. A logit that is NaN stays. ids: less first_id."""
    inside = offs_m < num_rows
    limit = tl.load(limit_ptr + offs_m, mask=inside, other=0.0)[:, None]
    last = (tl.load(last_ptr + offs_m, mask=inside, other=0) - first_id)[:, None]
    return tl.where(behind(x, ids[None, :], limit, last), float("-inf"), x)


@triton.jit
def behind(x, ids, limit, last):
    """bool: whether logit x of an id comes after the one of logit ``limit`` and id ``last``. A NaN never does."""
    return (x < limit) | ((x == limit) & (ids > last))


@triton.jit
def noise(seed, position, block, M: tl.constexpr, N: tl.constexpr):
    """Gumbel noise / log 2 [M, N] of ids ``block * N`` ...: reference/philox.py's words, of seed int64 [M] and
    position [M].

    u = (word + 1/2) 2^-32, at most 1 - 2^-24; noise = -log2(-log(1 - u)), whose inner logarithm is a polynomial for
    small u, where 1 - u would round.
    """
    key_low = seed.to(tl.uint32)[:, None]
    key_high = (seed >> 32).to(tl.uint32)[:, None]
    group = (block * (N // 4) + tl.arange(0, N // 4)).to(tl.uint32)[None, :]
    zero = tl.zeros([M, N // 4], tl.uint32)
    counter = position.to(tl.uint32)[:, None]
    a, b, c, d = philox_impl(zero + group, zero + counter, zero, zero, zero + key_low, zero + key_high)
    # id % 4 selects the word: the last two axes count 00, 01, 10, 11
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [M, N])
    u = tl.minimum((words.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.999999940395355224609375)
    t = tl.fma(u, 1.0 / 6.0, 0.2)
    t = tl.fma(u, t, 0.25)
    t = tl.fma(u, t, 0.3333333333333333)
    t = tl.fma(u, t, 0.5)
    near = tl.fma(u * u, t, u)
    far = tl.math.log2(1.0 - u) * (-LN2)
    return -tl.math.log2(tl.where(u < 0.0625, near, far))
