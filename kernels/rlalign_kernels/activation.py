"""Activations: silu, gelu and swiglu.

``silu(x) = x / (1 + exp(-x))``; ``gelu(x) = x/2 (1 + erf(x / sqrt 2))`` or, with ``approximate="tanh"``,
``x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))``; ``swiglu(gate, up) = silu(gate) * up``. float32 or bfloat16.
Computed in float32 and rounded once (swiglu: once after silu, once after the product, as a model of separate layers).
Promised: forward, an element's bits depend on that element only. Backward is deterministic run to run.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F

from rlalign_kernels.checks import check_dtype, check_same
from rlalign_kernels.dispatch import Backend, Implementations, operator
from rlalign_kernels.reference.elementwise import elementwise, scalar

_SQRT_HALF = math.sqrt(0.5)
_TANH_SCALE = math.sqrt(2 / math.pi)
_TANH_CUBIC = 0.044715


def _silu_values(x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    denominator = elementwise("exp", torch.neg(x), inplace=True).add_(scalar(1.0, x.device))
    return torch.div(x, denominator, out=denominator)


def _silu_forward(x: torch.Tensor) -> torch.Tensor:
    return _silu_values(x.float()).to(x.dtype)


class _Silu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return _silu_forward(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad, x)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return _silu_values(gate.float()).to(gate.dtype).mul_(up)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, approximate: str) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.approximate = approximate
        wide = x.float().contiguous()
        if approximate == "none":
            inner = elementwise("erf", wide * _SQRT_HALF, inplace=True)
        else:
            inner = elementwise("tanh", (wide * wide * wide * _TANH_CUBIC + wide) * _TANH_SCALE, inplace=True)
        return inner.add_(1.0).mul_(wide * 0.5).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(grad, x, approximate=ctx.approximate), None


def _reference_silu(x: torch.Tensor) -> torch.Tensor:
    return _Silu.apply(x) if torch.is_grad_enabled() and x.requires_grad else _silu_forward(x)


def _native_gelu(x: torch.Tensor, approximate: str) -> torch.Tensor:
    return F.gelu(x, approximate=approximate)


_SILU = Implementations("silu", reference=_reference_silu, native=F.silu)
_GELU = Implementations("gelu", reference=_Gelu.apply, native=_native_gelu)
_SWIGLU = Implementations("swiglu", reference=_SwiGlu.apply, native=lambda gate, up: F.silu(gate) * up)


@operator
def silu(x: torch.Tensor, *, backend: Backend) -> torch.Tensor:
    """``x / (1 + exp(-x))`` for x of any shape, float32 or bfloat16. Raises ValueError for another dtype."""
    run = _SILU[backend]
    check_dtype("silu", x=x)
    return run(x)


@operator
def gelu(x: torch.Tensor, *, approximate: Literal["none", "tanh"] = "none", backend: Backend) -> torch.Tensor:
    """GELU of x of any shape, float32 or bfloat16. Raises ValueError for another dtype or approximation."""
    run = _GELU[backend]
    check_dtype("gelu", x=x)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate={approximate!r} is unknown; supported: 'none', 'tanh'")
    return run(x, approximate)


@operator
def swiglu(gate: torch.Tensor, up: torch.Tensor, *, backend: Backend) -> torch.Tensor:
    """``silu(gate) * up`` for two tensors of one shape and dtype. Raises ValueError if they differ."""
    run = _SWIGLU[backend]
    check_dtype("swiglu", gate=gate)
    check_same("swiglu", gate, up=up)
    if gate.shape != up.shape:
        raise ValueError(f"swiglu: gate {tuple(gate.shape)} and up {tuple(up.shape)} differ in shape")
    return run(gate, up)
