"""Attention over a paged key-value cache: inference only."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from rlalign_kernels.attention.shared import check_problem, host_offsets, layout_of, refuse_what_is_no_tensor
from rlalign_kernels.checks import check_integer
from rlalign_kernels.content import cached, content
from rlalign_kernels.dispatch import Backend, Implementations, running, without_autocast
from rlalign_kernels.native import attention as native
from rlalign_kernels.reference import attention as reference
from rlalign_kernels.reference.attention_backward import Settings
from rlalign_kernels.reference.attention_layout import paged_problem


class _Host:
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


class Batch(NamedTuple):
    """Offsets [B + 1], lengths [B] and page tables [B, max_pages] as given."""

    block_tables: torch.Tensor
    cu_seqlens_q: torch.Tensor
    kv_lens: torch.Tensor
    max_seqlen_q: int | None
    max_seqlen_k: int | None

    def host(self, q: torch.Tensor, k_cache: torch.Tensor) -> _Host:
        """For the backends that lay out batches on the host. Waits for the device that holds the batch."""
        integers = (self.block_tables, self.cu_seqlens_q, self.kv_lens)
        key = ("paged", q.shape[0], *k_cache.shape[:2], *content(*integers))
        return cached(key, lambda: _Host(q.shape[0], k_cache, *integers, key))


@without_autocast
def _reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    batch: Batch,
    settings: Settings,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    check_problem("attention_paged", q, k_cache, v_cache, settings, "reference", batch[-2:])
    page_size, host = k_cache.shape[1], batch.host(q, k_cache)
    layout = layout_of(
        ("layout", *host.key),
        lambda: paged_problem(host.cu_q, host.kv_len, host.tables, page_size),
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
    batch: Batch,
    settings: Settings,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    check_problem("attention_paged", q, k_cache, v_cache, settings, "native", batch[-2:])
    page_size, host = k_cache.shape[1], batch.host(q, k_cache)

    def padded() -> native.Batch:
        kv_len = host.kv_len
        slots = host.tables[:, :, None] * page_size + np.arange(page_size)
        slots = slots.reshape(len(kv_len), host.tables.shape[1] * page_size)
        return native.Batch(host.cu_q, [slots[b, : kv_len[b]] for b in range(len(kv_len))], q.device)

    found = cached(("native paged", q.device, *host.key), padded)
    return native.attend(q, k_cache.flatten(0, 1), v_cache.flatten(0, 1), found, settings, return_lse)


def _triton(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, batch: Batch, settings: Settings, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    from rlalign_kernels.attention import triton_calls  # triton may be missing where nobody asks for it

    _IMPLEMENTATIONS.by_backend["triton"] = triton_calls.paged  # later calls need not ask for it again
    return triton_calls.paged(q, k_cache, v_cache, batch, settings, return_lse)


_IMPLEMENTATIONS = Implementations("attention_paged", reference=_reference, native=_native, triton=_triton)


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
    sinks: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    backend: Backend,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """out [T, Hq, Dv] of q [T, Hq, D] against caches [pages, page, Hkv, D] and [pages, page, Hkv, Dv].

    block_tables int [B, max_pages]: pages of each sequence in order; entries beyond its kv_lens (int [B]) are not read.
    kv_lens count the keys already in the cache, those of the queries included. Not differentiable.
    ``sinks`` and ``max_seqlen_*``: see attention_packed. With backend "triton" nothing is read on the host, pages hold
    a power of two of tokens from 16 on, and out is not written from cu_seqlens_q[-1] on.
    Raises ValueError or NotImplementedError naming what does not fit.
    """
    run = _IMPLEMENTATIONS[backend]
    running.append("attention_paged")  # what @operator does, without packing the keywords twice
    try:
        if torch.is_grad_enabled() and (
            q.requires_grad
            or k_cache.requires_grad
            or v_cache.requires_grad
            or (sinks is not None and sinks.requires_grad)
        ):
            raise NotImplementedError("attention_paged: has no gradient; use attention_packed, or torch.no_grad()")
        batch = Batch(block_tables, cu_seqlens_q, kv_lens, max_seqlen_q, max_seqlen_k)
        out, lse = run(q, k_cache, v_cache, batch, Settings(scale, causal, window, softcap, None, sinks), return_lse)
    except AttributeError:
        refuse_what_is_no_tensor(
            "attention_paged", q=q, k_cache=k_cache, v_cache=v_cache, block_tables=block_tables,
            cu_seqlens_q=cu_seqlens_q, kv_lens=kv_lens, sinks=sinks,
        )  # fmt: skip
        raise
    finally:
        running.pop()
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
