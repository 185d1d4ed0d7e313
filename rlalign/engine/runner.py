"""Runs the policy over one step's rows, on page caches that it owns."""

from __future__ import annotations

import torch
from torch import Tensor

from rlalign.engine.batch_inputs import ForwardInputs
from rlalign.modeling import PagedContext, Policy


class Runner:
    """The policy with a paged KV cache: one [pages, page_size, Hkv, D] pair of tensors per layer."""

    def __init__(self, policy: Policy, num_pages: int, page_size: int) -> None:
        """``num_pages``: those of the pool, and any that are nobody's."""
        self.policy = policy
        self.page_size = page_size
        pages = (num_pages, page_size)
        options = {"dtype": policy.dtype, "device": policy.device}
        self.k_caches = [torch.zeros(*pages, kv.num_kv_heads, kv.head_dim, **options) for kv in policy.kv_layout]
        self.v_caches = [torch.zeros(*pages, kv.num_kv_heads, kv.value_dim, **options) for kv in policy.kv_layout]

    @torch.no_grad()
    def forward(self, inputs: ForwardInputs) -> Tensor:
        """Hidden states [N, H] of the rows that draw; new keys and values go to their slots."""
        self.copy_pages(inputs.page_copies)
        return self.all_rows(inputs).index_select(0, inputs.drawn_rows)

    @torch.no_grad()
    def all_rows(self, inputs: ForwardInputs) -> Tensor:
        """Hidden states [T, H] of every row; ``page_copies`` and ``drawn_rows`` are not looked at."""
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
        return self.policy.hidden(inputs.token_ids, inputs.position_ids, context)

    @torch.no_grad()
    def copy_pages(self, copies: Tensor) -> None:
        """Copy whole pages, int64 [2, copies]; every source is read before any destination is written."""
        if copies.shape[1] == 0:
            return
        sources, destinations = copies
        for cache in (*self.k_caches, *self.v_caches):
            cache.index_copy_(0, destinations, cache.index_select(0, sources))
