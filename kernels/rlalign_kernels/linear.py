"""Linear layer: ``y = x @ weight.T + bias``.

Shapes: x [..., K], weight [N, K], bias [N] or None -> y [..., N]. dtypes: float32, bfloat16 and, but for reference,
float16, the same for all.
Accumulation: float32, in the order of the plan in ``reference/gemm.py`` or, on a GPU, ``gemm/chain_plan.py``;
``leaves`` > 1: K in so many equal parts whose sums meet in a binary tree, another plan. The bias is one separate
float32 addition; bfloat16 and float16 are rounded once at the end.
Promised: forward, a row's bits depend on that row, weight and bias only. Backward is deterministic run to run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from rlalign_kernels.checks import check_dtype, check_same
from rlalign_kernels.dispatch import Backend, Implementations, operator
from rlalign_kernels.gemm.chain_plan import chain_plan
from rlalign_kernels.reference.gemm import product_nt


def _tree(x: torch.Tensor, weight: torch.Tensor, leaves: int) -> torch.Tensor:
    """float32 [M, N]: the parts of K one by one, added as (l0 + l1) + (l2 + l3)."""
    if leaves == 1:
        return product_nt(x, weight)
    half = x.shape[1] // 2
    low, high = _tree(x[:, :half], weight[:, :half], leaves // 2), _tree(x[:, half:], weight[:, half:], leaves // 2)
    return low + high


def _forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, leaves: int) -> torch.Tensor:
    dtype = x.dtype
    if dtype != torch.float32:
        x, weight = x.float(), weight.float()
    out = product_nt(x, weight) if leaves == 1 else _tree(x, weight, leaves)
    if bias is not None:
        out += bias
    return out if dtype == torch.float32 else out.to(dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, leaves: int) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        # padded rows are cut off by a view, which could not be changed in place
        return _forward(x, weight, bias, leaves).data

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.float()
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ weight.float()).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (rows.t() @ x.float()).to(weight.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = rows.sum(0).to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None


def _by_rows(
    run: Callable[..., torch.Tensor], x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, leaves: int
) -> torch.Tensor:
    """[..., N] of x [..., K], by ``run`` of rows [M, K]. A view where strides allow it, else a copy."""
    if x.dim() == 2:
        return run(x, weight, bias, leaves)
    # here, for a view that an autograd function returns may not be changed in place, as OLMo's clip_qkv does
    out = run(x.reshape(x.shape[:-1].numel(), x.shape[-1]), weight, bias, leaves)
    return out.view(*x.shape[:-1], weight.shape[0])


def _reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, leaves: int) -> torch.Tensor:
    check_dtype("linear", "reference", x=x)
    if leaves != 1:
        chain_plan("linear", leaves, x.shape[-1])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _by_rows(_Linear.apply, x, weight, bias, leaves)
    return _by_rows(_forward, x, weight, bias, leaves)


def _native(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, leaves: int) -> torch.Tensor:
    check_dtype("linear", "native", x=x)
    if leaves != 1:
        raise NotImplementedError(f"linear: leaves={leaves} is not there with backend='native'; use 1")
    return F.linear(x, weight, bias)


@cache
def _gemm_calls() -> ModuleType:
    from rlalign_kernels.gemm import triton_calls  # triton may be missing where nobody asks for it

    return triton_calls


def _triton(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, leaves: int) -> torch.Tensor:
    return _by_rows(_gemm_calls().linear, x, weight, bias, leaves)


_IMPLEMENTATIONS = Implementations("linear", reference=_reference, native=_native, triton=_triton)


@operator
def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    leaves: int = 1,
    backend: Backend,
) -> torch.Tensor:
    """``x @ weight.T + bias``; see the module docstring for shapes, dtypes and what is promised.

    ``leaves``: 1, 2, 4 or 8 equal parts of K, each summed on its own, then in a binary tree; not with "native".
    An element errs by at most ``(K + 2) 2^-23 (|x| @ |weight|.T + |bias|)``; in 16 bits by one unit in its last place
    more.
    Raises ValueError for shapes, dtypes or leaves that do not fit, NotImplementedError for a backend that is not there.
    """
    run = _IMPLEMENTATIONS[backend]
    check_same("linear", x, weight=weight, bias=bias)
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"linear: x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit [..., K] and [N, K]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear: bias has shape {tuple(bias.shape)}, expected {tuple(weight.shape[:1])}")
    return run(x, weight, bias, leaves)
