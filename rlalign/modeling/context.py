"""Attention contexts: how one forward's rows find their keys and values.

A context is passed to the model's forward as the keyword ``attention_context``; transformers hands it down to the
attention function and non-reentrant checkpointing replays it. Trainer and engine call the same modules and differ in
this object only. Legend: T rows (tokens) of the forward, B sequences, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from rlalign_kernels import Backend, write_kv_cache
from torch import Tensor

from rlalign.modeling.inner_attention import InnerAttention


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What a layer asks for, besides its tensors. backend: of its operators."""

    layer: int
    backend: Backend
    scale: float
    window: int | None
    softcap: float | None
    attention: InnerAttention


class AttentionContext(Protocol):
    """One forward's view of the sequences in it."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        """query [T, Hq, D], key [T, Hkv, D], value [T, Hkv, Dv] → [T, Hq, Dv]; causal."""


@dataclass(frozen=True, slots=True)
class PackedContext:
    """Whole sequences, one after another, without padding: the trainer's view.

    cu_seqlens: int32 [B + 1], row at which each sequence starts; the last entry is T. max_seqlen: no sequence is
    longer; None where nobody knows it on the host.
    """

    cu_seqlens: Tensor
    max_seqlen: int | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        return call.attention.packed(
            query,
            key,
            value,
            cu_seqlens_q=self.cu_seqlens,
            cu_seqlens_k=self.cu_seqlens,
            scale=call.scale,
            causal=True,
            window=call.window,
            softcap=call.softcap,
            max_seqlen_q=self.max_seqlen,
            max_seqlen_k=self.max_seqlen,
        )


@dataclass(frozen=True, slots=True)
class PagedContext:
    """New tokens of running sequences against their pages of cache: the engine's view.

    k_caches, v_caches: one [pages, page_size, Hkv, D or Dv] per layer. slot_mapping: int64 [T], flat slot
    (page · page_size + offset) that each new token's key and value are written to. block_tables: int32
    [B, max_pages]. cu_seqlens_q: int32 [B + 1]. kv_lens: int32 [B], length including the new tokens. max_seqlen_*: any
    bounds of new tokens and of kv_lens; None where nobody knows them on the host.
    """

    k_caches: list[Tensor]
    v_caches: list[Tensor]
    slot_mapping: Tensor
    block_tables: Tensor
    cu_seqlens_q: Tensor
    kv_lens: Tensor
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        k_cache, v_cache = self.k_caches[call.layer], self.v_caches[call.layer]
        write_kv_cache(key, value, k_cache, v_cache, slot_mapping=self.slot_mapping, backend=call.backend)
        return call.attention.paged(
            query,
            k_cache,
            v_cache,
            block_tables=self.block_tables,
            cu_seqlens_q=self.cu_seqlens_q,
            kv_lens=self.kv_lens,
            scale=call.scale,
            causal=True,
            window=call.window,
            softcap=call.softcap,
            max_seqlen_q=self.max_seqlen_q,
            max_seqlen_k=self.max_seqlen_k,
        )
