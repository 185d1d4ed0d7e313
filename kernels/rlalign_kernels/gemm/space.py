"""Schedules of ``linear``: the table that doctor.py compares, and what tune.py chooses from.

None may change a bit; which of them a GPU has the shared memory for shows when it is launched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from rlalign_kernels.gemm import schedules
from rlalign_kernels.gemm.chain_plan import FLOAT32_BLOCK
from rlalign_kernels.gemm.schedules import FEW_ROWS, HOPPER_TILES, HopperTile, Layer, Tile
from rlalign_kernels.gpu import BOX_ALIGNMENT, architecture

_STAGE_BYTES = 225_000
# Rows that a tile may cover in vain.
_FEWEST = 16
_MANY = 1 << 20
# On both sides of every bound of the choosers'.
_TABLE_ROWS = (1, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 1024, 16384)


def layer_of(x: torch.Tensor, weight: torch.Tensor) -> Layer:
    """Of x [M, K] and weight [N, K], with one leaf."""
    from rlalign_kernels.gemm.triton_backend import in_boxes  # triton may be missing where nobody asks for it

    boxes = all(in_boxes(t.stride(), t.shape[1], t.dtype) and t.data_ptr() % BOX_ALIGNMENT == 0 for t in (x, weight))
    return Layer(*weight.shape, x.dtype, 1, architecture(x.device), boxes)


def chosen(layer: Layer, num_rows: int, out_dtype: torch.dtype, num_processors: int) -> Tile | HopperTile:
    """What runs without a table of measured schedules."""
    found = None
    if schedules.takes_hopper_tiles(layer, out_dtype):
        found = schedules.hopper_tile(layer, num_rows, out_dtype, num_processors)
    return found or schedules.tile(layer, num_rows)


def table(layer: Layer, out_dtype: torch.dtype, num_processors: int) -> list[Tile | HopperTile]:
    """All that ``chosen`` takes for some number of rows."""
    found = [chosen(layer, num_rows, out_dtype, num_processors) for num_rows in _TABLE_ROWS]
    if schedules.takes_hopper_tiles(layer, out_dtype):
        found += [schedules.fitted(tile, out_dtype) for tile in HOPPER_TILES]
    return list(dict.fromkeys(found))


def candidates(layer: Layer, num_rows: int, out_dtype: torch.dtype) -> list[Tile | HopperTile]:
    """For one chain (leaves = 1), without tiles that are mostly padding at so many rows; in no order."""
    if layer.leaves != 1:
        raise NotImplementedError(f"linear: candidates for leaves={layer.leaves} are not there; use 1")
    found: list[Tile | HopperTile] = list(_stock_tiles(layer, num_rows))
    if schedules.takes_hopper_tiles(layer, out_dtype):
        found += _hopper_tiles(num_rows, out_dtype)
    return found


def known_tiles(layer: Layer) -> set[Tile | HopperTile]:
    """All that ``candidates`` could return for any number of rows on GPUs of the layer's architecture."""
    found: set[Tile | HopperTile] = set()
    for num_rows in (16, 32, FEW_ROWS, _MANY):
        found.update(_stock_tiles(layer, num_rows))
    if layer.boxes and layer.architecture == (9, 0) and layer.dtype != torch.float32:
        found.update(_hopper_tiles(_MANY, layer.dtype))
    return found


def _stock_tiles(layer: Layer, num_rows: int) -> Iterator[Tile]:
    if layer.dtype == torch.float32:
        for block_m, block_n, warps in ((16, 32, 2), (16, 64, 4), (32, 32, 4), (64, 32, 4), (64, 64, 4), (64, 64, 8)):
            if block_m <= max(_FEWEST, 2 * num_rows):
                yield Tile(block_m, block_n, FLOAT32_BLOCK, warps, 3)
        return
    tma = layer.boxes and layer.architecture == (9, 0)
    if num_rows <= FEW_ROWS:
        block_m = 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64
        for block_n, block_k, stages in (
            (16, 256, 4), (32, 128, 6), (32, 256, 4), (64, 64, 4), (64, 128, 3), (64, 128, 4), (64, 128, 6),
            (128, 64, 4), (128, 128, 4),
        ):  # fmt: skip
            if stages * (block_m + block_n) * block_k * layer.dtype.itemsize <= _STAGE_BYTES:
                yield Tile(block_m, block_n, block_k, 4, stages, swap=True, tma=tma)
        yield Tile(block_m, 64, 64, 4, 3, swap=True)
        return
    for block_m, block_n, block_k, warps, stages in (
        (64, 64, 64, 4, 3), (64, 128, 64, 4, 4), (128, 64, 128, 4, 4), (128, 128, 64, 8, 4), (128, 256, 64, 8, 4)
    ):  # fmt: skip
        if tma and block_m <= 2 * num_rows:
            yield Tile(block_m, block_n, block_k, warps, stages, tma=True)
    yield Tile(64, 64, 64, 4, 3)
    yield Tile(128, 128, 32, 8, 3)


def _hopper_tiles(num_rows: int, out_dtype: torch.dtype) -> list[HopperTile]:
    """Every tile of the chooser's, both ways round where few columns make that sensible."""
    few = [
        tile
        for cols in (16, 32, FEW_ROWS)
        for tile in (
            HopperTile(1, cols, swap=cols < 64, block_k=128, chunk=16),
            HopperTile(1, cols, swap=cols >= 64, block_k=128, chunk=16),
            HopperTile(1, cols, chunk=16),
        )
    ]
    both = [replace(tile, swap=swap) for tile in HOPPER_TILES for swap in sorted({tile.swap, tile.all_cols < 96})]
    wanted = [tile for tile in (*few, *both) if _tokens(tile) <= max(_FEWEST, 2 * num_rows)]
    return list(dict.fromkeys(schedules.fitted(tile, out_dtype) for tile in wanted))


def _tokens(tile: HopperTile) -> int:
    """Rows of x that a tile covers."""
    return tile.all_cols if tile.swap else tile.rows
