"""RMSNorm: ``y = x / sqrt(mean(x^2) + eps) * (weight_offset + weight)`` over the last axis.

Shapes: x [..., H], weight [H] -> y [..., H]. dtypes: float32, bfloat16 and, but for reference, float16. Statistics are
float32.
On a CPU the mean of squares is a product in the order of linear's plan (``reference/gemm.py``), for H > 32 two of them:
sums of 16 segments of H, then their mean; the triton backend adds in the order of ``elementwise/row_plan.py``. Add,
sqrt, divide and multiply are correctly rounded by IEEE 754. ``cast_before_weight`` rounds the normalised row to x's
dtype before the weight is applied.
Promised: forward, a row's bits depend on that row and the weight only. Backward is deterministic run to run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

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


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    """[rows, H] of [..., H], of which -1 can't be inferred where there are no elements."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def row_means(x: torch.Tensor) -> torch.Tensor:
    """Means over the last axis, float32 [rows, 1] of float32 [..., H], which is not kept."""
    rows = as_matrix(x)
    weights = _mean_weights(rows.shape[1], x.device)
    means = fill_tile(rows, weights[0])
    for weight in weights:
        means = product_nt(means, weight)
    return means[: rows.shape[0], :1]


def row_roots(x: torch.Tensor, eps: float) -> torch.Tensor:
    """sqrt(mean square + eps), float32 [..., 1]."""
    return row_means(x * x).add_(scalar(eps, x.device)).sqrt_().view(*x.shape[:-1], 1)


def _scale(weight: torch.Tensor, offset: float) -> torch.Tensor:
    return weight.float() + offset if offset else weight.float()


def _forward(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, cast: bool) -> torch.Tensor:
    wide = x.float()
    normed = wide / row_roots(wide, eps)
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
    @once_differentiable
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
            grad_weight = as_matrix(grad * normed).sum(0).to(weight.dtype)
        return grad_x, grad_weight, None, None, None


def after_adding(norm: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """``norm(x + residual, ...)`` and the sum, rounded to their dtype, where there is a residual."""

    @functools.wraps(norm)
    def run(x: torch.Tensor, residual: torch.Tensor | None, *rest: Any) -> Any:
        if residual is None:
            return norm(x, *rest)
        total = x + residual
        return norm(total, *rest), total

    return run


@after_adding
def _reference(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, cast: bool) -> torch.Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RmsNorm.apply(x, weight, eps, offset, cast)
    return _forward(x, weight, eps, offset, cast)


@after_adding
def _native(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, cast: bool) -> torch.Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if cast:
        return normed.to(x.dtype) * (weight + offset if offset else weight)
    return (normed * _scale(weight, offset)).to(x.dtype)


def _triton(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, offset: float, cast: bool
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    from rlalign_kernels.elementwise import triton_norm_calls  # triton may be missing where nobody asks for it

    settings = triton_norm_calls.norm_settings("rms_norm", float(eps), float(offset), cast)
    return triton_norm_calls.norm(x, residual, weight, None, settings)


_IMPLEMENTATIONS = Implementations("rms_norm", reference=_reference, native=_native, triton=_triton)


@operator
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    weight_offset: float = 0.0,
    cast_before_weight: bool = True,
    residual: torch.Tensor | None = None,
    backend: Backend,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm over the last axis; Llama (0, True), Gemma (1, False) and OLMo-2 (0, False) forms.

    x [..., H], weight [H]. With ``residual`` [..., H], the pair of the norm of x + residual, rounded to their dtype,
    and that sum. Raises ValueError for shapes or dtypes that do not fit, or eps < 0.
    An element errs by at most 2^-19 of itself; in 16 bits by two units in its last place more.
    """
    run = _IMPLEMENTATIONS[backend]
    check_rows("rms_norm", backend, x, residual, eps, weight=weight)
    return run(x, residual, weight, eps, weight_offset, cast_before_weight)


def check_rows(
    operator: str,
    backend: str,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    **vectors: torch.Tensor | None,
) -> None:
    """Raises ValueError for dtypes, devices or shapes other than x [..., H], residual like x, vectors [H]; or eps."""
    check_dtype(operator, backend, x=x)
    check_same(operator, x, residual=residual, **vectors)
    for name, vector in vectors.items():
        if vector is not None and (x.dim() < 1 or vector.shape != x.shape[-1:]):
            raise ValueError(
                f"{operator}: {name} has shape {tuple(vector.shape)}, x {tuple(x.shape)}; expected {name} [H]"
            )
    if x.dim() < 1 or (residual is not None and residual.shape != x.shape):
        shape = None if residual is None else tuple(residual.shape)
        raise ValueError(f"{operator}: x has shape {tuple(x.shape)}, residual {shape}; expected [..., H], both alike")
    if not eps >= 0:
        raise ValueError(f"{operator}: eps={eps} is not supported; it must be >= 0")
