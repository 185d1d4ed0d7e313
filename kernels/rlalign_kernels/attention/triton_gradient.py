"""Attention's gradient on the "triton" backend, and the autograd function around both directions."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch.autograd.function import once_differentiable

from rlalign_kernels.attention import schedules
from rlalign_kernels.attention.schedules import Shape, Tile
from rlalign_kernels.attention.tile_plan import padded
from rlalign_kernels.attention.triton_backend import Forward
from rlalign_kernels.attention.triton_backward import (
    attention_delta_kernel,
    attention_dkv_kernel,
    attention_dq_kernel,
    attention_sink_kernel,
)
from rlalign_kernels.attention.triton_problem import Keys, Masking, integers, layout, shape_of, workspace
from rlalign_kernels.gpu import num_processors, rows
from rlalign_kernels.launch import Launch, Remembered


class PackedAttention(torch.autograd.Function):
    """out and lse; lse carries no gradient."""

    @staticmethod
    def forward(
        ctx,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        masking: Masking,
        call: Forward,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = call(q, Keys(k, v, cu_seqlens_k), cu_seqlens_q, sinks)
        ctx.save_for_backward(q, k, v, sinks, out, lse, cu_seqlens_q, cu_seqlens_k)
        ctx.masking = masking
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor, _grad_lse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        need_q, need_k, need_v, need_sinks = ctx.needs_input_grad[:4]
        grads = backward(
            *ctx.saved_tensors, grad, ctx.masking, need_q=need_q, need_kv=need_k or need_v, need_sinks=need_sinks
        )
        return *grads, None, None, None, None


def backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    grad: torch.Tensor,
    masking: Masking,
    *,
    need_q: bool = True,
    need_kv: bool = True,
    need_sinks: bool = False,
    tiles: tuple[Tile, Tile] | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of q, k, v and sinks, None for what is not needed. ``tiles``: for dQ and for dK, dV."""
    q, k, v, grad = (rows(x) for x in (q, k, v, grad))
    key = (
        layout(q), layout(k), layout(v), layout(out), layout(grad), integers(cu_seqlens_q), integers(cu_seqlens_k),
        sinks if sinks is None else layout(sinks), masking, tiles,
    )  # fmt: skip
    call = _CALLS.get(key)
    if call is None:
        call = _CALLS[key] = _Backward(q, k, v, sinks, out, grad, cu_seqlens_q.shape[0] - 1, masking, tiles)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device) if need_q else None
    dk = torch.zeros(k.shape, dtype=k.dtype, device=k.device) if need_kv else None
    dv = torch.zeros(v.shape, dtype=v.dtype, device=v.device) if need_kv else None
    dsinks = None if sinks is None or not need_sinks else torch.zeros(sinks.shape, device=q.device)
    if call.has_rows:
        call(q, k, v, sinks, out, lse, grad, dq, dk, dv, dsinks, cu_seqlens_q, cu_seqlens_k)
    return dq, dk, dv, None if dsinks is None else dsinks.to(sinks.dtype)


class _Backward:
    """What is launched for gradients of one layout. Holds no tensor."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        out: torch.Tensor,
        grad: torch.Tensor,
        num_sequences: int,
        masking: Masking,
        tiles: tuple[Tile, Tile] | None,
    ) -> None:
        self.has_rows = num_sequences > 0 and q.numel() > 0
        if not self.has_rows:
            return
        self.has_keys = k.numel() > 0
        shape, (num_tokens, num_heads, _) = shape_of(q, k, v), q.shape
        strides = (out.stride(0), out.stride(1), grad.stride(0), grad.stride(1))
        self.delta = Launch(
            attention_delta_kernel, (triton.cdiv(num_tokens * num_heads, 32),), (num_tokens * num_heads, *strides),
            HEADS=num_heads, VALUE_DIM=shape.value_dim, BLOCK_M=32, BLOCK_DV=padded(shape.value_dim),
        )  # fmt: skip
        self.sinks = Launch(attention_sink_kernel, (num_heads,), (num_tokens,), HEADS=num_heads, BLOCK_T=1024)
        self.hopper = None if tiles else _hopper(q, k, v, grad, strides, num_sequences, masking, shape)
        if self.hopper is None:
            self._stock(q, k, v, grad, num_sequences, masking, shape, tiles)

    def _stock(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        grad: torch.Tensor,
        num_sequences: int,
        masking: Masking,
        shape: Shape,
        tiles: tuple[Tile, Tile] | None,
    ) -> None:
        of_q, of_keys = tiles or (schedules.dq_tile(shape), schedules.dkv_tile(shape))
        kv_heads = k.shape[1]
        numbers = (
            masking.scale, masking.multiplier, masking.cap_scale, masking.left or 0, masking.right or 0, num_sequences,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), grad.stride(0),
            grad.stride(1),
        )  # fmt: skip
        constants = dict(
            GROUP=shape.group, KV_HEADS=kv_heads, HEAD_DIM=shape.head_dim, VALUE_DIM=shape.value_dim,
            BLOCK_D=padded(shape.head_dim), BLOCK_DV=padded(shape.value_dim), HAS_LEFT=masking.left is not None,
            HAS_RIGHT=masking.right is not None, HAS_CAP=masking.softcap is not None, PRECISION="ieee",
        )  # fmt: skip
        num_tiles = q.shape[0] * shape.group // of_q.block_m + num_sequences
        dq_strides = (q.shape[1] * shape.head_dim, shape.head_dim)
        self.dq = Launch(
            attention_dq_kernel, (num_tiles * kv_heads,), (*numbers, *dq_strides), **constants, **_launch(of_q)
        )  # fmt: skip
        num_tiles = k.shape[0] // of_keys.block_n + num_sequences
        self.dkv = Launch(attention_dkv_kernel, (num_tiles * kv_heads,), numbers, **constants, **_launch(of_keys))

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        out: torch.Tensor,
        lse: torch.Tensor,
        grad: torch.Tensor,
        dq: torch.Tensor | None,
        dk: torch.Tensor | None,
        dv: torch.Tensor | None,
        dsinks: torch.Tensor | None,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
    ) -> None:
        """Fills dq, dk, dv and dsinks where they are wanted; all but dq come as zeros."""
        if self.hopper is not None:
            _, counter = workspace(q.device, 0, 1)
            self.hopper(q, k, v, out, lse, grad, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, counter)
            if dsinks is None:
                return
        delta = torch.empty_like(lse)
        self.delta(out, grad, delta)
        if dsinks is not None:
            self.sinks(sinks, lse, delta, dsinks)
        if self.hopper is not None:
            return
        if dq is not None:
            self.dq(q, k, v, grad, lse, delta, dq, cu_seqlens_q, cu_seqlens_k)
        if dk is not None and self.has_keys:
            self.dkv(q, k, v, grad, lse, delta, dk, dv, cu_seqlens_q, cu_seqlens_k)


def _hopper(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    grad: torch.Tensor,
    strides: tuple[int, int, int, int],
    num_sequences: int,
    masking: Masking,
    shape: Shape,
) -> Callable[..., None] | None:
    """Hopper's kernels, where they take the call."""
    tiles = schedules.hopper_backward_tiles(shape, masking.softcap is not None)
    if tiles is None:
        return None
    from rlalign_kernels.attention import hopper_backend

    if not hopper_backend.in_boxes(q, k, v, grad):
        return None
    return hopper_backend.Backward(
        shape, tiles, masking, strides, num_tokens=q.shape[0], num_keys=k.shape[0], num_sequences=num_sequences,
        kv_heads=k.shape[1], num_programs=num_processors(q.device),
    )  # fmt: skip


def _launch(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "STAGES": tile.num_stages, "num_warps": tile.num_warps,
    }  # fmt: skip


_CALLS: Remembered[_Backward] = Remembered()
