"""Keys and values of any strides into their slots, both in one launch."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from rlalign_kernels.elementwise.triton_rows import check_device
from rlalign_kernels.launch import Launch

# Elements that one program copies at most, and that one warp does.
_ELEMENTS, _ELEMENTS_OF_A_WARP = 4096, 512


@triton.jit
def _copy_rows(
    new_ptr, cache_ptr, t, slot, live, block, heads, stride_t, stride_h, stride_d, DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Elements of ``block`` of tokens ``t`` [BLOCK_T], to rows ``slot`` of the cache."""
    e = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = live[:, None] & (e < heads * DIM)
    source = t[:, None] * stride_t + (e // DIM).to(tl.int64) * stride_h + (e % DIM).to(tl.int64) * stride_d
    values = tl.load(new_ptr + source, mask=mask)
    tl.store(cache_ptr + slot[:, None] * heads * DIM + e, values, mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "num_slots", "heads"])
def write_kernel(
    key_ptr, value_ptr, k_cache_ptr, v_cache_ptr, slot_ptr,
    num_tokens, num_slots, heads, stride_s, stride_kt, stride_kh, stride_kd, stride_vt, stride_vh, stride_vd,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A program copies BLOCK_K elements of BLOCK_T tokens' keys, or BLOCK_V of their values."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = t < num_tokens
    t = t.to(tl.int64)
    slot = tl.load(slot_ptr + t * stride_s, mask=live, other=-1)
    live = live & (slot >= 0) & (slot < num_slots)
    block, key_blocks = tl.program_id(1), tl.cdiv(heads * D, BLOCK_K)
    if block < key_blocks:
        _copy_rows(key_ptr, k_cache_ptr, t, slot, live, block, heads, stride_kt, stride_kh, stride_kd, D, BLOCK_K)
    else:
        _copy_rows(
            value_ptr, v_cache_ptr, t, slot, live, block - key_blocks, heads, stride_vt, stride_vh, stride_vd, DV,
            BLOCK_V,
        )  # fmt: skip


def write(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """As ``write_kv_cache``, whose arguments are checked."""
    check_device("write_kv_cache", key)
    if key.numel() or value.numel():
        launch = _write_launch(
            key.shape, value.shape[2], k_cache.shape[0] * k_cache.shape[1], key.dtype, slots.stride(), key.stride(),
            value.stride(),
        )  # fmt: skip
        launch(key, value, k_cache, v_cache, slots)


@lru_cache(4096)
def _write_launch(
    shape: torch.Size,
    value_dim: int,
    num_slots: int,
    dtype: torch.dtype,
    stride_slot: tuple[int, ...],
    stride_key: tuple[int, ...],
    stride_value: tuple[int, ...],
) -> Launch:
    num_tokens, heads, dim = shape
    block_k, block_v = (min(_ELEMENTS, triton.next_power_of_2(max(1, heads * d))) for d in (dim, value_dim))
    widest = max(block_k, block_v)
    block_t = max(1, min(_ELEMENTS_OF_A_WARP // widest, triton.next_power_of_2(num_tokens)))
    return Launch(
        write_kernel,
        (triton.cdiv(num_tokens, block_t), triton.cdiv(heads * dim, block_k) + triton.cdiv(heads * value_dim, block_v)),
        (num_tokens, num_slots, heads, *stride_slot, *stride_key, *stride_value),
        D=dim, DV=value_dim, BLOCK_T=block_t, BLOCK_K=block_k, BLOCK_V=block_v,
        num_warps=min(4, max(1, block_t * widest // _ELEMENTS_OF_A_WARP)),
    )  # fmt: skip
