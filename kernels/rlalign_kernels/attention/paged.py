"""Attention over a paged key-value cache: inference only."""

from __future__ import annotations

import numpy as np
import torch

from rlalign_kernels.attention.shared import check_heads, check_settings, host_offsets, layout_of
from rlalign_kernels.checks import check_integer
from rlalign_kernels.content import cached, content
from rlalign_kernels.dispatch import Backend, Implementations, operator
from rlalign_kernels.native import attention as native
from rlalign_kernels.reference import attention as reference
from rlalign_kernels.reference.attention_backward import Settings
from rlalign_kernels.reference.attention_layout import paged_problem


class _Batch:
    """Validated offsets, lengths and page tables on the host, int64; ``key`` is what they were made from."""

    def __init__(
        self,
        num_queries: int,
        k_cache: torch.Tensor,
        block_tables: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        kv_lens: torch.Tensor,
        key: tuple[object, ...],
    ) -> None:
        self.cu_q = host_offsets("attention_paged", "cu_seqlens_q", cu_seqlens_q, num_queries)
        self.tables, self.kv_len = _host_tables(k_cache, block_tables, kv_lens, len(self.cu_q) - 1)
        self.key = key


def _reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: _Batch,
    settings: Settings,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    page_size = k_cache.shape[1]
    layout = layout_of(
        ("layout", *batch.key),
        lambda: paged_problem(batch.cu_q, batch.kv_len, batch.tables, page_size),
        q,
        k_cache.shape[2],
        v_cache.shape[3],
        settings.causal,
        settings.window,
    )
    k, v = k_cache.flatten(0, 1), v_cache.flatten(0, 1)
    out, lse = reference.forward(
        q, k, v, layout, scale=settings.scale, softcap=settings.softcap, key_mask=None, return_lse=return_lse
    )
    return out.to(q.dtype), lse


def _native(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: _Batch,
    settings: Settings,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    page_size = k_cache.shape[1]

    def padded() -> native.Batch:
        kv_len = batch.kv_len
        slots = (batch.tables[:, :, None] * page_size + np.arange(page_size)).reshape(len(kv_len), -1)
        return native.Batch(batch.cu_q, [slots[b, : kv_len[b]] for b in range(len(kv_len))], q.device)

    found = cached(("native paged", q.device, *batch.key), padded)
    return native.attend(q, k_cache.flatten(0, 1), v_cache.flatten(0, 1), found, settings, return_lse)


_IMPLEMENTATIONS = Implementations("attention_paged", reference=_reference, native=_native)


@operator
def attention_paged(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    kv_lens: torch.Tensor,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    backend: Backend,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """out [T, Hq, Dv] of q [T, Hq, D] against caches [pages, page, Hkv, D] and [pages, page, Hkv, Dv].

    block_tables int [B, max_pages]: pages of each sequence in order; entries beyond its kv_lens (int [B]) are not read.
    kv_lens count the keys already in the cache, those of the queries included. Not differentiable.
    Raises ValueError or NotImplementedError naming what does not fit.
    """
    run = _IMPLEMENTATIONS[backend]
    check_heads("attention_paged", q, k_cache, v_cache)
    check_settings("attention_paged", scale, window, softcap)
    if k_cache.dim() != 4:
        raise ValueError(f"attention_paged: k_cache has shape {tuple(k_cache.shape)}, expected [pages, page, Hkv, D]")
    key = ("paged", q.shape[0], *k_cache.shape[:2], *content(block_tables, cu_seqlens_q, kv_lens))
    batch = cached(key, lambda: _Batch(q.shape[0], k_cache, block_tables, cu_seqlens_q, kv_lens, key))
    if torch.is_grad_enabled() and (q.requires_grad or k_cache.requires_grad or v_cache.requires_grad):
        raise NotImplementedError("attention_paged: has no gradient; use attention_packed, or torch.no_grad()")
    out, lse = run(q, k_cache, v_cache, batch, Settings(scale, causal, window, softcap, None), return_lse)
    return (out, lse) if return_lse else out


def _host_tables(
    k_cache: torch.Tensor, block_tables: torch.Tensor, kv_lens: torch.Tensor, batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """int64 arrays on the host, entries that are not read set to 0. Raises ValueError for a page that is not there."""
    num_pages, page_size = k_cache.shape[:2]
    check_integer("attention_paged", "kv_lens", kv_lens, (batch,))
    if block_tables.dim() != 2:
        raise ValueError(
            f"attention_paged: block_tables has shape {tuple(block_tables.shape)}, expected [B, max_pages]"
        )
    check_integer("attention_paged", "block_tables", block_tables, (batch, block_tables.shape[1]))
    kv_len = kv_lens.cpu().numpy().astype(np.int64)
    tables = block_tables.cpu().numpy().astype(np.int64)
    needed = -(-kv_len // page_size)
    if (kv_len < 0).any() or (needed > tables.shape[1]).any():
        b = int(np.argmax((kv_len < 0) | (needed > tables.shape[1])))
        raise ValueError(
            f"attention_paged: kv_lens[{b}]={kv_len[b]} does not fit {tables.shape[1]} pages of {page_size} tokens"
        )
    used = np.arange(tables.shape[1]) < needed[:, None]
    tables = np.where(used, tables, 0)
    if ((tables < 0) | (tables >= max(num_pages, 1))).any():
        b, j = np.argwhere((tables < 0) | (tables >= max(num_pages, 1)))[0]
        raise ValueError(f"attention_paged: block_tables[{b},{j}]={tables[b, j]} is outside [0, {num_pages})")
    return tables, kv_len
