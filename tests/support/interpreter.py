"""Triton's interpreter in about half the time."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def builtins_looked_up_once() -> Iterator[None]:
    """Around kernels that are interpreted: the names of Triton's built-in functions are remembered.

    Before each call of a function within a kernel the interpreter looks through all members of its modules for them,
    which is more than half of its time.
    """
    if importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    @functools.cache
    def names(owner: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(owner) if is_builtin(member)]

    def members(owner: Any) -> list[tuple[str, Any]]:
        return [(name, getattr(owner, name)) for name in names(owner)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "inspect", types.SimpleNamespace(**{**vars(inspect), "getmembers": members}))
        yield
