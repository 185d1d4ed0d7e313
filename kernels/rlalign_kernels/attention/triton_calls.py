"""From the public operators to the triton backend: what it refuses, and whether a gradient is wanted."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from triton import knobs

from rlalign_kernels.attention.shared import check_offsets, check_packed, check_paged
from rlalign_kernels.attention.triton_backend import forward
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
    cu_seqlens_q, cu_seqlens_k, _, _, max_seqlen_q, max_seqlen_k = offsets
    if settings.key_mask is not None:
        raise NotImplementedError("attention_packed: key_mask is not there with backend='triton'; pack the keys")
    masking, sinks = _masking(*settings[:4]), settings.sinks
    if torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)
    ):
        return PackedAttention.apply(
            q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, masking, max_seqlen_q, max_seqlen_k, _check_packed, settings
        )  # fmt: skip
    keys = Keys(k, v, cu_seqlens_k, None, None, max_seqlen_k)
    return forward(q, keys, cu_seqlens_q, masking, sinks, max_seqlen_q, return_lse, _check_packed, settings)


def paged(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: Batch, settings: Settings, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As ``packed``, of caches [pages, page, Hkv, D]."""
    block_tables, cu_seqlens_q, kv_lens, max_seqlen_q, max_seqlen_k = batch
    keys = Keys(k_cache, v_cache, None, block_tables, kv_lens, max_seqlen_k)
    masking = _masking(*settings[:4])
    return forward(q, keys, cu_seqlens_q, masking, settings.sinks, max_seqlen_q, return_lse, _check_paged, settings)


@lru_cache(256)
def _masking(scale: float, causal: bool, window: int | None, softcap: float | None) -> Masking:
    return Masking(scale, None if window is None else window - 1, 0 if causal else None, softcap)


def _check_packed(q: torch.Tensor, keys: Keys, cu_seqlens_q: torch.Tensor, settings: Settings) -> None:
    check_packed(q, keys.k, keys.v, settings, "triton")
    cu_seqlens_k = keys.cu_seqlens
    _check("attention_packed", q, settings, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_offsets("attention_packed", "cu_seqlens_q", cu_seqlens_q)
    check_offsets("attention_packed", "cu_seqlens_k", cu_seqlens_k)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"attention_packed: cu_seqlens_q and cu_seqlens_k differ in length: "
            f"{len(cu_seqlens_q)}, {len(cu_seqlens_k)}"
        )


def _check_paged(q: torch.Tensor, keys: Keys, cu_seqlens_q: torch.Tensor, settings: Settings) -> None:
    check_paged(q, keys.k, keys.v, settings, "triton")
    tables, kv_lens = keys.block_tables, keys.kv_lens
    _check("attention_paged", q, settings, block_tables=tables, cu_seqlens_q=cu_seqlens_q, kv_lens=kv_lens)
    check_offsets("attention_paged", "cu_seqlens_q", cu_seqlens_q)
    if keys.page_size < _SMALLEST_PAGE or keys.page_size & (keys.page_size - 1):
        raise NotImplementedError(
            f"attention_paged: a page of {keys.page_size} tokens is not there with backend='triton'; "
            "use a power of two from 16 on"
        )
    batch = cu_seqlens_q.shape[0] - 1
    if tables.dim() != 2 or tables.shape[0] != batch or kv_lens.shape != (batch,):
        raise ValueError(
            f"attention_paged: block_tables {tuple(tables.shape)} and kv_lens {tuple(kv_lens.shape)} do not fit "
            f"{batch} sequences"
        )


def _check(operator: str, q: torch.Tensor, settings: Settings, **integers: torch.Tensor) -> None:
    if settings.scale <= 0:
        raise NotImplementedError(f"{operator}: scale={settings.scale} is not there with backend='triton'; use one > 0")
    for name, tensor in integers.items():
        if tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{operator}: {name}.dtype={tensor.dtype} is not supported; use int32 or int64")
        if tensor.device != q.device:
            raise ValueError(f"{operator}: {name} is on {tensor.device}, q on {q.device}: nothing is copied in silence")
        if tensor.dim() and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{operator}: {name} has strides {tensor.stride()}; its last dimension must be contiguous")
    if q.device.type == "cuda":
        return
    if not knobs.runtime.interpret:
        raise ValueError(f"{operator}: q.device={q.device} is not supported with backend='triton'; use a CUDA device")
    if q.dtype == torch.bfloat16:
        raise NotImplementedError(f"{operator}: q.dtype={q.dtype}: Triton's interpreter takes float32 and float16 only")
