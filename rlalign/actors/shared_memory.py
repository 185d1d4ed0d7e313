"""Weights in a GPU's memory that other processes on that GPU read where they are: CUDA IPC.

The trainer's process copies each version into one buffer, whose handle it makes once; an engine's process opens the
handle once, and copies from there. Nothing passes through the host but the handle, and a checksum that both compute.
The buffer holds the version that was synced until the next one, whatever the trainer does to its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlalign.modeling import checksum_tensors, hash_tensors

# Bytes: where each tensor begins.
_ALIGNMENT = 64
# (dtype, shape, first byte) by name
Layout = dict[str, tuple[str, tuple[int, ...], int]]


@dataclass(frozen=True, slots=True)
class SharedWeights:
    """One version of the weights, as long as its buffer holds it. place: of the GPU, see ``gpu_of``."""

    version: int
    checksum: str
    place: str
    handle: tuple[Any, ...]
    layout: Layout


class SharedBuffer:
    """The trainer's side."""

    def __init__(self) -> None:
        self._layout: Layout = {}
        self._buffer: Tensor | None = None
        self._handle: tuple[Any, ...] = ()

    @torch.no_grad()
    def publish(self, weights: Mapping[str, Tensor], version: int) -> SharedWeights:
        """Copy the weights, all on one GPU, over the version before. Returns when others may read them."""
        layout, num_bytes = layout_of(weights)
        device = next(iter(weights.values())).device
        if layout != self._layout or self._buffer is None:
            self._layout, self._buffer = layout, torch.empty(num_bytes, dtype=torch.uint8, device=device)
            self._handle = export_memory(self._buffer)
        held = views_of(self._buffer, layout)
        for name, tensor in weights.items():
            held[name].copy_(tensor)
        # the checksum is of what others will read, and waits for the device
        return SharedWeights(version, checksum_tensors(held), gpu_of(device), self._handle, layout)

    def sha256(self) -> str:
        """SHA-256 of the version that was published last. Raises RuntimeError before the first."""
        if self._buffer is None:
            raise RuntimeError("publish() comes first")
        return hash_tensors(views_of(self._buffer, self._layout))


class SharedReader:
    """An engine's side; keeps the buffer open from version to version."""

    def __init__(self) -> None:
        self._handle: tuple[Any, ...] = ()
        self._buffer: Tensor | None = None

    def read(self, shared: SharedWeights, device: torch.device) -> dict[str, Tensor]:
        """Views of the published weights, to be copied from. Raises ValueError for weights on another GPU."""
        if (here := gpu_of(device)) != shared.place:
            raise ValueError(f"the weights are in the memory of GPU {shared.place}, this process is on GPU {here}")
        if self._buffer is None or self._handle != shared.handle:
            self._buffer, self._handle = import_memory(shared.handle), shared.handle
        return views_of(self._buffer, shared.layout)


def layout_of(weights: Mapping[str, Tensor]) -> tuple[Layout, int]:
    """Where each tensor goes in a buffer, and the bytes of all."""
    layout: Layout = {}
    end = 0
    for name, tensor in weights.items():
        layout[name] = (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), end)
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return layout, end


def views_of(buffer: Tensor, layout: Layout) -> dict[str, Tensor]:
    """The tensors of ``layout`` in a buffer of bytes."""
    views = {}
    for name, (dtype_name, shape, begin) in layout.items():
        dtype = getattr(torch, dtype_name)
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        views[name] = buffer[begin : begin + num_bytes].view(dtype).view(shape)
    return views


def gpu_of(device: torch.device) -> str:
    """Which GPU it is, for every process of the machine alike; "none" of a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "none"


def export_memory(buffer: Tensor) -> tuple[Any, ...]:
    """What ``import_memory`` needs in another process. Holds while the buffer lives."""
    from torch.multiprocessing.reductions import reduce_tensor

    return reduce_tensor(buffer)[1]


def import_memory(handle: tuple[Any, ...]) -> Tensor:
    """The buffer of another process on the same GPU. Raises RuntimeError where the system does not allow that."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    return rebuild_cuda_tensor(*handle)
