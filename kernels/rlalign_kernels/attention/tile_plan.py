"""The plan of attention on a GPU: where keys are cut, and in which order their partial sums meet.

Keys are cut into tiles at multiples of ``kv_tile`` and into splits at multiples of ``split``, both counted from the
sequence's first key. Within a split, tiles ascend through one online softmax that starts from (-1e30, 0, 0); the
splits' results are merged ascending, from the same start. Row sums fold a tile's columns in halves down to
``sum_width`` running sums. Sizes follow from head dims, dtype and architecture alone: measured best on an H200 at head
dim 128.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

# What a tile of keys and values may take of shared memory, so that two of each fit beside the queries.
TILE_BYTES = 32 * 1024
# 100 KiB of shared memory instead of 164 and more.
SMALL_ARCHITECTURES = frozenset({(8, 6), (8, 9), (12, 0), (12, 1)})
SMALL_TILE_BYTES = 16 * 1024
LARGEST_TILE = 128
# Products in float32 run on ordinary units, unrolled: larger tiles spill.
LARGEST_FLOAT32_TILE = 32


@dataclass(frozen=True)
class TilePlan:
    """Sizes along the keys; everything else about a tile is schedule."""

    kv_tile: int
    split: int = 1024
    sum_width: int = 8


def padded(dim: int) -> int:
    """The power of two, 16 or more, that a head dim is padded to inside."""
    return max(16, 1 << (dim - 1).bit_length())


@cache
def tile_plan(head_dim: int, value_dim: int, dtype: torch.dtype, architecture: tuple[int, int]) -> TilePlan:
    """Of one attention layer on GPUs of ``architecture``, for instance (9, 0).

    Example:
        >>> tile_plan(128, 128, torch.bfloat16, (9, 0)).kv_tile
        128
    """
    row_bytes = padded(max(head_dim, value_dim)) * dtype.itemsize
    largest = LARGEST_FLOAT32_TILE if dtype == torch.float32 else LARGEST_TILE
    tile_bytes = SMALL_TILE_BYTES if architecture in SMALL_ARCHITECTURES else TILE_BYTES
    return TilePlan(max(16, min(largest, tile_bytes // row_bytes)))
