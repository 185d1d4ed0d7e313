"""``y = x @ weight.T + bias`` in stock Triton: x [M, K], weight [N, K], bias [N] -> out [M, N], row-major.

bfloat16, float16 or float32 in, float32 accumulation in the order of ``chain_plan``, rounded once. A program computes
one tile of the output, all of K. SWAP: the tile is computed transposed, so that weight rows, of which there are enough,
fill the tensor cores' 64 rows and a handful of tokens its narrow side. TMA: operands come by the copy engine, which
gives zeros for rows and columns that aren't there; without it, by masked loads of any strides.
Promised: forward, a row's bits depend on that row, weight and bias only, whatever the constants below.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(tile, num_row_tiles, num_column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile): GROUP row tiles take turns at each column: its weights stay in the cache."""
    per_group = GROUP * num_column_tiles
    first = tile // per_group * GROUP
    rows = tl.minimum(num_row_tiles - first, GROUP)
    return first + tile % per_group % rows, tile % per_group // rows


@triton.jit
def _rows(ptr, row, num_rows, k, k_end, stride_row, stride_k, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """[ROWS, BLOCK_K] from ``row`` and ``k`` on; zeros where there is nothing."""
    offs_row = row + tl.arange(0, ROWS)
    offs_k = k + tl.arange(0, BLOCK_K)
    at = ptr + offs_row.to(tl.int64)[:, None] * stride_row + offs_k.to(tl.int64)[None, :] * stride_k
    return tl.load(at, mask=(offs_row < num_rows)[:, None] & (offs_k < k_end)[None, :], other=0.0)


@triton.jit
def _chain(
    x_ptr, w_ptr, x_desc, w_desc, m0, n0, k_begin, k_end, M, N, stride_xm, stride_xk, stride_wn, stride_wk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr, TMA: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_M, BLOCK_N], or its transpose, of k_begin <= k < k_end."""
    COMPENSATED: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    acc = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
    lost = acc
    for k in tl.range(k_begin, k_end, BLOCK_K, num_stages=STAGES):
        if TMA:
            x = x_desc.load([m0, k])
            w = w_desc.load([n0, k])
        else:
            x = _rows(x_ptr, m0, M, k, k_end, stride_xm, stride_xk, BLOCK_M, BLOCK_K)
            w = _rows(w_ptr, n0, N, k, k_end, stride_wn, stride_wk, BLOCK_N, BLOCK_K)
        if COMPENSATED:
            if SWAP:
                block = tl.dot(w, tl.trans(x), input_precision="ieee")
            else:
                block = tl.dot(x, tl.trans(w), input_precision="ieee")
            total = acc + block
            back = total - acc
            lost += (acc - (total - back)) + (block - back)
            acc = total
        elif SWAP:
            acc = tl.dot(w, tl.trans(x), acc)
        else:
            acc = tl.dot(x, tl.trans(w), acc)
    if COMPENSATED:
        # an infinite sum has lost infinitely much
        acc = tl.where(tl.abs(acc) < float("inf"), acc + lost, acc)
    return acc + 0.0


@triton.jit
def _tree(
    x_ptr, w_ptr, x_desc, w_desc, m0, n0, first, leaf, M, N, stride_xm, stride_xk, stride_wn, stride_wk,
    LEAVES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SWAP: tl.constexpr,
    TMA: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sum of the chains ``first`` .. ``first + LEAVES - 1``, each ``leaf`` long."""
    if LEAVES == 1:
        return _chain(
            x_ptr, w_ptr, x_desc, w_desc, m0, n0, first * leaf, (first + 1) * leaf, M, N, stride_xm, stride_xk,
            stride_wn, stride_wk, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, TMA, STAGES,
        )  # fmt: skip
    else:
        HALF: tl.constexpr = LEAVES // 2
        low = _tree(
            x_ptr, w_ptr, x_desc, w_desc, m0, n0, first, leaf, M, N, stride_xm, stride_xk, stride_wn, stride_wk,
            HALF, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, TMA, STAGES,
        )  # fmt: skip
        high = _tree(
            x_ptr, w_ptr, x_desc, w_desc, m0, n0, first + HALF, leaf, M, N, stride_xm, stride_xk, stride_wn, stride_wk,
            HALF, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, TMA, STAGES,
        )  # fmt: skip
        return low + high


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x_ptr, w_ptr, x_desc, w_desc, bias_ptr, out_ptr,
    M, N, leaf, stride_xm, stride_xk, stride_wn, stride_wk,
    LEAVES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SWAP: tl.constexpr, TMA: tl.constexpr, HAS_BIAS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: one program per tile. TMA: ``leaf`` must be a multiple of BLOCK_K unless there is one leaf.

    float32: BLOCK_K is the plan's FLOAT32_BLOCK.
    """
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    m0, n0 = tile_m * BLOCK_M, tile_n * BLOCK_N
    acc = _tree(
        x_ptr, w_ptr, x_desc, w_desc, m0, n0, 0, leaf, M, N, stride_xm, stride_xk, stride_wn, stride_wk,
        LEAVES, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, TMA, STAGES,
    )  # fmt: skip
    offs_m = m0 + tl.arange(0, BLOCK_M)
    offs_n = n0 + tl.arange(0, BLOCK_N)
    bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    if SWAP:
        if HAS_BIAS:
            acc += bias[:, None]
        at = offs_m.to(tl.int64)[None, :] * N + offs_n[:, None]
        inside = (offs_m < M)[None, :] & (offs_n < N)[:, None]
    else:
        if HAS_BIAS:
            acc += bias[None, :]
        at = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
        inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)
