"""Which shapes of the operators are looked at: a model's, or a size's that a machine gets through in seconds."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionShape:
    """Query heads, key heads, channels per head of queries and keys, and of values."""

    query_heads: int
    key_heads: int
    head_dim: int
    value_dim: int

    def __str__(self) -> str:
        dims = str(self.head_dim) if self.head_dim == self.value_dim else f"{self.head_dim}/{self.value_dim}"
        return f"heads {self.query_heads}/{self.key_heads}, dim {dims}"


@dataclass(frozen=True)
class Shapes:
    """linear: (N, K) of each layer; head: (V, H); norm: row lengths; intermediate: channels of the activation."""

    linear: tuple[tuple[int, int], ...]
    head: tuple[int, int]
    attention: tuple[AttentionShape, ...]
    norm: tuple[int, ...]
    intermediate: int


@dataclass(frozen=True)
class Setting:
    """Where and how operators are looked at. rows: batch sizes, ascending; lengths: of attention's sequences."""

    backend: str
    device: torch.device
    dtype: torch.dtype
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    schedules: bool = True
    """Whether every schedule of the tables is compared, which a GPU compiles at its first time."""


# a Qwen3 of a few megabytes
SMALL = Shapes(
    linear=((384, 128), (128, 384)),
    head=(1500, 128),
    attention=(AttentionShape(4, 2, 32, 32),),
    norm=(128, 32),
    intermediate=384,
)
# Qwen3-1.7B: gate, down, and gate and up as one product
LARGE = Shapes(
    linear=((6144, 2048), (2048, 6144), (12288, 2048)),
    head=(151936, 2048),
    attention=(AttentionShape(16, 8, 128, 128),),
    norm=(2048, 128),
    intermediate=6144,
)


def setting(backend: str, device: torch.device, dtype: torch.dtype, *, schedules: bool = True) -> Setting:
    """Sizes of batches and sequences that are a matter of seconds on ``device``."""
    if device.type == "cuda":
        return Setting(
            backend, device, dtype, (2, 3, 16, 17, 64, 65, 129, 257, 1024, 1025), (1, 17, 64, 129, 1024, 1100, 2300),
            schedules,
        )  # fmt: skip
    return Setting(backend, device, dtype, (2, 3, 7, 16, 17, 33, 64, 100), (1, 17, 64, 129), schedules)
