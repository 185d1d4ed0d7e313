"""Cases of norms, rotary embedding and activations for ``bench_kernels.py``: bfloat16, 16,384 rows if not said.

Such an operator is as fast as memory allows: the baseline is a device copy of the same number of bytes, counting what
is read and what is written. PyTorch's own operator runs beside it, one kernel where it has one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from rlalign_kernels import apply_rotary, geglu, gelu, layer_norm, rms_norm, silu, swiglu

from rlalign.cli.bench_kernels import Case

_ROWS = 16384
_SIZES = (1024, 2048, 4096, 5120, 8192, 16384)
_DEVICE, _DTYPE = "cuda", torch.bfloat16
_DIM = 128
_EPS = 1e-6
Calls = dict[str, Callable[[], object]]


def make_cases(only: str) -> Iterator[Callable[[], Case]]:
    """Cases whose name contains ``only``, each made when it is called: together they would not fit a GPU."""
    makers: dict[str, Callable[[str], Case]] = {}
    for size in _SIZES:
        makers[f"rms_norm {size}"] = partial(_norm, size)
        makers[f"rms_norm + residual {size}"] = partial(_norm_of_sum, size)
    makers["rms_norm of 16 heads of 128, within a fused projection"] = _head_norm
    for size in _SIZES:
        makers[f"rms_norm backward {size}"] = partial(_norm_backward, size)
    makers["rms_norm backward, 65,536 rows of 1024"] = partial(_norm_backward, 1024, times=4)
    makers["rms_norm backward of 16 heads of 128"] = partial(_norm_backward, _DIM, times=16)
    makers["layer_norm 4096"] = partial(_layer_norm, 4096)
    makers |= {f"layer_norm backward {size}": partial(_layer_norm_backward, size) for size in (1024, 4096)}
    makers["layer_norm backward, 65,536 rows of 1024"] = partial(_layer_norm_backward, 1024, times=4)
    makers |= {f"rotary {heads} + 8 heads of 128": partial(_rotary, heads) for heads in (8, 16, 32)}
    makers["rotary backward, 16 + 8 heads of 128"] = partial(_rotary_backward, 16)
    makers |= {f"{name} 6144": partial(_activation, name) for name in _ACTIVATIONS}
    makers |= {f"{name} 6144, halves of one tensor": partial(_gated, name) for name in _GATED}
    makers["gelu tanh backward 6144"] = partial(_activation_backward, "gelu tanh")
    makers |= {f"{name} backward 6144": partial(_gated_backward, name) for name in ("swiglu", "geglu tanh")}
    for name, make in makers.items():
        if only in name:
            yield partial(make, name)


def make_host_cases(only: str) -> Iterator[tuple[str, Calls]]:
    """One row: the host's time is all there is."""
    x, weight, up = _random(1, 2048), _random(2048), _random(1, 2048)
    heads, table = _random(1, 16, _DIM), _random(1, _DIM)
    cases = {
        "rms_norm": (partial(F.rms_norm, x, (2048,), weight, _EPS), partial(_ours, x, weight)),
        "apply_rotary": (
            partial(_turned, heads, heads[:, :8], table, table),
            partial(apply_rotary, heads, heads[:, :8], table, table, backend="triton"),
        ),
        "swiglu": (lambda: F.silu(x) * up, partial(swiglu, x, up, backend="triton")),
    }
    for name, (theirs, ours) in cases.items():
        if only in f"host time, {name}":
            yield f"host time, {name}", {"torch": theirs, "rlalign": ours}


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=_DEVICE).to(_DTYPE)


def _case(name: str, num_elements: int, calls: Calls, graphed: bool = False) -> Case:
    """num_elements: read and written, at least."""
    source = torch.empty(num_elements // 2, dtype=_DTYPE, device=_DEVICE).normal_()
    target = torch.empty_like(source)
    calls = {"device copy": partial(target.copy_, source), **calls}
    return Case(name, "device copy", calls, num_bytes=float(num_elements * _DTYPE.itemsize), graphed=graphed)


def _ours(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None) -> object:
    return rms_norm(x, weight, eps=_EPS, residual=residual, backend="triton")


def _norm(size: int, name: str) -> Case:
    x, weight = _random(_ROWS, size), _random(size)
    calls = {"torch": partial(F.rms_norm, x, (size,), weight, _EPS), "rlalign": partial(_ours, x, weight)}
    return _case(name, 2 * x.numel(), calls)


def _norm_of_sum(size: int, name: str) -> Case:
    x, residual, weight = _random(_ROWS, size), _random(_ROWS, size), _random(size)

    def theirs() -> tuple[torch.Tensor, torch.Tensor]:
        total = x + residual
        return F.rms_norm(total, (size,), weight, _EPS), total

    return _case(name, 4 * x.numel(), {"torch": theirs, "rlalign": partial(_ours, x, weight, residual)})


def _head_norm(name: str) -> Case:
    """Queries of 16 heads, in rows that hold 8 key and 8 value heads too."""
    heads = _random(_ROWS, 32, _DIM)[:, :16]
    weight = _random(_DIM)
    calls = {"torch": partial(F.rms_norm, heads, (_DIM,), weight, _EPS), "rlalign": partial(_ours, heads, weight)}
    return _case(name, 2 * heads.numel(), calls)


def _layer_norm_calls(size: int, times: int = 1) -> tuple[list[torch.Tensor], Calls]:
    x, weight, bias = _random(times * _ROWS, size), _random(size), _random(size)
    calls = {
        "torch": partial(F.layer_norm, x, (size,), weight, bias, _EPS),
        "rlalign": partial(layer_norm, x, weight, bias, eps=_EPS, backend="triton"),
    }
    return [x, weight, bias], calls


def _layer_norm(size: int, name: str) -> Case:
    inputs, calls = _layer_norm_calls(size)
    return _case(name, 2 * inputs[0].numel(), calls)


def _layer_norm_backward(size: int, name: str, times: int = 1) -> Case:
    inputs, calls = _layer_norm_calls(size, times)
    for t in inputs:
        t.requires_grad_()
    grad = _random(times * _ROWS, size)
    backwards = {which: _backward(forward, inputs, grad) for which, forward in calls.items()}
    return _case(name, 3 * inputs[0].numel(), backwards, graphed=True)


def _backward(
    forward: Callable[[], torch.Tensor | tuple[torch.Tensor, ...]],
    inputs: list[torch.Tensor],
    grad: torch.Tensor | list[torch.Tensor],
) -> Callable[[], object]:
    kept: list[torch.Tensor | tuple[torch.Tensor, ...]] = []

    def call() -> object:
        if not kept:
            kept.append(forward())
        return torch.autograd.grad(kept[0], inputs, grad, retain_graph=True)

    return call


def _norm_backward(size: int, name: str, times: int = 1) -> Case:
    x, weight = _random(times * _ROWS, size).requires_grad_(), _random(size).requires_grad_()
    grad = _random(times * _ROWS, size)
    calls = {
        "torch": _backward(partial(F.rms_norm, x, (size,), weight, _EPS), [x, weight], grad),
        "rlalign": _backward(partial(_ours, x, weight), [x, weight], grad),
    }
    # autograd's own time on the host would hide the kernels'
    return _case(name, 3 * x.numel(), calls, graphed=True)


def _rotary(heads: int, name: str) -> Case:
    query, key, cos, sin = (_random(_ROWS, *shape, _DIM) for shape in ((heads,), (8,), (), ()))
    inputs = query, key, cos, sin
    calls = {"torch": partial(_turned, *inputs), "rlalign": partial(apply_rotary, *inputs, backend="triton")}
    return _case(name, 2 * (query.numel() + key.numel() + cos.numel()), calls)


def _rotary_backward(heads: int, name: str) -> Case:
    inputs, grads = ([_random(_ROWS, count, _DIM) for count in (heads, 8)] for _ in range(2))
    tables = _random(_ROWS, _DIM), _random(_ROWS, _DIM)
    for t in inputs:
        t.requires_grad_()
    calls = {
        "torch": _backward(partial(_turned, *inputs, *tables), inputs, grads),
        "rlalign": _backward(partial(apply_rotary, *inputs, *tables, backend="triton"), inputs, grads),
    }
    return _case(name, 2 * (sum(t.numel() for t in inputs) + tables[0].numel()), calls, graphed=True)


def _turned(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As transformers' models do."""

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

    return turned(query), turned(key)


_ACTIVATIONS: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    "silu": (F.silu, silu),
    "gelu": (F.gelu, gelu),
    "gelu tanh": (partial(F.gelu, approximate="tanh"), partial(gelu, approximate="tanh")),
}
_GATED: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    "swiglu": (F.silu, swiglu),
    "geglu": (F.gelu, geglu),
    "geglu tanh": (partial(F.gelu, approximate="tanh"), partial(geglu, approximate="tanh")),
}


def _activation(which: str, name: str) -> Case:
    x = _random(_ROWS, 6144)
    theirs, ours = _ACTIVATIONS[which]
    return _case(name, 2 * x.numel(), {"torch": partial(theirs, x), "rlalign": partial(ours, x, backend="triton")})


def _activation_backward(which: str, name: str) -> Case:
    x, grad = _random(_ROWS, 6144).requires_grad_(), _random(_ROWS, 6144)
    theirs, ours = _ACTIVATIONS[which]
    forwards = {"torch": partial(theirs, x), "rlalign": partial(ours, x, backend="triton")}
    calls = {impl: _backward(forward, [x], grad) for impl, forward in forwards.items()}
    return _case(name, 3 * x.numel(), calls, graphed=True)


def _gated(which: str, name: str) -> Case:
    gate, up = _random(_ROWS, 2 * 6144).chunk(2, -1)
    theirs, ours = _GATED[which]
    calls = {"torch": lambda: theirs(gate) * up, "rlalign": partial(ours, gate, up, backend="triton")}
    return _case(name, 3 * gate.numel(), calls)


def _gated_backward(which: str, name: str) -> Case:
    inputs, grad = [_random(_ROWS, 6144).requires_grad_() for _ in range(2)], _random(_ROWS, 6144)
    theirs, ours = _GATED[which]
    calls = {
        "torch": _backward(lambda: theirs(inputs[0]) * inputs[1], inputs, grad),
        "rlalign": _backward(partial(ours, *inputs, backend="triton"), inputs, grad),
    }
    return _case(name, 5 * inputs[0].numel(), calls, graphed=True)
