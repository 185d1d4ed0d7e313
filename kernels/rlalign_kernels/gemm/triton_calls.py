"""From the public ``linear`` to the triton backend: what it refuses, and its gradient.

Backward is cuBLAS's: run to run deterministic, accumulated in float32 (reduced-precision sums are off while it runs,
whatever the process has set), no more than that; float32 follows torch's own setting for TF32. Only the gradients that
are needed are computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd.function import once_differentiable
from triton import knobs

from rlalign_kernels.checks import check_dtype
from rlalign_kernels.gemm.chain_plan import chain_plan
from rlalign_kernels.gemm.triton_backend import forward


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, leaves: int) -> torch.Tensor:
    """[M, N] of x [M, K], weight [N, K], bias [N]. Raises ValueError, NotImplementedError naming what can't be."""
    _check(x)
    if leaves != 1:
        chain_plan("linear", leaves, x.shape[-1])
    needed = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if needed and torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias, leaves)
    return _forward(x, weight, bias, leaves)


def _forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, leaves: int) -> torch.Tensor:
    return forward(x, weight, bias if bias is None or bias.stride(0) == 1 else bias.contiguous(), leaves)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, leaves: int) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _forward(x, weight, bias, leaves)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        with float32_sums():
            if ctx.needs_input_grad[0]:
                grad_x = torch.mm(grad, weight)
            if ctx.needs_input_grad[1]:
                grad_weight = torch.mm(grad.t(), x)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0, dtype=torch.float32).to(grad.dtype)
        return grad_x, grad_weight, grad_bias, None


@contextmanager
def float32_sums() -> Iterator[None]:
    """cuBLAS may not add partial sums in bfloat16 or float16."""
    settings = torch.backends.cuda.matmul
    before = {}
    for name in ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"):
        split_k = getattr(settings, f"{name}_split_k")
        before[name] = (getattr(settings, name), split_k)
        setattr(settings, name, (False, split_k))
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(settings, name, value)


def _check(x: torch.Tensor) -> None:
    check_dtype("linear", "triton", x=x)
    if x.device.type == "cuda":
        return
    if not knobs.runtime.interpret:
        raise ValueError(f"linear: x.device={x.device} is not supported with backend='triton'; use a CUDA device")
    if x.dtype == torch.bfloat16:
        raise NotImplementedError(f"linear: x.dtype={x.dtype}: Triton's interpreter takes float32 and float16 only")
