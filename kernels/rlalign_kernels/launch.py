"""Triton launches that cost the host little: what follows from shapes is worked out once, only pointers change.

Triton's own call binds, types and hashes every argument anew; on an H200's host that is 50 to 70 us for a kernel of 40
arguments, and the compiled kernel's call is 7 to 17. A ``Launch`` makes the first kind of call once for every device
and alignment of its tensors that it meets, and the second kind from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

# Triton compiles for pointers that lie on a multiple of so many bytes.
_ALIGNMENT = 16


class Launch:
    """A kernel with its grid, its numbers and its constants, to be called with its tensors.

    The kernel's parameters are, in this order: tensors, ``numbers``, constants. ``constants`` name the latter, and
    launch options such as num_warps. ``boxes``: parameters that are descriptors, by index, and what makes one of the
    tensor given there. Fits tensors of the shapes, strides and dtypes that it was made for: whoever makes one keeps it
    by those.
    """

    __slots__ = ("_boxes", "_constants", "_grid", "_kernel", "_numbers", "_rest", "_runs", "_templates")

    def __init__(
        self,
        kernel: Any,
        grid: Sequence[int],
        numbers: Sequence[int | float] = (),
        *,
        boxes: Mapping[int, Callable[[torch.Tensor], Any]] | None = None,
        **constants: Any,
    ) -> None:
        self._kernel, self._numbers, self._constants = kernel, tuple(numbers), constants
        self._grid = (*grid, 1, 1)[:3]
        self._rest = (*numbers, *(constants[name] for name in kernel.arg_names if name in constants))
        self._boxes = dict(boxes or {})
        self._templates: dict[int, Any] = {}
        self._runs: dict[tuple[int, int], Callable[..., None]] = {}

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        device = tensors[0].get_device()
        if device >= 0 and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self(*tensors)
        arguments: list[Any] = []
        alignment = 0
        for x in tensors:
            pointer = None
            if x is not None:
                pointer = x.data_ptr()
                alignment = 2 * alignment + (pointer % _ALIGNMENT == 0)
            arguments.append(pointer)
        run = self._runs.get((device, alignment))
        if run is None:
            return self._compile(tensors, (device, alignment))
        for index, template in self._templates.items():
            arguments[index] = _with_base(template, tensors[index])
        run(*arguments, *self._rest)

    def _compile(self, tensors: Sequence[torch.Tensor | None], key: tuple[int, int]) -> None:
        arguments: list[Any] = list(tensors)
        for index, make in self._boxes.items():
            arguments[index] = make(tensors[index])
        compiled = self._kernel[self._grid](*arguments, *self._numbers, **self._constants)
        if compiled is None:  # Triton's interpreter ran it
            return
        self._templates = {index: _with_base(arguments[index], None) for index in self._boxes}
        self._runs[key] = compiled[self._grid]


def _with_base(descriptor: Any, base: torch.Tensor | None) -> Any:
    """The same descriptor of another tensor, without the checks that this one has passed."""
    made = object.__new__(type(descriptor))
    made.__dict__.update(descriptor.__dict__)
    made.base = base
    return made
