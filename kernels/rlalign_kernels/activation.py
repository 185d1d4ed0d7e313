"""Activations: silu, gelu, swiglu and geglu.

``silu(x) = x / (1 + exp(-x))``; ``gelu(x) = x/2 (1 + erf(x / sqrt 2))`` or, with ``approximate="tanh"``,
``x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))``; ``swiglu(gate, up) = silu(gate) * up``;
``geglu(gate, up) = gelu(gate) * up``. float32, bfloat16 and, but for reference, float16. Computed in float32 and
rounded once (swiglu, geglu: once after the activation, once after the product, as in a model of separate layers).
Promised: forward, an element's bits depend on that element only. Backward is deterministic run to run.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

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
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad, x)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        activated = _silu_forward(gate)
        ctx.save_for_backward(gate, up, activated)
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up, activated = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * activated


def _gelu_forward(x: torch.Tensor, approximate: str) -> torch.Tensor:
    wide = x.float().contiguous()
    if approximate == "none":
        inner = elementwise("erf", wide * _SQRT_HALF, inplace=True)
    else:
        inner = elementwise("tanh", (wide * wide * wide * _TANH_CUBIC + wide) * _TANH_SCALE, inplace=True)
    return inner.add_(1.0).mul_(wide * 0.5).to(x.dtype)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, approximate: str) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.approximate = approximate
        return _gelu_forward(x, approximate)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(grad, x, approximate=ctx.approximate), None


class _GeGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor, approximate: str) -> torch.Tensor:
        activated = _gelu_forward(gate, approximate)
        ctx.save_for_backward(gate, up, activated)
        ctx.approximate = approximate
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        gate, up, activated = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(grad * up, gate, approximate=ctx.approximate), grad * activated, None


def _reference_silu(x: torch.Tensor) -> torch.Tensor:
    return _Silu.apply(x) if torch.is_grad_enabled() and x.requires_grad else _silu_forward(x)


def _native_gelu(x: torch.Tensor, approximate: str) -> torch.Tensor:
    return F.gelu(x, approximate=approximate)


def _native_geglu(gate: torch.Tensor, up: torch.Tensor, approximate: str) -> torch.Tensor:
    return F.gelu(gate, approximate=approximate) * up


def _triton(operator: str, kind: str, x: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
    from rlalign_kernels.elementwise import triton_activation_calls  # triton may be missing where nobody asks for it

    return triton_activation_calls.activation(operator, kind, x, up)


_SILU = Implementations("silu", reference=_reference_silu, native=F.silu, triton=lambda x: _triton("silu", "silu", x))
_GELU = Implementations(
    "gelu", reference=_Gelu.apply, native=_native_gelu, triton=lambda x, how: _triton("gelu", f"gelu {how}", x)
)
_SWIGLU = Implementations(
    "swiglu",
    reference=_SwiGlu.apply,
    native=lambda gate, up: F.silu(gate) * up,
    triton=lambda gate, up: _triton("swiglu", "silu", gate, up),
)
_GEGLU = Implementations(
    "geglu",
    reference=_GeGlu.apply,
    native=_native_geglu,
    triton=lambda gate, up, how: _triton("geglu", f"gelu {how}", gate, up),
)


@operator
def silu(x: torch.Tensor, *, backend: Backend) -> torch.Tensor:
    """``x / (1 + exp(-x))`` for x of any shape. Raises ValueError for a dtype that is not supported.

    An element errs by at most 2^-21 of itself and 1e-35; in 16 bits by one unit in its last place more.
    """
    run = _SILU[backend]
    check_dtype("silu", backend, x=x)
    return run(x)


@operator
def gelu(x: torch.Tensor, *, approximate: Literal["none", "tanh"] = "none", backend: Backend) -> torch.Tensor:
    """GELU of x of any shape. Raises ValueError for another dtype or approximation.

    An element errs by at most 2^-22 |x| and 1e-35; in 16 bits by one unit in its last place more.
    """
    run = _GELU[backend]
    check_dtype("gelu", backend, x=x)
    _check_approximate("gelu", approximate)
    return run(x, approximate)


@operator
def swiglu(gate: torch.Tensor, up: torch.Tensor, *, backend: Backend) -> torch.Tensor:
    """``silu(gate) * up`` for two tensors of one shape and dtype. Raises ValueError if they differ.

    An element errs by at most silu's error times |up|, and one unit in its last place.
    """
    run = _SWIGLU[backend]
    _check_pair("swiglu", backend, gate, up)
    return run(gate, up)


@operator
def geglu(
    gate: torch.Tensor, up: torch.Tensor, *, approximate: Literal["none", "tanh"] = "none", backend: Backend
) -> torch.Tensor:
    """``gelu(gate) * up`` for two tensors of one shape and dtype. Raises ValueError if they differ.

    An element errs by at most gelu's error times |up|, and one unit in its last place.
    """
    run = _GEGLU[backend]
    _check_pair("geglu", backend, gate, up)
    _check_approximate("geglu", approximate)
    return run(gate, up, approximate)


def _check_pair(operator: str, backend: str, gate: torch.Tensor, up: torch.Tensor) -> None:
    check_dtype(operator, backend, gate=gate)
    check_same(operator, gate, up=up)
    if gate.shape != up.shape:
        raise ValueError(f"{operator}: gate {tuple(gate.shape)} and up {tuple(up.shape)} differ in shape")


def _check_approximate(operator: str, approximate: str) -> None:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{operator}: approximate={approximate!r} is unknown; supported: 'none', 'tanh'")
