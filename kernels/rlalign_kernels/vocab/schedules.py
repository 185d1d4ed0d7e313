"""How the output layer's plan is executed: tiles, warps, pipeline depth. No choice here can change a bit.

Choosers are pure functions of row count, dtype and architecture. Values for sm_90 were measured on an H200; elsewhere
they are safe ones. Triton's interpreter counts as sm_90.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from rlalign_kernels.vocab.plan import HEAD_PLAN


@dataclass(frozen=True)
class HeadTile:
    """One launch over the logits: rows, ids and hidden channels per tile.

    swap: ids take the tensor cores' long side, for few rows. flatten: one pipeline through all tiles of a program.
    row_tiles: so many tiles of rows share the weights that are in cache. per_processor: programs on each.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swap: bool = False
    tma: bool = False
    flatten: bool = False
    row_tiles: int = 8
    per_processor: int = 1

    def __post_init__(self) -> None:
        if self.block_n not in (HEAD_PLAN.block, 2 * HEAD_PLAN.block):
            raise ValueError(f"HeadTile: block_n={self.block_n}; the plan's blocks are {HEAD_PLAN.block} ids wide")


@lru_cache(1024)
def head_tile(
    num_rows: int, dtype: torch.dtype, architecture: tuple[int, int], sample: bool = False, masked: bool = False
) -> HeadTile:
    """For ``num_rows`` rows of log-probs or of their gradient, or of draws with ``sample``.

    masked: with a support to read, or with logits to write.
    """
    if dtype == torch.float32:
        # such products run on ordinary units, unrolled: larger tiles spill
        return HeadTile(16 if num_rows <= 16 else 32, 128, HEAD_PLAN.float32_block, 4, 2)
    if architecture < (9, 0):
        return HeadTile(16 if num_rows <= 16 else 64, 128, 64 if architecture == (8, 0) else 32, 4, 3)
    if num_rows <= 16:
        return HeadTile(16, 128, 128, 4, 3, swap=True, tma=True, per_processor=2)
    if num_rows <= 32:
        return HeadTile(32, 128, 64, 4, 4, swap=True, tma=True, per_processor=2)
    if num_rows <= 64 or sample:
        return HeadTile(64, 128, 64, 4, 4, tma=True, per_processor=2)
    if masked:
        return HeadTile(128, 128, 64, 8, 4, tma=True, flatten=True)
    return HeadTile(128, 256, 64, 8, 3, tma=True, flatten=True, row_tiles=16)
