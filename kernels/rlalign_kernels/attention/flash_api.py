"""FlashAttention's variable-length call over our operators: a drop-in for code written against its versions 2 and 3.

Arguments and their order are FlashAttention 2's; version 3's names are keyword-only aliases. Bits are those of
``attention_packed`` and ``attention_paged`` with backend "triton". What they can't do is refused by name.
"""

from __future__ import annotations

import math
from functools import lru_cache
from numbers import Integral, Real

import torch

from rlalign_kernels.attention.packed import attention_packed
from rlalign_kernels.attention.paged import attention_paged
from rlalign_kernels.attention.shared import check_offsets, refuse_what_is_no_tensor


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    *,
    page_table: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | None = None,
    return_softmax_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, None] | tuple[torch.Tensor, torch.Tensor]:
    """out [T, Hq, Dv] of q [T, Hq, D], and k [S, Hkv, D], v [S, Hkv, Dv] or, with a page table, their caches.

    Caches are [pages, page, Hkv, D]; ``seqused_k`` (``cache_seqlens``) int32 [B] then counts a sequence's keys, and
    ``cu_seqlens_k`` does where it is absent. ``softmax_scale`` None is 1 / sqrt(D). ``window_size`` (left, right) is
    in neighbours, -1 or None being all; bottom-right aligned; with ``causal`` right is 0. ``deterministic`` is always
    true. ``softmax_scale`` is above 0. A ``max_seqlen`` that is a tensor is read, which waits for its device.

    With ``return_attn_probs`` (out, lse, None), as version 2 returns without dropout; with ``return_softmax_lse``
    (out, lse). lse is natural, float32 [Hq, T], -inf for a row that sees no key, and carries no gradient.
    Raises ValueError or NotImplementedError naming the argument that is not supported.
    """
    if not isinstance(dropout_p, Real) or dropout_p != 0.0:
        raise NotImplementedError(f"flash_attn_varlen_func: dropout_p={dropout_p!r} is not supported; use 0")
    if alibi_slopes is not None:
        raise NotImplementedError("flash_attn_varlen_func: alibi_slopes are not supported; use None")
    causal, window = _window(causal, window_size)
    settings = {
        "scale": _scale(q, softmax_scale),
        "causal": causal,
        "window": window,
        "softcap": None if isinstance(softcap, Real) and softcap == 0 else softcap,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "return_lse": return_attn_probs or return_softmax_lse,
        "backend": "triton",
    }
    pages = _either("block_table", block_table, "page_table", page_table)
    used = _either("seqused_k", seqused_k, "cache_seqlens", cache_seqlens)
    if pages is None:
        if used is not None:
            raise NotImplementedError("flash_attn_varlen_func: seqused_k without a block_table is not supported")
        if cu_seqlens_k is None:
            raise ValueError("flash_attn_varlen_func: cu_seqlens_k=None needs a block_table and seqused_k")
        found = attention_packed(q, k, v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **settings)
    else:
        if used is None:
            if cu_seqlens_k is None:
                raise ValueError("flash_attn_varlen_func: a block_table needs seqused_k or cu_seqlens_k")
            used = _lengths(cu_seqlens_q, cu_seqlens_k)
        found = attention_paged(q, k, v, block_tables=pages, cu_seqlens_q=cu_seqlens_q, kv_lens=used, **settings)
    if not settings["return_lse"]:
        return found
    out, lse = found
    return (out, lse.t(), None) if return_attn_probs else (out, lse.t())


def _scale(q: torch.Tensor, softmax_scale: float | None) -> float:
    if softmax_scale is None:
        refuse_what_is_no_tensor("flash_attn_varlen_func", q=q)
        return max(1, q.shape[-1]) ** -0.5  # a head_dim of 0 is refused further down
    if not isinstance(softmax_scale, Real) or not 0 < softmax_scale < math.inf:
        raise ValueError(
            f"flash_attn_varlen_func: softmax_scale={softmax_scale!r} is not supported; use None or a finite number > 0"
        )
    return softmax_scale


def _window(causal: bool, window_size: tuple[int | None, int | None] | None) -> tuple[bool, int | None]:
    """(causal, window) as our operators count: a window holds the key at the query's own position too."""
    if causal is not True and causal is not False:
        raise ValueError(f"flash_attn_varlen_func: causal={causal!r} is not supported; use True or False")
    try:
        return _sides(causal, *((-1, -1) if window_size is None else window_size))
    except TypeError:  # not a pair, or not of numbers
        raise ValueError(f"flash_attn_varlen_func: window_size={window_size!r} is not a pair (left, right)") from None


@lru_cache(64, typed=True)
def _sides(causal: bool, left: int | None, right: int | None) -> tuple[bool, int | None]:
    for side in (left, right):
        if side is not None and (not isinstance(side, Integral) or isinstance(side, bool) or side < -1):
            raise ValueError(
                f"flash_attn_varlen_func: window_size={left, right}: a side is None, -1 or an integer from 0 on"
            )
    ahead = 0 if causal else right  # as FlashAttention has it: transformers passes the same width for both sides
    if ahead not in (None, -1, 0):
        raise NotImplementedError(f"flash_attn_varlen_func: window_size={left, right}: its right side is -1 or 0")
    return ahead == 0, None if left in (None, -1) else int(left) + 1


def _lengths(cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor) -> torch.Tensor:
    """Int [B] of offsets [B + 1], which are refused under the name that they have here."""
    refuse_what_is_no_tensor("flash_attn_varlen_func", cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_offsets("flash_attn_varlen_func", "cu_seqlens_k", cu_seqlens_k)
    if cu_seqlens_k.shape != cu_seqlens_q.shape or cu_seqlens_k.device != cu_seqlens_q.device:
        raise ValueError(
            f"flash_attn_varlen_func: cu_seqlens_k {tuple(cu_seqlens_k.shape)} on {cu_seqlens_k.device} does not fit "
            f"cu_seqlens_q {tuple(cu_seqlens_q.shape)} on {cu_seqlens_q.device}"
        )
    return cu_seqlens_k.diff()


def _either(name: str, value: torch.Tensor | None, alias: str, aliased: torch.Tensor | None) -> torch.Tensor | None:
    if value is not None and aliased is not None:
        raise ValueError(f"flash_attn_varlen_func: {name} and {alias} are two names of one argument; give one")
    return value if aliased is None else aliased
