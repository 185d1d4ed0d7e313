"""The call of a compiled Triton kernel that costs the host least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from triton import knobs
from triton.runtime import driver


def runner(compiled: Any, grid: tuple[int, int, int]) -> Callable[[int, Sequence[Any], Sequence[Any]], None]:
    """``run(device, pointers, rest)`` launches ``compiled`` on the device's current stream; two parts of its arguments.

    As ``compiled[grid]`` does, less what that prepares for a profiler's hooks while there is none.
    """
    direct, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    with_hooks, hooks, stream_of = compiled[grid], knobs.runtime, driver.active.get_current_stream

    def run(device: int, pointers: Sequence[Any], rest: Sequence[Any]) -> None:
        stream = stream_of(device)
        if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
            with_hooks(*pointers, *rest, stream=stream)
        else:
            direct(*grid, stream, function, metadata, None, None, None, *pointers, *rest)

    return run
