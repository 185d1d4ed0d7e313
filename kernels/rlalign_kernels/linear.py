"""Linear layer: ``y = x @ weight.T + bias``.

Shapes: x [..., K], weight [N, K], bias [N] or None -> y [..., N]. dtypes: float32 or bfloat16, the same for all.
Accumulation: float32, in the order of the plan in ``reference/gemm.py``; the bias is one separate float32 addition;
bfloat16 is widened on entry and rounded once at the end.
Promised: forward, a row's bits depend on that row, weight and bias only. Backward is deterministic run to run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rlalign_kernels.checks import check_dtype, check_same
from rlalign_kernels.dispatch import Backend, Implementations, operator
from rlalign_kernels.reference.gemm import product_nt


def _forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    out = product_nt(rows, weight) if x.dtype == torch.float32 else product_nt(rows.float(), weight.float())
    if bias is not None:
        out += bias
    out = out if x.dtype == torch.float32 else out.to(x.dtype)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], weight.shape[0])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _forward(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1]).float()
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ weight.float()).to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.t() @ x.reshape(-1, x.shape[-1]).float()).to(weight.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0).to(weight.dtype)
        return grad_x, grad_weight, grad_bias


def _reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x, weight, bias)
    return _forward(x, weight, bias)


_IMPLEMENTATIONS = Implementations("linear", reference=_reference, native=F.linear)


@operator
def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, backend: Backend
) -> torch.Tensor:
    """``x @ weight.T + bias``; see the module docstring for shapes, dtypes and what is promised.

    Raises ValueError for shapes or dtypes that do not fit, NotImplementedError for a backend that is not there.
    """
    run = _IMPLEMENTATIONS[backend]
    check_dtype("linear", x=x)
    check_same("linear", x, weight=weight, bias=bias)
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"linear: x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit [..., K] and [N, K]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear: bias has shape {tuple(bias.shape)}, expected {tuple(weight.shape[:1])}")
    return run(x, weight, bias)
