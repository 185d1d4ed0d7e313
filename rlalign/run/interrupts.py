"""Ctrl-C and SIGTERM at moments when the weights belong to a finished step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(SystemExit):
    """SIGTERM arrived; exits 143, as a shell would report it."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class Interrupts:
    """Raises at once outside ``shield``, and when it ends inside of it.

    A second signal always raises at once: whoever presses Ctrl-C twice doesn't want to wait. ``torn`` is then True:
    the weights belong to no finished step.
    """

    def __init__(self) -> None:
        self.torn = False
        self._shielded = False
        self._pending: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        # only a main thread may set handlers; elsewhere, whoever owns it deals with signals
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def shield(self) -> Iterator[None]:
        """A part of a step that must be finished once it was begun."""
        self._shielded = True
        try:
            yield
        finally:
            self._shielded = False
        if self._pending is not None:
            raise _exception(self._pending)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._shielded and self._pending is None:
            self._pending = number
        else:
            self.torn = self._shielded
            raise _exception(number)


def _exception(number: int) -> BaseException:
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
