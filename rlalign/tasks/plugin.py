"""A user's own reward, from ``FILE.py:function``.

The function is called with keywords, for one completion at a time::

    def reward(*, data_source: str, solution_str: str, ground_truth: str, extra_info: dict) -> float: ...

``data_source`` and ``extra_info`` come from the row ("" and {} where it has none), ``solution_str`` is the text of the
completion. Any finite number is a reward; an exception or anything else stops the run and names the sample.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from rlalign.records import Prompt
from rlalign.tasks.base import RewardFunction, call_reward

_KEYWORDS = ("data_source", "solution_str", "ground_truth", "extra_info")
_SIGNATURE = "(*, data_source: str, solution_str: str, ground_truth: str, extra_info: dict) -> float"


class PluggedReward:
    """A loaded reward and where it came from, for messages."""

    def __init__(self, function: RewardFunction, source: str) -> None:
        self._function = function
        self._source = source

    def __call__(self, prompt: Prompt, completion_text: str) -> float:
        """Reward of one completion. Raises RewardError."""
        return call_reward(self._function, self._source, prompt, completion_text)


def load_reward(spec: str) -> PluggedReward:
    """Load ``FILE.py:function``. Raises ValueError (FileNotFoundError for the file) naming what is wrong with it.

    That includes a function that can't be called with the keywords above.
    """
    file, _, name = spec.rpartition(":")
    if not file.endswith(".py") or not name.isidentifier():
        raise ValueError(f"task.reward={spec!r} is not of the form FILE.py:function")
    function = getattr(_load_module(Path(file), spec), name, None)
    if not callable(function):
        raise ValueError(f"task.reward={spec!r}: {file} has no function {name!r}; needed is def {name}{_SIGNATURE}")
    if reason := _refusal(function):
        raise ValueError(f"task.reward={spec!r} can't be called: {reason}; needed is def {name}{_SIGNATURE}")
    return PluggedReward(function, f"task.reward={spec}")


def _refusal(function: Callable[..., object]) -> str | None:
    """Why a call with our keywords would fail; None if it wouldn't, or if Python can't tell beforehand."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions that are written in C
        return None
    try:
        signature.bind(**dict.fromkeys(_KEYWORDS))
    except TypeError as error:
        return str(error)
    return None


def _load_module(path: Path, spec: str) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"task.reward={spec!r}: no such file: {path}")
    # kept out of sys.modules: a user's math.py must not hide anybody else's
    module_spec = importlib.util.spec_from_file_location(f"rlalign_reward_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f"task.reward={spec!r}: {path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"task.reward={spec!r}: loading {path} raised {type(error).__name__}: {error}") from error
    return module
