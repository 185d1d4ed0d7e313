"""The call of a compiled Triton kernel that costs the host least.

Triton's own looks at every argument of every call, constants included, to put descriptors in their places. On an H200's
host that is 6 of the 29 us of attention's forward. Where Triton is a version whose launcher is known, the places are
worked out once and only addresses change; elsewhere its own call is made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from threading import Lock
from typing import Any

import triton
from triton import knobs
from triton.runtime import driver

# ``run(device, tensors, pointers)``; pointers: the tensors' addresses, 0 for None; they are written over.
Run = Callable[[int, Sequence[Any], list[Any]], None]

_KNOWN_VERSIONS = ("3.6.",)
_KNOWN_LAUNCHER = "triton.backends.nvidia.driver"


def runner(
    compiled: Any, grid: tuple[int, int, int], arguments: Sequence[Any], boxed: Collection[int], rest: Sequence[Any]
) -> Run:
    """What launches ``compiled`` on a device's current stream with tensors like ``arguments``, and then ``rest``.

    ``boxed``: the places among ``arguments`` that hold descriptors, which lose their base: no tensor is kept. Nothing
    is prepared for a profiler's hooks while there is none.
    """
    hooks, stream_of = knobs.runtime, driver.active.get_current_stream
    descriptors = {index: arguments[index] for index in boxed}
    function, metadata = compiled.function, compiled.packed_metadata
    with_hooks, launch, lend = compiled[grid], compiled.run, _lending(descriptors, rest)
    direct = _direct(compiled, grid, arguments, descriptors, rest)
    for descriptor in descriptors.values():
        descriptor.base = None

    def run(device: int, tensors: Sequence[Any], pointers: list[Any]) -> None:
        stream = stream_of(device)
        if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
            lend(with_hooks, tensors, pointers, stream=stream)
        elif direct is not None:
            direct(stream, pointers)
        else:
            lend(launch, tensors, pointers, *grid, stream, function, metadata, None, None, None)

    return run


def _lending(descriptors: Mapping[int, Any], rest: Sequence[Any]) -> Callable[..., None]:
    """``call(launch, tensors, pointers, ...)``: with descriptors in their places, which have a tensor for it only."""
    lock = Lock()

    def call(
        launch: Callable[..., None], tensors: Sequence[Any], pointers: list[Any], *first: Any, **named: Any
    ) -> None:
        if not descriptors:
            launch(*first, *pointers, *rest, **named)
            return
        with lock:  # a launch has read its descriptors when it returns
            for index, descriptor in descriptors.items():
                descriptor.base = tensors[index]
                pointers[index] = descriptor
            try:
                launch(*first, *pointers, *rest, **named)
            finally:
                for descriptor in descriptors.values():
                    descriptor.base = None

    return call


def _direct(
    compiled: Any,
    grid: tuple[int, int, int],
    arguments: Sequence[Any],
    descriptors: Mapping[int, Any],
    rest: Sequence[Any],
) -> Callable[[int, Sequence[int]], None] | None:
    """The C function below Triton's launcher; None unless it is known to take what is given here."""
    launcher = compiled.run
    if not triton.__version__.startswith(_KNOWN_VERSIONS) or type(launcher).__module__ != _KNOWN_LAUNCHER:
        return None
    launch, metas = launcher.launch, []
    if descriptors:
        found = inspect.getclosurevars(launch).nonlocals
        launch, metas = found["launcher"], found["tensordesc_meta"]
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    if any(meta is None or meta["fp4_padded"] for meta in metas):
        return None  # such a descriptor is passed in another form
    encode = driver.active.utils.fill_tma_descriptor
    template = [*grid, 0, compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl, None, None]
    template += [compiled.packed_metadata, None, None, None]
    plain: list[tuple[int, int]] = []
    boxes: list[tuple[int, int, tuple[Any, ...]]] = []
    for index, argument in enumerate(arguments):
        if index not in descriptors:
            plain.append((index, len(template)))
            template.append(0)
            continue
        boxes.append((index, len(template), _encoding(argument, metas[len(boxes)])))
        template += [None, *argument.shape, *argument.strides]
    template += rest

    def direct(stream: int, pointers: Sequence[int]) -> None:
        call = template.copy()
        call[3] = stream
        for index, place in plain:
            call[place] = pointers[index]
        for index, place, encoding in boxes:
            call[place] = encode(pointers[index], *encoding)
        launch(*call)

    return direct


def _encoding(descriptor: Any, meta: Mapping[str, Any]) -> tuple[Any, ...]:
    """All that the hardware's form of a descriptor says besides its address."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    kind = TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]]
    padding = int(descriptor.padding == "nan")
    return (
        meta["swizzle"], meta["elem_size"], kind, meta["block_size"], list(descriptor.shape), list(descriptor.strides),
        padding,
    )  # fmt: skip
