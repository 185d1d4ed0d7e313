"""From the public activations to their kernels: launches kept by shape, and the autograd function around both."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch.autograd.function import once_differentiable

from rlalign_kernels.elementwise.layout import Rows, as_rows, made_contiguous, stride_of
from rlalign_kernels.elementwise.triton_activation import activation_backward_kernel, activation_forward_kernel
from rlalign_kernels.elementwise.triton_rows import check_device
from rlalign_kernels.launch import Launch

# Elements of a program.
_BLOCK = 2048
_NONE = (0, 0, 0)
KINDS = {"silu": 0, "gelu none": 1, "gelu tanh": 2}


def activation(operator: str, kind: str, x: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    """``kind(x)``, times ``up`` where there is one."""
    check_device(operator, x)
    if torch.is_grad_enabled() and (x.requires_grad or (up is not None and up.requires_grad)):
        return _Activation.apply(x, up, KINDS[kind])
    return forward(x, up, KINDS[kind])


def forward(
    x: torch.Tensor, up: torch.Tensor | None, kind: int, *, block: int = _BLOCK, num_warps: int = 4
) -> torch.Tensor:
    """``block``, ``num_warps``: a schedule."""
    launch, copy = _forward_launch(x.shape, x.stride(), stride_of(up), x.dtype, kind, block, num_warps)
    if copy:
        x, up = made_contiguous(x, up)
    out = x.new_empty(x.shape)
    if launch is not None:
        launch(x, up, out)
    return out


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    up: torch.Tensor | None,
    kind: int,
    *,
    need_x: bool = True,
    need_up: bool = False,
    block: int = _BLOCK,
    num_warps: int = 4,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of x and up, None for what is not needed."""
    launch, copy = _backward_launch(
        x.shape, grad.stride(), x.stride(), stride_of(up), x.dtype, kind, need_x, need_up, block, num_warps
    )
    if copy:
        grad, x, up = made_contiguous(grad, x, up)
    dx, dup = (x.new_empty(x.shape) if need else None for need in (need_x, need_up))
    if launch is not None:
        launch(grad, x, up, dx, dup)
    return dx, dup


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, up: torch.Tensor | None, kind: int) -> torch.Tensor:
        ctx.save_for_backward(x, up)
        ctx.kind = kind
        return forward(x, up, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        need_x, need_up, _ = ctx.needs_input_grad
        return *backward(grad, *ctx.saved_tensors, ctx.kind, need_x=need_x, need_up=need_up), None


def _tile(rows: Rows, block: int) -> tuple[int, dict[str, int]]:
    """Number of programs, and rows x columns of each."""
    block_c = min(block, triton.next_power_of_2(rows.num_columns))
    block_r = min(block // block_c, triton.next_power_of_2(rows.num_rows))
    programs = triton.cdiv(rows.num_rows, block_r) * triton.cdiv(rows.num_columns, block_c)
    return programs, {"BLOCK_R": block_r, "BLOCK_C": block_c}


@lru_cache(4096)
def _forward_launch(
    shape: torch.Size,
    stride_x: tuple[int, ...],
    stride_u: tuple[int, ...] | None,
    dtype: torch.dtype,
    kind: int,
    block: int,
    num_warps: int,
) -> tuple[Launch | None, bool]:
    """None where there is nothing to do, and whether the inputs must be made contiguous."""
    rows, copy = as_rows(shape, stride_x, stride_u, keep_last=False)
    if 0 in shape:
        return None, False
    programs, tile = _tile(rows, block)
    x, up = (*rows.strides, _NONE)[:2]
    launch = Launch(
        activation_forward_kernel, (programs,), (rows.num_rows, rows.inner, rows.num_columns, *x, *up),
        KIND=kind, GATED=stride_u is not None, PRECISE=dtype == torch.float32, **tile, num_warps=num_warps,
        enable_fp_fusion=False,
    )  # fmt: skip
    return launch, copy


@lru_cache(4096)
def _backward_launch(
    shape: torch.Size,
    stride_g: tuple[int, ...],
    stride_x: tuple[int, ...],
    stride_u: tuple[int, ...] | None,
    dtype: torch.dtype,
    kind: int,
    need_x: bool,
    need_up: bool,
    block: int,
    num_warps: int,
) -> tuple[Launch | None, bool]:
    rows, copy = as_rows(shape, stride_g, stride_x, stride_u, keep_last=False)
    if 0 in shape:
        return None, False
    programs, tile = _tile(rows, block)
    grad, x, up = (*rows.strides, _NONE)[:3]
    launch = Launch(
        activation_backward_kernel, (programs,), (rows.num_rows, rows.inner, rows.num_columns, *grad, *x, *up),
        KIND=kind, GATED=stride_u is not None, PRECISE=dtype == torch.float32, NEED_X=need_x, NEED_UP=need_up,
        **tile, num_warps=num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return launch, copy
