"""RMSNorm: ``y = x / sqrt(mean(x^2) + eps) * (weight_offset + weight)`` over the last axis.

Shapes: x [..., H], weight [H] -> y [..., H]. dtypes: float32 or bfloat16. Statistics are float32: the mean of
squares is a product in the order of linear's plan (``reference/gemm.py``), for H > 32 two of them: sums of 16 segments
of H, then their mean. Add, sqrt, divide and multiply are correctly rounded by IEEE 754. ``cast_before_weight`` rounds
the normalised row to x's dtype before the weight is applied.
Promised: forward, a row's bits depend on that row and the weight only. Backward is deterministic run to run.
"""

from __future__ import annotations

import functools

import torch

from rlalign_kernels.checks import check_dtype, check_same
from rlalign_kernels.dispatch import Backend, Implementations, operator
from rlalign_kernels.reference.elementwise import scalar
from rlalign_kernels.reference.gemm import ROW_TILE, fill_tile, gemm_schedule, product_nt

# Longest sum of squares in one chain of additions.
ONE_CHAIN = 32


@functools.cache
def _mean_weights(size: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Weights of the products, each with 16 rows, the last with all rows alike: BLAS is at its worst on one column.

    Two short chains of additions round less than one of H; up to 32 one is as good.
    """
    if size <= ONE_CHAIN:
        return (torch.full((ROW_TILE, size), 1 / max(size, 1), device=device),)
    segment = torch.arange(size, device=device) * ROW_TILE // size
    member = segment == torch.arange(ROW_TILE, device=device).unsqueeze(1)
    return member.float(), torch.full((ROW_TILE, ROW_TILE), 1 / size, device=device)


def probe_norm(size: int) -> None:
    """Measure the products of rows of ``size`` now rather than at first use."""
    for weight in _mean_weights(size, torch.device("cpu")):
        gemm_schedule(*weight.shape)


def _root(x: torch.Tensor, eps: float) -> torch.Tensor:
    """sqrt(mean square + eps), float32 [..., 1]."""
    size = x.shape[-1]
    squares = (x * x).reshape(-1, size)
    weights = _mean_weights(size, x.device)
    means = fill_tile(squares, weights[0])
    for weight in weights:
        means = product_nt(means, weight)
    return means[: squares.shape[0], :1].add_(scalar(eps, x.device)).sqrt_().view(*x.shape[:-1], 1)


def _scale(weight: torch.Tensor, offset: float) -> torch.Tensor:
    return weight.float() + offset if offset else weight.float()


def _forward(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, cast: bool) -> torch.Tensor:
    wide = x.float()
    normed = wide / _root(wide, eps)
    if not cast or x.dtype == torch.float32:
        return normed.mul_(_scale(weight, offset)).to(x.dtype)
    return normed.to(x.dtype) * (weight + offset if offset else weight)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, cast: bool) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.offset = eps, offset
        return _forward(x, weight, eps, offset, cast)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wide, grad = x.float(), grad.float()
        inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(ctx.eps))
        normed = wide * inverse
        scaled = grad * _scale(weight, ctx.offset)
        mean = (scaled * normed).mean(-1, keepdim=True)
        grad_x = (scaled - normed * mean).mul_(inverse).to(x.dtype)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        return grad_x, grad_weight, None, None, None


def _reference(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, cast: bool) -> torch.Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RmsNorm.apply(x, weight, eps, offset, cast)
    return _forward(x, weight, eps, offset, cast)


def _native(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, cast: bool) -> torch.Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if cast:
        return normed.to(x.dtype) * (weight + offset if offset else weight)
    return (normed * _scale(weight, offset)).to(x.dtype)


_IMPLEMENTATIONS = Implementations("rms_norm", reference=_reference, native=_native)


@operator
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_weight: bool = True,
    backend: Backend,
) -> torch.Tensor:
    """RMSNorm over the last axis; Llama (0, True), Gemma (1, False) and OLMo-2 (0, False) forms.

    x [..., H], weight [H]. Raises ValueError for shapes or dtypes that do not fit, or eps < 0.
    """
    run = _IMPLEMENTATIONS[backend]
    check_dtype("rms_norm", x=x)
    check_same("rms_norm", x, weight=weight)
    if x.dim() < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight has shape {tuple(weight.shape)}, x {tuple(x.shape)}; expected weight [H]")
    if not eps >= 0:
        raise ValueError(f"rms_norm: eps={eps} is not supported; it must be >= 0")
    return run(x, weight, eps, weight_offset, cast_before_weight)
