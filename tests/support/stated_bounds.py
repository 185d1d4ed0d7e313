"""What docstrings state of every operator's error, element by element against float64: the same on CPU and GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from rlalign_kernels import apply_rotary, geglu, gelu, layer_norm, linear, linear_logprob, rms_norm, silu, swiglu
from rlalign_kernels.reference import truths
from torch import Tensor

EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Problem:
    """``run(*inputs, backend=...)`` is at most ``allowed`` from ``exact``; both float64, of the result's shape."""

    run: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    exact: Tensor
    allowed: Tensor

    def error(self, backend: str, device: torch.device | str = "cpu") -> float:
        """The largest, as a share of what is allowed."""
        return self.share(self.found(backend, device), self.exact)

    def found(self, backend: str, device: torch.device | str = "cpu") -> Tensor:
        return self.run(*(t.to(device) for t in self.inputs), backend=backend).cpu()

    def share(self, found: Tensor, other: Tensor) -> float:
        """Largest distance of the two as a share of what is allowed; NaN if either has one."""
        return float(((found.double() - other.double()).abs() / self.allowed).max())


@cache
def problems(num_rows: int, size: int, vocab_size: int, dtype: torch.dtype) -> dict[str, Problem]:
    """By operator. size: of a row, a multiple of 40."""
    shapes = (num_rows, size), (vocab_size, size), (size,), (size,)
    x, weight, vector, bias = (_normal(seed, shape, dtype) for seed, shape in enumerate(shapes))
    wide, up = _decades(4, (num_rows, size), dtype), _normal(5, (num_rows, size), dtype)
    weight, shift = (weight * size**-0.5).to(dtype), _normal(6, (vocab_size,), dtype)
    return {
        "linear": _linear(x, weight, shift, 1),
        "linear, leaves": _linear(x, weight, shift, 4),
        "rms_norm": _rms_norm(wide, vector),
        "layer_norm": _layer_norm(wide + 1, vector, bias),
        "apply_rotary": _rotary(wide.view(num_rows, 5, -1), dtype),
        "apply_rotary, wide tables": _rotary(wide.view(num_rows, 5, -1), torch.float32),
        "silu": _activation(silu, wide, None, truths.silu(wide), _silu_bound(wide)),
        "gelu": _activation(gelu, wide, None, truths.gelu(wide, "none"), _gelu_bound(wide)),
        "gelu, tanh": _activation(gelu, wide, None, truths.gelu(wide, "tanh"), _gelu_bound(wide), approximate="tanh"),
        "swiglu": _activation(swiglu, wide, up, truths.silu(wide), _silu_bound(wide)),
        "geglu": _activation(geglu, wide, up, truths.gelu(wide, "none"), _gelu_bound(wide)),
        "geglu, tanh": _activation(geglu, wide, up, truths.gelu(wide, "tanh"), _gelu_bound(wide), approximate="tanh"),
        **{f"linear_logprob, {name}": _logprob(x, weight, name) for name in ("logprob", "entropy", "logsumexp")},
    }


def _normal(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _decades(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Over four of them."""
    spread = torch.rand(shape, generator=torch.Generator().manual_seed(100 + seed)) * 4 - 2
    return (_normal(seed, shape, torch.float32) * 10**spread).to(dtype)


def _unit(values: Tensor, dtype: torch.dtype) -> Tensor:
    """One unit in the last place, at most; 0 in float32, of which the bounds hold all rounding."""
    info = torch.finfo(dtype)
    return values.abs() * info.eps + info.tiny * info.eps if dtype != torch.float32 else torch.zeros_like(values)


def _linear(x: Tensor, weight: Tensor, bias: Tensor, leaves: int) -> Problem:
    exact = truths.linear(x, weight, bias)
    terms = truths.linear(x.abs(), weight.abs(), bias.abs())
    allowed = (x.shape[1] + 2) * 2.0**-23 * terms + _unit(exact, x.dtype)

    def run(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
        return linear(x, weight, bias, leaves=leaves, backend=backend)

    return Problem(run, (x, weight, bias), exact, allowed)


def _rms_norm(x: Tensor, weight: Tensor) -> Problem:
    exact = truths.rms_norm(x, weight, EPS)
    allowed = exact.abs() * 2.0**-19 + 2 * _unit(exact, x.dtype)
    return Problem(lambda x, w, backend: rms_norm(x, w, eps=EPS, backend=backend), (x, weight), exact, allowed)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Problem:
    exact, wide = truths.layer_norm(x, weight, bias, EPS), x.double()
    deviation = (wide.var(-1, correction=0, keepdim=True) + EPS).sqrt()
    terms = weight.double().abs() * (wide.abs() + wide.abs().mean(-1, keepdim=True)) / deviation + bias.double().abs()
    allowed = terms * 2.0**-19 + _unit(exact, x.dtype)

    def run(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Tensor:
        return layer_norm(x, weight, bias, eps=EPS, backend=backend)

    return Problem(run, (x, weight, bias), exact, allowed)


def _rotary(heads: Tensor, table_dtype: torch.dtype) -> Problem:
    positions = torch.arange(heads.shape[0])
    frequencies = 100.0 ** -torch.linspace(0, 1, heads.shape[2] // 4)
    angles = (positions[:, None] * frequencies).repeat(1, 2)
    cos, sin = angles.cos().to(table_dtype), angles.sin().to(table_dtype)
    half, rotated = cos.shape[1] // 2, cos.shape[1]

    def turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
        other = torch.cat((sign * x[..., half:rotated], x[..., :half]), -1)
        return torch.cat((x[..., :rotated] * cos[:, None] + other * sin[:, None], x[..., rotated:]), -1)

    exact = turn(heads.double(), cos.double(), sin.double(), -1.0)
    terms = turn(heads.double().abs(), cos.double().abs(), sin.double().abs(), 1.0)
    allowed = 1.01 * torch.finfo(table_dtype).eps * terms
    if table_dtype != heads.dtype:
        allowed = allowed + _unit(exact, heads.dtype)
    # a product that underflows in the tables' dtype
    allowed = allowed + 2 * torch.finfo(table_dtype).tiny * torch.finfo(table_dtype).eps

    def run(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, backend: str) -> Tensor:
        return torch.cat(apply_rotary(query, key, cos, sin, backend=backend), 1)

    return Problem(run, (*heads.split((3, 2), 1), cos, sin), exact, allowed)


def _silu_bound(x: Tensor) -> Tensor:
    exact = truths.silu(x)
    return exact.abs() * 2.0**-21 + 1e-35 + _unit(exact, x.dtype)


def _gelu_bound(x: Tensor) -> Tensor:
    return x.double().abs() * 2.0**-22 + 1e-35 + _unit(truths.gelu(x, "none"), x.dtype)


def _activation(
    operator: Callable[..., Tensor], x: Tensor, up: Tensor | None, exact: Tensor, allowed: Tensor, **how: str
) -> Problem:
    def run(*inputs: Tensor, backend: str) -> Tensor:
        return operator(*inputs, **how, backend=backend)

    if up is None:
        return Problem(run, (x,), exact, allowed)
    product = exact * up.double()
    # the product's own rounding: in float32 half a unit
    rounded = product.abs() * 2.0**-23 + 2.0**-149 if x.dtype == torch.float32 else _unit(product, x.dtype)
    return Problem(run, (x, up), product, allowed * up.double().abs() + rounded)


def _logprob(hidden: Tensor, weight: Tensor, which: str) -> Problem:
    targets = torch.arange(len(hidden)) % len(weight)
    exact = dict(zip(("logprob", "entropy", "logsumexp"), truths.logprob(hidden, weight, targets), strict=True))[which]
    logits = (hidden.shape[1] + 2) * 2.0**-23 * truths.linear(hidden.abs(), weight.abs()).amax(1)
    factor = math.log(len(weight)) if which == "entropy" else 1.0

    def run(hidden: Tensor, weight: Tensor, targets: Tensor, backend: str) -> Tensor:
        return getattr(linear_logprob(hidden, weight, targets, backend=backend), which)

    return Problem(run, (hidden, weight, targets), exact, 2 * factor * logits + 4e-6 * (1 + exact.abs()))
