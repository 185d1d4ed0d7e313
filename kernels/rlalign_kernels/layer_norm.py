"""LayerNorm: ``y = (x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias`` over the last axis.

Shapes: x [..., H], weight and bias [H] or None -> y [..., H]. dtypes: float32, bfloat16 and, but for
reference, float16. float32 throughout, rounded once; both means in the order of rms_norm's, the second over what the
first leaves.
Promised: forward, a row's bits depend on that row, weight and bias only. Backward is deterministic run to run.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from rlalign_kernels.dispatch import Backend, Implementations, operator
from rlalign_kernels.norm import after_adding, as_matrix, check_rows, row_means, row_roots


def _forward(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    wide = x.float()
    wide = wide - row_means(wide).view(*x.shape[:-1], 1)
    out = wide / row_roots(wide, eps)
    if weight is not None:
        out = out.mul_(weight.float())
    if bias is not None:
        out = out.add_(bias.float())
    return out.to(x.dtype)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.eps = eps
        return _forward(x, weight, bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        grad = grad.float()
        centered = x.float() - x.float().mean(-1, keepdim=True)
        inverse = torch.rsqrt(centered.square().mean(-1, keepdim=True).add_(ctx.eps))
        normed = centered * inverse
        scaled = grad if weight is None else grad * weight.float()
        along = normed * (scaled * normed).mean(-1, keepdim=True)
        grad_x = (scaled - scaled.mean(-1, keepdim=True) - along).mul_(inverse).to(x.dtype)
        columns = (
            as_matrix(value).sum(0).to(x.dtype) if needed else None
            for value, needed in zip((grad * normed, grad), ctx.needs_input_grad[1:3], strict=True)
        )
        return grad_x, *columns, None


@after_adding
def _reference(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _LayerNorm.apply(x, weight, bias, eps)
    return _forward(x, weight, bias, eps)


@after_adding
def _native(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _triton(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    from rlalign_kernels.elementwise import triton_norm_calls  # triton may be missing where nobody asks for it

    settings = triton_norm_calls.norm_settings("layer_norm", float(eps), centered=True)
    return triton_norm_calls.norm(x, residual, weight, bias, settings)


_IMPLEMENTATIONS = Implementations("layer_norm", reference=_reference, native=_native, triton=_triton)


@operator
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    eps: float,
    residual: torch.Tensor | None = None,
    backend: Backend,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm over the last axis of x [..., H]; weight, bias [H], or None for none; a bias needs a weight.

    With ``residual`` [..., H], the pair of the norm of x + residual, rounded to their dtype, and that sum.
    Raises ValueError for shapes or dtypes that do not fit, or eps < 0.
    An element errs by at most ``2^-19 (|weight| (|x| + mean(|x|)) / sqrt(var + eps) + |bias|)``; in 16 bits by one unit
    in its last place more.
    """
    run = _IMPLEMENTATIONS[backend]
    check_rows("layer_norm", backend, x, residual, eps, weight=weight, bias=bias)
    if weight is None and bias is not None:
        raise ValueError("layer_norm: a bias without a weight is not supported; give a weight of ones")
    return run(x, residual, weight, bias, eps)
