"""Weights on their way from trainer to rollout: raw bytes with a version and a hash, through Ray's object store.

On one GPU they need not leave its memory: shared_memory.py.

The trainer's process puts one bundle into the store; every engine reads it from there without a copy, checks what
arrived, and loads it. On a CPU by the SHA-256 of ``modeling.hash_tensors``: names, dtypes, shapes and bytes; where both
compute on a GPU by ``modeling.checksum_tensors``, which takes it milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Transport = Literal["object_store", "cuda_ipc"]


@dataclass(frozen=True, slots=True)
class WeightBundle:
    """One version of the weights, with its SHA-256 or its checksum.

    buffers: uint8 [bytes] by name; layout: (dtype, shape) by name.
    """

    version: int
    sha256: str | None
    buffers: dict[str, np.ndarray]
    layout: dict[str, tuple[str, tuple[int, ...]]]
    checksum: str | None = None


def bundle_weights(
    weights: Mapping[str, Tensor], version: int, sha256: str | None = None, *, checksum: str | None = None
) -> WeightBundle:
    """The weights as bytes. bfloat16 has no numpy type, hence bytes rather than arrays."""
    host = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    return WeightBundle(
        version=version,
        sha256=sha256,
        checksum=checksum,
        buffers={name: tensor.reshape(-1).view(torch.uint8).numpy() for name, tensor in host.items()},
        layout={name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in host.items()},
    )


def unbundle_weights(bundle: WeightBundle) -> dict[str, Tensor]:
    """The tensors again: views of the bundle's bytes, to be copied from, not written to."""
    return {
        name: torch.from_numpy(bundle.buffers[name]).view(getattr(torch, dtype)).reshape(shape)
        for name, (dtype, shape) in bundle.layout.items()
    }
