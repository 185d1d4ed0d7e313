"""Schedules of the output layer: the table that doctor.py compares, and what tune.py chooses from."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rlalign_kernels.vocab.plan import HEAD_PLAN
from rlalign_kernels.vocab.schedules import HeadTile, head_tile

# Rows that a tile may cover in vain.
_FEWEST = 16
# On both sides of every bound of the chooser's.
_TABLE_ROWS = (1, 16, 17, 32, 33, 64, 65, 128, 129, 4096)


def table(dtype: torch.dtype, architecture: tuple[int, int], sample: bool) -> list[HeadTile]:
    """All that the chooser takes for some number of rows, with and without a support."""
    found = [
        head_tile(num_rows, dtype, architecture, sample, masked) for num_rows in _TABLE_ROWS for masked in (False, True)
    ]
    return list(dict.fromkeys(found))


def candidates(num_rows: int, dtype: torch.dtype, architecture: tuple[int, int], sample: bool) -> list[HeadTile]:
    """For log-probs, or for draws with ``sample``; without tiles that are mostly padding at so many rows."""
    return [tile for tile in _tiles(dtype, architecture, sample) if tile.block_m <= max(_FEWEST, 2 * num_rows)]


def known_tiles(dtype: torch.dtype, architecture: tuple[int, int], sample: bool) -> set[HeadTile]:
    """All that ``candidates`` could return for any number of rows."""
    return set(_tiles(dtype, architecture, sample))


def _tiles(dtype: torch.dtype, architecture: tuple[int, int], sample: bool) -> Iterator[HeadTile]:
    block = HEAD_PLAN.block
    if dtype == torch.float32:
        for block_m, warps, stages in ((16, 4, 2), (16, 2, 2), (32, 4, 2), (32, 8, 2), (64, 8, 1)):
            yield HeadTile(block_m, block, HEAD_PLAN.float32_block, warps, stages)
        return
    yield HeadTile(16, block, 64, 4, 3)
    yield HeadTile(64, block, 32, 4, 3)
    if architecture != (9, 0):
        yield HeadTile(64, block, 64, 4, 3)
        yield HeadTile(128, block, 32, 8, 3)
        return
    for block_m, block_k, stages, programs in ((16, 128, 3, 2), (16, 64, 6, 2), (16, 128, 4, 1), (32, 64, 4, 2)):
        yield HeadTile(block_m, block, block_k, 4, stages, swap=True, tma=True, per_processor=programs)
    for flatten in (False, True):
        yield HeadTile(64, block, 64, 4, 4, tma=True, flatten=flatten, per_processor=2)
    for stages, programs in ((3, 1), (4, 1), (3, 2)):
        yield HeadTile(128, block, 64, 8, stages, tma=True, per_processor=programs)
    if not sample:
        for flatten, row_tiles in ((False, 4), (False, 8), (False, 16), (True, 8), (True, 16)):
            yield HeadTile(128, 2 * block, 64, 8, 3, tma=True, flatten=flatten, row_tiles=row_tiles)
