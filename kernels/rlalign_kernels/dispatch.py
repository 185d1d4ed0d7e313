"""Which implementation runs: an explicit table per operator. It refuses; it never falls back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal, ParamSpec, TypeVar

import torch

Backend = Literal["reference", "native", "triton"]
BACKENDS: tuple[str, ...] = ("reference", "native", "triton")

P = ParamSpec("P")
R = TypeVar("R")

# Operators now on the stack, innermost last: how an audit tells our own torch calls from a model's.
running: list[str] = []


class Implementations:
    """One operator's table of backends.

    Example:
        >>> table = Implementations("double", reference=lambda x: 2 * x)
        >>> table["reference"](2)
        4
    """

    def __init__(self, operator: str, **by_backend: Callable[..., Any]) -> None:
        unknown = sorted(set(by_backend) - set(BACKENDS))
        if unknown:
            raise ValueError(f"{operator}: unknown backends {unknown}; known are {list(BACKENDS)}")
        self.operator = operator
        self.by_backend = by_backend

    @property
    def supported(self) -> list[str]:
        return sorted(self.by_backend)

    def __getitem__(self, backend: str) -> Callable[..., Any]:
        """Raises ValueError for a name that is no backend, NotImplementedError for one this operator lacks."""
        found = self.by_backend.get(backend)
        if found is not None:
            return found
        if backend in BACKENDS:
            raise NotImplementedError(f"{self.operator}: backend={backend!r} is not there; supported: {self.supported}")
        raise ValueError(f"{self.operator}: backend={backend!r} is unknown; supported: {self.supported}")


def operator(function: Callable[P, R]) -> Callable[P, R]:
    """Mark a public operator: while it runs, ``running_operator()`` names it.

    Autocast is off meanwhile, but with backend="native".
    """
    name, plain = function.__name__, without_autocast(function)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        running.append(name)
        try:
            return function(*args, **kwargs) if kwargs.get("backend") == "native" else plain(*args, **kwargs)
        finally:
            running.pop()

    return wrapper


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """``function`` with autocast off, which would round the products of which a plan is made."""
    any_autocast = torch._C._is_any_autocast_enabled  # the public question names a device, and takes twice as long

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if any_autocast():
            with _autocast_off():
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return wrapper


def _autocast_off() -> ExitStack:
    stack = ExitStack()
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def running_operator() -> str | None:
    """Name of the innermost rlalign operator whose forward is running, or None."""
    return running[-1] if running else None
