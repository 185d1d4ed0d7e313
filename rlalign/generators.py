"""The global generators of Python, NumPy and torch, as a user's own reward or loss meets them. Imports nothing of ours.

Nothing of ours draws from them: every random number of a run is a hash of (seed, step, …). A user's function may, and
must then draw the same numbers in a resumed run, whatever libraries and threads around it draw meanwhile.
"""

from __future__ import annotations

import base64
import random
from types import TracebackType
from typing import Any

import numpy as np
import torch

_HOST = frozenset({"python", "numpy", "torch"})


class Generators:
    """States of their own, in place of the process's inside a ``with``; elsewhere nothing is touched.

    ``commit`` marks what belongs to the weights of a finished step: ``state`` saves that and ``rewind`` returns to it.
    torch's CUDA generators are included once CUDA is in use; one that is new in here begins with this seed too.

    Example:
        >>> generators = Generators(seed=0)
        >>> with generators:
        ...     random.random()
    """

    def __init__(self, seed: int) -> None:
        """``seed`` as of ``records.derive_seed``: 64 bits."""
        outside = _states()
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        self._current = self._committed = {name: state for name, state in _states().items() if name in _HOST}
        _restore(outside)

    def __enter__(self) -> Generators:
        self._outside = _states()
        _restore(self._current)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._current = _states()
        _restore(self._outside)

    def commit(self) -> None:
        """What was drawn so far belongs to a finished step."""
        self._committed = self._current

    def rewind(self) -> None:
        """Forget what was drawn since ``commit``."""
        self._current = self._committed

    def state(self) -> dict[str, Any]:
        """The committed states, JSON-ready."""
        return {name: _to_json(state) for name, state in self._committed.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ``state()``. Raises ValueError if it isn't one, or names a GPU that isn't here."""
        if missing := _HOST - state.keys():
            raise ValueError(f"generator states lack {sorted(missing)}")
        here = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        if absent := state.keys() - _HOST - set(here):
            raise ValueError(
                f"generator states of {sorted(absent)} have nowhere to go: GPUs here are {here}; resume on a machine "
                "with as many as the checkpoint names"
            )
        try:
            self._current = self._committed = {name: _from_json(name, value) for name, value in state.items()}
        except (TypeError, ValueError) as error:
            raise ValueError(f"generator states can't be read: {error}") from error


def _states() -> dict[str, Any]:
    cuda = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        **{f"cuda:{index}": torch.cuda.get_rng_state(index) for index in cuda},
    }


def _restore(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    # For a GPU that the states don't know, the seed that torch's own generator was given last. Before CUDA is in use,
    # torch keeps it for when it is: that may be the first line of a user's reward.
    torch.cuda.manual_seed_all(torch.initial_seed())
    for name in states.keys() - _HOST:
        # before CUDA is in use, set_rng_state would come before that seed, and be lost
        torch.cuda.init()
        torch.cuda.set_rng_state(states[name], name)


def _to_json(state: Any) -> Any:
    """A tensor becomes base64, a tuple or array a list; both nest."""
    if isinstance(state, torch.Tensor):
        return base64.b64encode(state.numpy().tobytes()).decode("ascii")
    return [_to_json(part) for part in state] if isinstance(state, tuple) else getattr(state, "tolist", lambda: state)()


def _from_json(name: str, value: Any) -> Any:
    if name == "python":
        version, words, gauss = value
        return (version, tuple(words), gauss)
    if name == "numpy":
        kind, words, *rest = value
        return (kind, np.array(words, np.uint32), *rest)
    return torch.frombuffer(bytearray(base64.b64decode(value, validate=True)), dtype=torch.uint8)
