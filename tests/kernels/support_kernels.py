"""Helpers of the kernel tests: bits, hostile data, error against a truth."""

from __future__ import annotations

import importlib.util

import pytest
import torch

interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or importlib.util.find_spec("triton") is None,
    reason="needs Triton's interpreter: triton installed, and no GPU",
)


def bits(x: torch.Tensor) -> torch.Tensor:
    """Integer view, so that equality is bitwise."""
    return x.detach().contiguous().view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def heavy(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal values over six decades with outliers: sums whose order matters."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * 10 ** (torch.rand(shape, generator=generator) * 6 - 4)
    return values.to(dtype)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(x: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative error in the 2-norm."""
    return float((x.detach().double() - truth.detach()).norm() / truth.detach().norm())
