"""Refusals that several operators share: each names operator, argument, value and what is supported."""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.bfloat16)


def check_dtype(operator: str, **tensors: torch.Tensor) -> None:
    """Raises ValueError unless every tensor is float32 or bfloat16."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{operator}: {name}.dtype={tensor.dtype} is not supported; use float32 or bfloat16")


def check_same(operator: str, like: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    """Raises ValueError unless every given tensor has ``like``'s dtype and device."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype != like.dtype:
            raise ValueError(f"{operator}: {name}.dtype={tensor.dtype} differs from the input's {like.dtype}")
        if tensor.device != like.device:
            raise ValueError(f"{operator}: {name}.device={tensor.device} differs from the input's {like.device}")


def check_integer(operator: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless ``tensor`` is int32 or int64 of ``shape``."""
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{operator}: {name}.dtype={tensor.dtype} is not supported; use int32 or int64")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{operator}: {name} has shape {tuple(tensor.shape)}, expected {shape}")
