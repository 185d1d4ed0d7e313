"""Refusals that several operators share: each names operator, argument, value and what is supported."""

from __future__ import annotations

import torch

_DTYPES = {"reference": (torch.float32, torch.bfloat16)}
_ALL = (torch.float32, torch.bfloat16, torch.float16)


def dtypes(backend: str) -> tuple[torch.dtype, ...]:
    """What operators take on ``backend``: float16 too, but for "reference"."""
    return _DTYPES.get(backend, _ALL)


def check_dtype(operator: str, backend: str, **tensors: torch.Tensor) -> None:
    """Raises ValueError unless ``backend`` takes every tensor's dtype."""
    known = dtypes(backend)
    for name, tensor in tensors.items():
        if tensor.dtype not in known:
            raise ValueError(f"{operator}: {name}.dtype={tensor.dtype} is not supported; use {in_words(known)}")


def in_words(known: tuple[torch.dtype, ...]) -> str:
    *others, last = (str(dtype).removeprefix("torch.") for dtype in known)
    return f"{', '.join(others)} or {last}"


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
