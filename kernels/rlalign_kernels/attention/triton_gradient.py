"""Attention's gradient on the "triton" backend, and the autograd function around both directions."""

from __future__ import annotations

import torch
import triton

from rlalign_kernels.attention import schedules
from rlalign_kernels.attention.schedules import Shape, Tile
from rlalign_kernels.attention.tile_plan import padded
from rlalign_kernels.attention.triton_backend import forward
from rlalign_kernels.attention.triton_backward import (
    attention_delta_kernel,
    attention_dkv_kernel,
    attention_dq_kernel,
    attention_sink_kernel,
)
from rlalign_kernels.attention.triton_problem import Keys, Masking, num_processors, rows, shape_of, workspace


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
        max_seqlen_q: int | None,
        max_seqlen_k: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys = Keys(k, v, cu_seqlens=cu_seqlens_k, max_seqlen=max_seqlen_k)
        out, lse = forward(q, keys, cu_seqlens_q, masking, sinks=sinks, max_seqlen_q=max_seqlen_q, return_lse=True)
        ctx.save_for_backward(q, k, v, sinks, out, lse, cu_seqlens_q, cu_seqlens_k)
        ctx.masking = masking
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad: torch.Tensor, _grad_lse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        need_q, need_k, need_v, need_sinks = ctx.needs_input_grad[:4]
        grads = backward(
            *ctx.saved_tensors, grad, ctx.masking, need_q=need_q, need_kv=need_k or need_v, need_sinks=need_sinks
        )
        return *grads, None, None, None, None, None


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
    shape = shape_of(q, k, v)
    kv_heads, num_sequences = k.shape[1], cu_seqlens_q.shape[0] - 1
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device) if need_q else None
    dk = torch.zeros(k.shape, dtype=k.dtype, device=k.device) if need_kv else None
    dv = torch.zeros(v.shape, dtype=v.dtype, device=v.device) if need_kv else None
    dsinks = None if sinks is None or not need_sinks else torch.zeros(sinks.shape, device=q.device)
    if num_sequences == 0 or q.numel() == 0:
        return dq, dk, dv, dsinks if dsinks is None else dsinks.to(sinks.dtype)
    on_hopper = tiles is None and _backward_on_hopper(
        q, k, v, out, lse, grad, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, masking, shape
    )
    if on_hopper and dsinks is None:
        return dq, dk, dv, None
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    block_d, block_dv = padded(shape.head_dim), padded(shape.value_dim)
    num_rows = lse.numel()
    attention_delta_kernel[(triton.cdiv(num_rows, 32),)](
        out, grad, delta, num_rows, out.stride(0), out.stride(1), grad.stride(0), grad.stride(1),
        HEADS=q.shape[1], VALUE_DIM=shape.value_dim, BLOCK_M=32, BLOCK_DV=block_dv,
    )  # fmt: skip
    if dsinks is not None:
        attention_sink_kernel[(q.shape[1],)](sinks, lse, delta, dsinks, q.shape[0], HEADS=q.shape[1], BLOCK_T=1024)
        dsinks = dsinks.to(sinks.dtype)
    if on_hopper:
        return dq, dk, dv, dsinks
    dq_tile, dkv_tile = tiles or (schedules.dq_tile(shape), schedules.dkv_tile(shape))
    constants = dict(
        GROUP=shape.group, KV_HEADS=kv_heads, HEAD_DIM=shape.head_dim, VALUE_DIM=shape.value_dim, BLOCK_D=block_d,
        BLOCK_DV=block_dv, HAS_LEFT=masking.left is not None, HAS_RIGHT=masking.right is not None,
        HAS_CAP=masking.softcap is not None, PRECISION="ieee",
    )  # fmt: skip
    numbers = (
        masking.scale, masking.multiplier, masking.cap_scale, masking.left or 0, masking.right or 0, num_sequences
    )  # fmt: skip
    strides = (
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), grad.stride(0), grad.stride(1)
    )  # fmt: skip
    if dq is not None:
        grid = ((q.shape[0] * shape.group // dq_tile.block_m + num_sequences) * kv_heads,)
        attention_dq_kernel[grid](
            q, k, v, grad, lse, delta, dq, cu_seqlens_q, cu_seqlens_k, *numbers, *strides, dq.stride(0), dq.stride(1),
            **constants, **_launch(dq_tile),
        )  # fmt: skip
    if dk is not None and k.numel():
        grid = ((k.shape[0] // dkv_tile.block_n + num_sequences) * kv_heads,)
        attention_dkv_kernel[grid](
            q, k, v, grad, lse, delta, dk, dv, cu_seqlens_q, cu_seqlens_k, *numbers, *strides,
            **constants, **_launch(dkv_tile),
        )  # fmt: skip
    return dq, dk, dv, dsinks


def _backward_on_hopper(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    masking: Masking,
    shape: Shape,
) -> bool:
    """Whether Hopper's kernels took the call, and filled dq, dk and dv."""
    tiles = schedules.hopper_backward_tiles(shape, masking.softcap is not None)
    if tiles is None:
        return False
    from rlalign_kernels.attention import hopper_backend

    if not hopper_backend.in_boxes(q, k, v, grad):
        return False
    _, counter = workspace(q.device, 0, 1)
    hopper_backend.backward(
        q, k, v, out, lse, grad, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, counter, tiles, num_processors(q.device),
        scale=masking.scale, left=masking.left, right=masking.right,
    )  # fmt: skip
    return True


def _launch(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "STAGES": tile.num_stages, "num_warps": tile.num_warps,
    }  # fmt: skip
