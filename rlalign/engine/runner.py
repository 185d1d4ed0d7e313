"""Runs the policy over one step's rows, on page caches that it owns."""

from __future__ import annotations

import torch
from torch import Tensor

from rlalign.engine.batch_inputs import ForwardInputs
from rlalign.modeling import PagedContext, Policy


class Runner:
    """The policy with a paged KV cache: one [pages, page_size, Hkv, D] pair of tensors per layer."""

    def __init__(self, policy: Policy, num_pages: int, page_size: int) -> None:
        self.policy = policy
        pages = (num_pages, page_size)
        options = {"dtype": policy.dtype, "device": policy.device}
        self.k_caches = [torch.zeros(*pages, kv.num_kv_heads, kv.head_dim, **options) for kv in policy.kv_layout]
        self.v_caches = [torch.zeros(*pages, kv.num_kv_heads, kv.value_dim, **options) for kv in policy.kv_layout]

    @torch.no_grad()
    def forward(self, inputs: ForwardInputs) -> Tensor:
        """Hidden states [N, H] of the rows that draw; new keys and values go to their slots."""
        self._copy_pages(inputs.page_copies)
        context = PagedContext(
            k_caches=self.k_caches,
            v_caches=self.v_caches,
            slot_mapping=inputs.slot_mapping,
            block_tables=inputs.block_tables,
            cu_seqlens_q=inputs.cu_seqlens_q,
            kv_lens=inputs.kv_lens,
            max_seqlen_q=inputs.max_seqlen_q,
            max_seqlen_k=inputs.max_seqlen_k,
        )
        hidden = self.policy.hidden(inputs.token_ids, inputs.position_ids, context)
        return hidden.index_select(0, inputs.drawn_rows)

    def _copy_pages(self, copies: Tensor) -> None:
        """Copy whole pages; every source is read before any destination is written."""
        if copies.shape[1] == 0:
            return
        sources, destinations = copies
        for cache in (*self.k_caches, *self.v_caches):
            cache.index_copy_(0, destinations, cache.index_select(0, sources))
