"""Triton launches that cost the host little: what follows from shapes is worked out once, only pointers change.

Triton's own call binds, types and hashes every argument anew; on an H200's host that is 50 to 70 us for a kernel of 40
arguments. A ``Launch`` makes that call once for every device and alignment of its tensors that it meets, and from then
on the compiled kernel's, without what that prepares for a profiler's hooks while there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cache, reduce
from operator import or_
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

if TYPE_CHECKING:
    from rlalign_kernels.triton_runner import Run

T = TypeVar("T")

# Triton compiles for pointers that lie on a multiple of so many bytes.
_ALIGNMENT = 16
# More than the layouts that a run alternates between. Batches of new lengths fill it: then all is decided once more.
_REMEMBERED = 4096


class Remembered(Generic[T]):
    """What was decided for the layouts that were met: a dict that starts anew when it is full."""

    def __init__(self, size: int = _REMEMBERED) -> None:
        self._size = size
        self._found: dict[Hashable, T] = {}
        self.get = self._found.get

    def __setitem__(self, key: Hashable, value: T) -> None:
        if len(self._found) >= self._size:
            self._found.clear()
        self._found[key] = value

    def __len__(self) -> int:
        return len(self._found)


class Launch:
    """A kernel with its grid, its numbers and its constants, to be called with its tensors.

    The kernel's parameters are, in this order: tensors, ``numbers``, constants. ``constants`` name the latter, and
    launch options such as num_warps. ``boxes``: parameters that are descriptors, by index, and what makes one of the
    tensor given there, which must lie where the copy engine can read it. Fits tensors of the shapes, strides and dtypes
    that it was made for: whoever makes one keeps it by those.
    """

    __slots__ = ("_boxes", "_constants", "_grid", "_kernel", "_numbers", "_rest", "_runs")

    def __init__(
        self,
        kernel: Any,
        grid: Sequence[int],
        numbers: Sequence[int | float] = (),
        *,
        boxes: Mapping[int, Callable[[torch.Tensor], Any]] | None = None,
        **constants: Any,
    ) -> None:
        # said, because its default is about to change, and follows an environment variable that no fingerprint sees
        constants.setdefault("enable_fp_fusion", True)
        self._kernel, self._numbers, self._constants = kernel, tuple(numbers), constants
        self._grid = (*grid, 1, 1)[:3]
        self._rest = (*numbers, *(constants[name] for name in kernel.arg_names if name in constants))
        self._boxes = dict(boxes or {})
        self._runs: dict[Hashable, Run] = {}

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        device = tensors[0].get_device()
        if device >= 0 and _several_devices() and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(*tensors)
        pointers: list[Any] = [0 if x is None else x.data_ptr() for x in tensors]
        key: Hashable = device
        if reduce(or_, pointers) % _ALIGNMENT or 0 in pointers:
            key = (device, *(None if x is None else x.data_ptr() % _ALIGNMENT == 0 for x in tensors))
        run = self._runs.get(key)
        if run is None:
            self._launch_first(tensors, key)
        else:
            run(device, tensors, pointers)

    def compile(self, *tensors: torch.Tensor | None) -> None:
        """For tensors like these, without a launch, so that none waits for a compiler later. Not in the interpreter."""
        if tensors[0].is_cuda:
            with torch.cuda.device(tensors[0].device):
                self._kernel.warmup(*self._arguments(tensors), *self._numbers, grid=self._grid, **self._constants)

    def _arguments(self, tensors: Sequence[torch.Tensor | None]) -> list[Any]:
        arguments: list[Any] = list(tensors)
        for index, make in self._boxes.items():
            arguments[index] = make(tensors[index])
        return arguments

    def _launch_first(self, tensors: Sequence[torch.Tensor | None], key: Hashable) -> None:
        arguments = self._arguments(tensors)
        compiled = self._kernel[self._grid](*arguments, *self._numbers, **self._constants)
        if compiled is None:  # Triton's interpreter ran it
            return
        from rlalign_kernels.triton_runner import runner  # triton may be missing where nobody asks for it

        self._runs[key] = runner(compiled, self._grid, arguments, self._boxes, self._rest)


@cache
def _several_devices() -> bool:
    return torch.cuda.device_count() > 1
