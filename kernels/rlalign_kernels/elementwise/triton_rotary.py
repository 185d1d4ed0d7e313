"""Rotary embedding: tables of cos and sin, and their application to heads [T, heads, D] of any strides.

``out = [round(a cos) - round(b sin), round(b cos) + round(a sin), rest]``, products rounded to the tables' dtype, sums
to that and then to the heads'; the transposed rotation, for gradients, is ``[round(a cos) + round(b sin),
round(b cos) - round(a sin), rest]``, where the sine is that of the channel that the gradient comes from. Tables: one
float32 product per angle, then libdevice's cos and sin, which are accurate for every float32. Nothing is reduced, so
every tile gives the same bits. Queries and keys are one launch: where few rows decode, launches are what it costs.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from rlalign_kernels.elementwise.triton_rows import check_device
from rlalign_kernels.launch import Launch

# Pairs of channels that one program turns at most, and that one warp does.
_PAIRS, _PAIRS_OF_A_WARP = 2048, 256
_ANGLES = 512


@triton.jit
def _rounded(a, table):
    """a * table rounded to the table's dtype, as float32."""
    return (a.to(tl.float32) * table.to(tl.float32)).to(table.dtype).to(tl.float32)


@triton.jit
def _turn(
    x_ptr, cos_ptr, sin_ptr, out_ptr, t, block, num_tokens, heads, stride_xt, stride_xh, stride_xd, stride_ct,
    stride_cd, stride_st, stride_sd, D: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Tokens ``t`` [BLOCK_T] of a block of BLOCK_H heads."""
    h = (block * BLOCK_H + tl.arange(0, BLOCK_H))[None, :, None]
    live = (t < num_tokens)[:, None, None]
    t = t.to(tl.int64)[:, None, None]
    live = live & (h < heads)
    rows = x_ptr + t * stride_xt + h.to(tl.int64) * stride_xh
    outs = out_ptr + t * heads * D + h * D
    d = tl.arange(0, BLOCK_D)[None, None, :]
    mask = live & (d < HALF)
    # the tables' rows once for every head, in the heads' own layout: a cache serves them, a broadcast would go through
    # shared memory
    cos_ptrs = tl.broadcast_to(cos_ptr + t * stride_ct + d * stride_cd, [BLOCK_T, BLOCK_H, BLOCK_D])
    sin_ptrs = tl.broadcast_to(sin_ptr + t * stride_st + d * stride_sd, [BLOCK_T, BLOCK_H, BLOCK_D])
    cos_a = tl.load(cos_ptrs, mask=mask, other=0.0)
    cos_b = tl.load(cos_ptrs + HALF * stride_cd, mask=mask, other=0.0)
    sin_a = tl.load(sin_ptrs, mask=mask, other=0.0)
    sin_b = tl.load(sin_ptrs + HALF * stride_sd, mask=mask, other=0.0)
    a = tl.load(rows + d.to(tl.int64) * stride_xd, mask=mask, other=0.0)
    b = tl.load(rows + (d + HALF).to(tl.int64) * stride_xd, mask=mask, other=0.0)
    if BACK:
        first = _rounded(a, cos_a) + _rounded(b, sin_b)
        second = _rounded(b, cos_b) - _rounded(a, sin_a)
    else:
        first = _rounded(a, cos_a) - _rounded(b, sin_a)
        second = _rounded(b, cos_b) + _rounded(a, sin_b)
    tl.store(outs + d, first.to(a.dtype), mask=mask)
    tl.store(outs + HALF + d, second.to(a.dtype), mask=mask)
    if BLOCK_REST > 0:
        d = 2 * HALF + tl.arange(0, BLOCK_REST)[None, None, :]
        mask = live & (d < D)
        tl.store(outs + d, tl.load(rows + d.to(tl.int64) * stride_xd, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "query_heads", "key_heads"])
def rotary_kernel(
    query_ptr, key_ptr, cos_ptr, sin_ptr, query_out_ptr, key_out_ptr,
    num_tokens, query_heads, key_heads, stride_qt, stride_qh, stride_qd, stride_kt, stride_kh, stride_kd,
    stride_ct, stride_cd, stride_st, stride_sd,
    D: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """A program turns BLOCK_T tokens' BLOCK_Q query heads or BLOCK_K key heads. HALF: R / 2; BLOCK_D, BLOCK_REST:
    powers of two that hold it and D - R, 0 for none."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    block, query_blocks = tl.program_id(1), tl.cdiv(query_heads, BLOCK_Q)
    if block < query_blocks:
        _turn(
            query_ptr, cos_ptr, sin_ptr, query_out_ptr, t, block, num_tokens, query_heads, stride_qt, stride_qh,
            stride_qd, stride_ct, stride_cd, stride_st, stride_sd, D, HALF, BACK, BLOCK_T, BLOCK_Q, BLOCK_D, BLOCK_REST,
        )  # fmt: skip
    else:
        _turn(
            key_ptr, cos_ptr, sin_ptr, key_out_ptr, t, block - query_blocks, num_tokens, key_heads, stride_kt,
            stride_kh, stride_kd, stride_ct, stride_cd, stride_st, stride_sd, D, HALF, BACK, BLOCK_T, BLOCK_K, BLOCK_D,
            BLOCK_REST,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_positions"])
def tables_kernel(
    position_ptr, frequency_ptr, cos_ptr, sin_ptr, num_positions, stride_f, scaling, HALF: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """cos, sin [T, 2 * HALF], the half-tables twice, of positions [T]."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (t < num_positions) & (d < HALF)
    position = tl.load(position_ptr + t, mask=t < num_positions, other=0).to(tl.float32)
    angle = position * tl.load(frequency_ptr + d * stride_f, mask=d < HALF, other=0.0)
    cos = (tl.math.cos(angle) * scaling).to(cos_ptr.dtype.element_ty)
    sin = (tl.math.sin(angle) * scaling).to(sin_ptr.dtype.element_ty)
    place = t.to(tl.int64) * (2 * HALF) + d
    tl.store(cos_ptr + place, cos, mask=mask)
    tl.store(cos_ptr + place + HALF, cos, mask=mask)
    tl.store(sin_ptr + place, sin, mask=mask)
    tl.store(sin_ptr + place + HALF, sin, mask=mask)


def apply(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [T, Hq, D] and key [T, Hkv, D] turned by cos, sin [T, R]; differentiable in both."""
    check_device("apply_rotary", query)
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return _Rotary.apply(query, key, cos, sin)
    return rotate(query, key, cos, sin, back=False)


def rotate(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    back: bool,
    pairs: int = _PAIRS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``back``: the transposed rotation. ``pairs``: a schedule."""
    outs = query.new_empty(query.shape), key.new_empty(key.shape)
    if outs[0].numel() or outs[1].numel():
        launch = _rotary_launch(
            query.shape, key.shape[1], cos.shape[1], (query.dtype, cos.dtype), query.stride(), key.stride(),
            cos.stride(), sin.stride(), back, pairs,
        )  # fmt: skip
        launch(query, key, cos, sin, *outs)
    return outs


def tables(
    position_ids: torch.Tensor, inv_freq: torch.Tensor, scaling: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cos, sin) [..., D] of position_ids [...] and inv_freq [D/2]."""
    check_device("rotary_cos_sin", inv_freq)
    if position_ids.device != inv_freq.device:
        raise ValueError(
            f"rotary_cos_sin: position_ids.device={position_ids.device} differs from inv_freq's {inv_freq.device}"
        )
    half = inv_freq.shape[0]
    cos, sin = (torch.empty(*position_ids.shape, 2 * half, dtype=dtype, device=inv_freq.device) for _ in range(2))
    if cos.numel():
        position_ids = position_ids.contiguous()
        dtypes = (position_ids.dtype, dtype)
        launch = _tables_launch(position_ids.numel(), half, dtypes, inv_freq.stride(0), scaling)
        launch(position_ids, inv_freq, cos, sin)
    return cos, sin


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, sin)
        return rotate(query, key, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(
        ctx, grad_query: torch.Tensor, grad_key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        return *rotate(grad_query, grad_key, *ctx.saved_tensors, back=True), None, None


@lru_cache(4096)
def _rotary_launch(
    query_shape: torch.Size,
    key_heads: int,
    rotated: int,
    dtypes: tuple[torch.dtype, ...],
    stride_query: tuple[int, ...],
    stride_key: tuple[int, ...],
    stride_cos: tuple[int, ...],
    stride_sin: tuple[int, ...],
    back: bool,
    pairs: int,
) -> Launch:
    num_tokens, query_heads, dim = query_shape
    rest = dim - rotated
    block_d = triton.next_power_of_2(max(1, rotated // 2))
    block_q, block_k = (
        max(1, min(triton.next_power_of_2(heads), pairs // block_d)) for heads in (query_heads, key_heads)
    )
    widest = max(block_q, block_k) * block_d
    # several tokens share a program only where one has next to nothing to do: the tables then take a detour
    block_t = max(1, min(_PAIRS_OF_A_WARP // widest, triton.next_power_of_2(num_tokens)))
    num_warps = min(4, max(1, block_t * widest // _PAIRS_OF_A_WARP))
    return Launch(
        rotary_kernel,
        (triton.cdiv(num_tokens, block_t), triton.cdiv(query_heads, block_q) + triton.cdiv(key_heads, block_k)),
        (num_tokens, query_heads, key_heads, *stride_query, *stride_key, *stride_cos, *stride_sin),
        D=dim, HALF=rotated // 2, BACK=back, BLOCK_T=block_t, BLOCK_Q=block_q, BLOCK_K=block_k, BLOCK_D=block_d,
        BLOCK_REST=triton.next_power_of_2(rest) if rest else 0, num_warps=num_warps, enable_fp_fusion=False,
    )  # fmt: skip


@lru_cache(4096)
def _tables_launch(
    num_positions: int, half: int, dtypes: tuple[torch.dtype, ...], stride_f: int, scaling: float
) -> Launch:
    block_d = triton.next_power_of_2(half)
    block_t = max(1, min(_ANGLES // block_d, triton.next_power_of_2(num_positions)))
    return Launch(
        tables_kernel, (triton.cdiv(num_positions, block_t),), (num_positions, stride_f, scaling),
        HALF=half, BLOCK_T=block_t, BLOCK_D=block_d, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
