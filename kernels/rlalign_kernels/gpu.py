"""What every GPU backend asks about a device, and how it wants rows to lie. torch only."""

from __future__ import annotations

from functools import cache

import torch

# Bytes: where a row that the copy engine reads may begin.
BOX_ALIGNMENT = 16
_INTERPRETER_ARCHITECTURE = (9, 0)


def rows(x: torch.Tensor) -> torch.Tensor:
    """With a contiguous last dimension, as the kernels read it, and no expanded one (a sum's gradient has them)."""
    return x if x.stride(-1) == 1 and 0 not in x.stride() else x.contiguous()


@cache
def architecture(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else _INTERPRETER_ARCHITECTURE


@cache
def num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
