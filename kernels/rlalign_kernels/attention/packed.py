"""Attention over packed sequences, with its gradient."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from rlalign_kernels.attention.shared import check_problem, host_offsets, layout_of, refuse_what_is_no_tensor
from rlalign_kernels.content import cached, content
from rlalign_kernels.dispatch import Backend, Implementations, running, without_autocast
from rlalign_kernels.native import attention as native
from rlalign_kernels.reference import attention as reference
from rlalign_kernels.reference.attention_backward import Saved, Settings, backward
from rlalign_kernels.reference.attention_layout import packed_problem


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: np.ndarray,
    cu_k: np.ndarray,
    settings: Settings,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    layout = layout_of(
        ("packed layout", cu_q.tobytes(), cu_k.tobytes()),
        lambda: packed_problem(cu_q, cu_k),
        q,
        k.shape[1],
        v.shape[2],
        settings.causal,
        settings.window,
    )
    return reference.forward(
        q,
        k,
        v,
        layout,
        scale=settings.scale,
        softcap=settings.softcap,
        key_mask=settings.key_mask,
        return_lse=return_lse,
    )


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_q: np.ndarray,
        cu_k: np.ndarray,
        settings: Settings,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide, lse = _forward(q, k, v, cu_q, cu_k, settings, True)
        out = wide.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.cu_q, ctx.cu_k, ctx.settings = cu_q, cu_k, settings
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: torch.Tensor, _grad_lse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        saved = Saved(*(x.float() for x in (q, k, v, out, lse, grad_out)))
        grads = backward(saved, ctx.cu_q, ctx.cu_k, ctx.settings)
        return *(grad.to(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True)), None, None, None


class Offsets(NamedTuple):
    """Cumulative lengths [B + 1] as given, and on the host for the backends that lay out batches there."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    num_queries: int
    num_keys: int
    max_seqlen_q: int | None
    max_seqlen_k: int | None

    def host(self) -> tuple[np.ndarray, np.ndarray]:
        """int64, validated. Waits for the device that holds them."""
        key = ("packed", self.num_queries, self.num_keys, *content(self.cu_seqlens_q, self.cu_seqlens_k))
        return cached(key, lambda: _host_offsets(self.cu_seqlens_q, self.cu_seqlens_k, self.num_queries, self.num_keys))


@without_autocast
def _reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: Offsets, settings: Settings, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    check_problem("attention_packed", q, k, v, settings, "reference", offsets[-2:])
    cu_q, cu_k = offsets.host()
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Packed.apply(q, k, v, cu_q, cu_k, settings)
    out, lse = _forward(q, k, v, cu_q, cu_k, settings, return_lse)
    return out.to(q.dtype), lse


def _native(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: Offsets, settings: Settings, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    check_problem("attention_packed", q, k, v, settings, "native", offsets[-2:])
    cu_q, cu_k = offsets.host()

    def batch() -> native.Batch:
        return native.Batch(cu_q, [np.arange(cu_k[b], cu_k[b + 1]) for b in range(len(cu_k) - 1)], q.device)

    found = cached(("native packed", q.device, cu_q.tobytes(), cu_k.tobytes()), batch)
    return native.attend(q, k, v, found, settings, return_lse)


def _triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: Offsets, settings: Settings, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    from rlalign_kernels.attention import triton_calls  # triton may be missing where nobody asks for it

    _IMPLEMENTATIONS.by_backend["triton"] = triton_calls.packed  # later calls need not ask for it again
    return triton_calls.packed(q, k, v, offsets, settings, return_lse)


_IMPLEMENTATIONS = Implementations("attention_packed", reference=_reference, native=_native, triton=_triton)


def attention_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    key_mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    backend: Backend,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """out [T, Hq, Dv] of q [T, Hq, D], k [S, Hkv, D], v [S, Hkv, Dv]; with ``return_lse`` also lse float32 [T, Hq].

    cu_seqlens_q, cu_seqlens_k: int [B + 1]. ``window``: a query at position i sees keys j with i - j < window.
    ``key_mask`` bool [S]: False hides a key; its position counts. ``sinks`` [Hq]: a logit per head that takes its share
    of every row and has no value; triton. lse is natural, -inf (with sinks: the sink) where no key is seen, and carries
    no gradient.
    ``max_seqlen_*``: no sequence is longer; saves the triton backend work, changes nothing else. That backend reads
    no offset on the host: cu_seqlens_q must end at T and cu_seqlens_k at S.
    Raises ValueError or NotImplementedError naming what does not fit.
    """
    run = _IMPLEMENTATIONS[backend]
    running.append("attention_packed")  # what @operator does, without packing the keywords twice
    try:
        offsets = Offsets(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0], max_seqlen_q, max_seqlen_k)
        out, lse = run(q, k, v, offsets, Settings(scale, causal, window, softcap, key_mask, sinks), return_lse)
    except AttributeError:
        refuse_what_is_no_tensor(
            "attention_packed", q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            key_mask=key_mask, sinks=sinks,
        )  # fmt: skip
        raise
    finally:
        running.pop()
    return (out, lse) if return_lse else out


def _host_offsets(
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, num_queries: int, num_keys: int
) -> tuple[np.ndarray, np.ndarray]:
    cu_q = host_offsets("attention_packed", "cu_seqlens_q", cu_seqlens_q, num_queries)
    cu_k = host_offsets("attention_packed", "cu_seqlens_k", cu_seqlens_k, num_keys)
    if len(cu_q) != len(cu_k):
        raise ValueError(f"attention_packed: cu_seqlens_q and cu_seqlens_k differ in length: {len(cu_q)}, {len(cu_k)}")
    return cu_q, cu_k
