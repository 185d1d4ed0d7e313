"""From the public operators to the triton backend: what it refuses, and whether a gradient is wanted."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from triton import knobs

from rlalign_kernels.attention.shared import bound, check_heads, check_offsets, check_settings, check_sinks
from rlalign_kernels.attention.triton_backend import find
from rlalign_kernels.attention.triton_gradient import PackedAttention
from rlalign_kernels.attention.triton_problem import Keys, Masking
from rlalign_kernels.reference.attention_backward import Settings

if TYPE_CHECKING:
    from rlalign_kernels.attention.packed import Offsets
    from rlalign_kernels.attention.paged import Batch

_SMALLEST_PAGE = 16


def packed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: Offsets, settings: Settings, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """out [T, Hq, Dv], lse float32 [T, Hq] or None. Raises ValueError or NotImplementedError naming what can't be."""
    scale, causal, window, softcap, key_mask, sinks = settings
    cu_seqlens_q, cu_seqlens_k, _, num_keys, max_seqlen_q, max_seqlen_k = offsets
    if key_mask is not None:
        raise NotImplementedError("attention_packed: key_mask is not there with backend='triton'; pack the keys")
    try:
        masking = _masking("attention_packed", scale, causal, window, softcap, 0 if window is None else num_keys)
    except TypeError:  # not hashable, so not a number
        check_settings("attention_packed", scale, causal, window, softcap)
        raise
    max_seqlen_q, max_seqlen_k = bound("max_seqlen_q", max_seqlen_q), bound("max_seqlen_k", max_seqlen_k)
    if sinks is not None:
        sinks = sinks.contiguous()
    learns = torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)
    )
    keys = Keys(k, v, cu_seqlens_k, None, None, max_seqlen_k)
    call = find(q, keys, cu_seqlens_q, masking, sinks, max_seqlen_q, return_lse or learns, _check_packed)
    if learns:
        return PackedAttention.apply(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, masking, call)
    return call(q, keys, cu_seqlens_q, sinks)


def paged(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: Batch, settings: Settings, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As ``packed``, of caches [pages, page, Hkv, D]."""
    scale, causal, window, softcap, _, sinks = settings
    block_tables, cu_seqlens_q, kv_lens, max_seqlen_q, max_seqlen_k = batch
    most = 0 if window is None else block_tables.shape[-1] * k_cache.shape[1]
    try:
        masking = _masking("attention_paged", scale, causal, window, softcap, most)
    except TypeError:  # not hashable, so not a number
        check_settings("attention_paged", scale, causal, window, softcap)
        raise
    max_seqlen_q, max_seqlen_k = bound("max_seqlen_q", max_seqlen_q), bound("max_seqlen_k", max_seqlen_k)
    if sinks is not None:
        sinks = sinks.contiguous()
    keys = Keys(k_cache, v_cache, None, block_tables, kv_lens, max_seqlen_k)
    call = find(q, keys, cu_seqlens_q, masking, sinks, max_seqlen_q, return_lse, _check_paged)
    return call(q, keys, cu_seqlens_q, sinks)


@lru_cache(1024, typed=True)
def _masking(
    name: str, scale: float, causal: bool, window: int | None, softcap: float | None, most_keys: int
) -> Masking:
    """most_keys: no sequence has more; a window that holds them all is none, and its ends would pass 32 bits."""
    check_settings(name, scale, causal, window, softcap)
    if scale <= 0:
        raise NotImplementedError(f"{name}: scale={scale} is not there with backend='triton'; use one > 0")
    left = None if window is None or window >= most_keys else int(window) - 1
    return Masking(float(scale), left, 0 if causal else None, None if softcap is None else float(softcap))


def _check_packed(q: torch.Tensor, keys: Keys, cu_seqlens_q: torch.Tensor, sinks: torch.Tensor | None) -> None:
    check_heads("attention_packed", q, keys.k, keys.v, "triton")
    check_sinks("attention_packed", sinks, q, "triton")
    cu_seqlens_k = keys.cu_seqlens
    _check("attention_packed", q, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_offsets("attention_packed", "cu_seqlens_q", cu_seqlens_q)
    check_offsets("attention_packed", "cu_seqlens_k", cu_seqlens_k)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"attention_packed: cu_seqlens_q and cu_seqlens_k differ in length: "
            f"{len(cu_seqlens_q)}, {len(cu_seqlens_k)}"
        )
    if len(cu_seqlens_q) == 1 and q.shape[0]:
        raise ValueError(f"attention_packed: cu_seqlens_q names no sequence, and q has {q.shape[0]} rows")


def _check_paged(q: torch.Tensor, keys: Keys, cu_seqlens_q: torch.Tensor, sinks: torch.Tensor | None) -> None:
    check_heads("attention_paged", q, keys.k, keys.v, "triton")
    check_sinks("attention_paged", sinks, q, "triton")
    tables, kv_lens = keys.block_tables, keys.kv_lens
    _check("attention_paged", q, block_tables=tables, cu_seqlens_q=cu_seqlens_q, kv_lens=kv_lens)
    check_offsets("attention_paged", "cu_seqlens_q", cu_seqlens_q)
    if keys.page_size < _SMALLEST_PAGE or keys.page_size & (keys.page_size - 1):
        raise NotImplementedError(
            f"attention_paged: a page of {keys.page_size} tokens is not there with backend='triton'; "
            "use a power of two from 16 on"
        )
    for name, cache in (("k_cache", keys.k), ("v_cache", keys.v)):
        if cache.stride(-1) != 1:
            raise ValueError(f"attention_paged: {name} has strides {cache.stride()}; its last must be 1")
    batch = cu_seqlens_q.shape[0] - 1
    if tables.dim() != 2 or tables.shape[0] != batch or kv_lens.shape != (batch,):
        raise ValueError(
            f"attention_paged: block_tables {tuple(tables.shape)} and kv_lens {tuple(kv_lens.shape)} do not fit "
            f"{batch} sequences"
        )


def _check(name: str, q: torch.Tensor, **integers: torch.Tensor) -> None:
    for argument, tensor in integers.items():
        if tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name}: {argument}.dtype={tensor.dtype} is not supported; use int32 or int64")
        if tensor.device != q.device:
            raise ValueError(f"{name}: {argument} is on {tensor.device}, q on {q.device}: nothing is copied in silence")
        if tensor.dim() and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name}: {argument} has strides {tensor.stride()}; its last dimension must be contiguous")
    if q.device.type == "cuda":
        return
    if not knobs.runtime.interpret:
        raise ValueError(f"{name}: q.device={q.device} is not supported with backend='triton'; use a CUDA device")
    if q.dtype == torch.bfloat16:
        raise NotImplementedError(f"{name}: q.dtype={q.dtype}: Triton's interpreter takes float32 and float16 only")
