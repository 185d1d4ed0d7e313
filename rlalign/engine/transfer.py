"""A step's arrays onto the device: one copy that nobody waits for, instead of one wait per array."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

# Each array begins on such a boundary, since kernels are compiled for aligned pointers.
_ALIGNMENT = 64


def to_device(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """The arrays as tensors on ``device``. On a CPU they are views of them; to a GPU they go together, pinned."""
    if device.type != "cuda":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    packed = pack(arrays, pinned=True)
    return unpack(packed.to(device, non_blocking=True), arrays)


def pack(arrays: Mapping[str, np.ndarray], *, pinned: bool) -> Tensor:
    """All arrays one after another, aligned, as uint8 on the host."""
    packed = torch.empty(_offsets(arrays)[-1], dtype=torch.uint8, pin_memory=pinned)
    place = packed.numpy()
    for offset, array in zip(_offsets(arrays), arrays.values(), strict=False):
        place[offset : offset + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return packed


def unpack(packed: Tensor, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Views of what ``pack`` made of arrays of these shapes and dtypes, wherever it lies now."""
    views = {}
    for offset, (name, array) in zip(_offsets(arrays), arrays.items(), strict=False):
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        views[name] = packed[offset : offset + array.nbytes].view(dtype).view(array.shape)
    return views


def _offsets(arrays: Mapping[str, np.ndarray]) -> list[int]:
    """Where each array begins, and last the number of bytes of all."""
    offsets = [0]
    for array in arrays.values():
        offsets.append(offsets[-1] + -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT)
    return offsets
