"""From the public operators to the triton backend: what it refuses, and whether a gradient is wanted."""

from __future__ import annotations

import torch
from triton import knobs

from rlalign_kernels.attention.triton_backend import forward
from rlalign_kernels.attention.triton_gradient import PackedAttention
from rlalign_kernels.attention.triton_problem import Keys, Masking
from rlalign_kernels.reference.attention_backward import Settings

_SMALLEST_PAGE = 16


def packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    settings: Settings,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """out [T, Hq, Dv], lse float32 [T, Hq] or None. Raises ValueError or NotImplementedError naming what can't be."""
    _check("attention_packed", q, settings, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"attention_packed: cu_seqlens_q and cu_seqlens_k differ in length: "
            f"{len(cu_seqlens_q)}, {len(cu_seqlens_k)}"
        )
    if settings.key_mask is not None:
        raise NotImplementedError("attention_packed: key_mask is not there with backend='triton'; pack the keys")
    masking, sinks = _masking(settings), settings.sinks
    inputs = (q, k, v) if sinks is None else (q, k, v, sinks)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return PackedAttention.apply(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, masking, max_seqlen_q, max_seqlen_k)
    keys = Keys(k, v, cu_seqlens=cu_seqlens_k, max_seqlen=max_seqlen_k)
    return forward(q, keys, cu_seqlens_q, masking, sinks=sinks, max_seqlen_q=max_seqlen_q, return_lse=return_lse)


def paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    kv_lens: torch.Tensor,
    settings: Settings,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As ``packed``, of caches [pages, page, Hkv, D]."""
    _check(
        "attention_paged", q, settings, block_tables=block_tables, cu_seqlens_q=cu_seqlens_q, kv_lens=kv_lens
    )  # fmt: skip
    page = k_cache.shape[1]
    if page < _SMALLEST_PAGE or page & (page - 1):
        raise NotImplementedError(
            f"attention_paged: a page of {page} tokens is not there with backend='triton'; "
            "use a power of two from 16 on"
        )
    batch = cu_seqlens_q.shape[0] - 1
    if block_tables.dim() != 2 or block_tables.shape[0] != batch or kv_lens.shape != (batch,):
        raise ValueError(
            f"attention_paged: block_tables {tuple(block_tables.shape)} and kv_lens {tuple(kv_lens.shape)} do not fit "
            f"{batch} sequences"
        )
    keys = Keys(k_cache, v_cache, block_tables=block_tables, kv_lens=kv_lens, max_seqlen=max_seqlen_k)
    return forward(
        q, keys, cu_seqlens_q, _masking(settings), sinks=settings.sinks, max_seqlen_q=max_seqlen_q,
        return_lse=return_lse,
    )  # fmt: skip


def _masking(settings: Settings) -> Masking:
    left = None if settings.window is None else settings.window - 1
    return Masking(settings.scale, left, 0 if settings.causal else None, settings.softcap)


def _check(operator: str, q: torch.Tensor, settings: Settings, **integers: torch.Tensor) -> None:
    if settings.scale <= 0:
        raise NotImplementedError(f"{operator}: scale={settings.scale} is not there with backend='triton'; use one > 0")
    for name, tensor in integers.items():
        if tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{operator}: {name}.dtype={tensor.dtype} is not supported; use int32 or int64")
        if tensor.device != q.device:
            raise ValueError(f"{operator}: {name} is on {tensor.device}, q on {q.device}: nothing is copied in silence")
    if q.device.type == "cuda":
        return
    if not knobs.runtime.interpret:
        raise ValueError(f"{operator}: q.device={q.device} is not supported with backend='triton'; use a CUDA device")
    if q.dtype == torch.bfloat16:
        raise NotImplementedError(f"{operator}: q.dtype={q.dtype}: Triton's interpreter takes float32 and float16 only")
