"""How the chain plan is executed: tiles, warps, stages, which operand comes first. No choice here can change a bit.

Choosers are pure functions of layer shape, dtype, architecture and number of rows, asked once per layout. Values for
sm_90 were measured on an H200; elsewhere they are safe ones. ``architecture`` is (major, minor); Triton's interpreter
counts as (9, 0).
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch

from rlalign_kernels.gemm.chain_plan import FLOAT32_BLOCK

_log = logging.getLogger(__name__)
# Of an H100 or H200.
_PROCESSORS = 132
# Up to so many rows the time is that of reading the weights.
FEW_ROWS = 64
# From so many tiles per processor on, the largest tile is the fastest.
_MANY_ROUNDS = 6
# Bytes: of a program on sm_90, less its barriers; where the copy engine's rows may begin.
_SHARED_MEMORY = 232_448 - 512
_BOX_ALIGNMENT = 16


@dataclass(frozen=True)
class Tile:
    """One stock kernel's launch: tokens, weight rows and k per tile, warps, pipeline stages, weights as the rows of the
    product or not, copy engine or pointers, row tiles that take turns."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swap: bool = False
    tma: bool = False
    group: int = 8


@dataclass(frozen=True)
class HopperTile:
    """One warp-specialised kernel's launch: consumer warpgroups of 64 rows each, columns per tile, boxes in flight,
    weights as the rows or not, k per box, row tiles that take turns, columns that are written at a time, and
    columns beyond ``cols``, which is a power of two."""

    groups: int
    cols: int
    num_stages: int = 0
    swap: bool = True
    block_k: int = 64
    turns: int = 8
    chunk: int = 32
    more: int = 0

    @property
    def rows(self) -> int:
        return 64 * self.groups

    @property
    def all_cols(self) -> int:
        return self.cols + self.more


# What is tried for more than a few rows: tokens are the columns, or (swap=False) weight rows are. With the clocks in
# which an H200's processor is done with 64 k of it, fitted to 162 times of 6 layers, as are the two numbers below.
HOPPER_TILES = {
    HopperTile(2, 256, chunk=128): 1040,
    HopperTile(2, 256, swap=False, chunk=128): 1040,
    HopperTile(3, 128, swap=False, more=64): 1180,
    HopperTile(2, 128, more=64): 800,
    HopperTile(3, 128, turns=2): 800,
    HopperTile(2, 128, swap=False): 550,
    HopperTile(2, 64, swap=False, more=32): 480,
    HopperTile(2, 64, more=32): 490,
    HopperTile(1, 128, swap=False): 340,
    HopperTile(2, 64): 400,
    HopperTile(1, 64, more=16): 310,
    HopperTile(1, 64, block_k=128, swap=False, chunk=16): 260,
}
# Clocks in which a number of a finished tile is written.
_WRITING = 0.065
# Of a whole round's time, what a round takes at least in which few processors have a tile.
_LAST_ROUND = 0.84


@dataclass(frozen=True)
class Layer:
    """What a schedule may depend on besides the number of rows: weight [width, depth], the plan, the machine.

    ``boxes``: both operands lie so that the copy engine can read them.
    """

    width: int
    depth: int
    dtype: torch.dtype
    leaves: int
    architecture: tuple[int, int]
    boxes: bool


@cache
def hopper_available(architecture: tuple[int, int]) -> bool:
    """Whether Gluon's kernel can run: an sm_90 GPU, and a Triton with Gluon for it. Says so once where it lacks."""
    if architecture != (9, 0) or not torch.cuda.is_available():
        return False
    try:
        importlib.import_module("rlalign_kernels.gemm.hopper_backend")
    except (ImportError, AttributeError) as reason:
        _log.warning("linear: Hopper's kernel needs another Triton (%s); a slower one gives the same bits", reason)
        return False
    return True


def takes_hopper_tiles(layer: Layer, out_dtype: torch.dtype) -> bool:
    """Whether the warp-specialised kernel can compute this layer here."""
    return (
        layer.boxes
        and layer.dtype in (torch.bfloat16, torch.float16)
        and layer.width * out_dtype.itemsize % _BOX_ALIGNMENT == 0
        and hopper_available(layer.architecture)
    )


@lru_cache(4096)
def hopper_tile(layer: Layer, num_rows: int, out_dtype: torch.dtype, num_processors: int) -> HopperTile | None:
    """Of the warp-specialised kernel; None where the stock one is faster, or no tile fits leaves and memory."""
    if num_rows <= FEW_ROWS:
        found = _few_rows_hopper_tiles(layer, num_rows)
    else:
        found = list(HOPPER_TILES)
        # beyond, what the last round leaves idle matters less than the energy that the largest tile saves
        if _num_tiles(found[0], layer.width, num_rows) <= _MANY_ROUNDS * num_processors:
            found.sort(key=lambda tile: _clocks(tile, layer, num_rows, num_processors))
    for tile in found:
        if layer.leaves == 1 or (_holds(tile, layer.leaves) and layer.depth // layer.leaves % tile.block_k == 0):
            return fitted(tile, out_dtype)
    return None


def _few_rows_hopper_tiles(layer: Layer, num_rows: int) -> list[HopperTile]:
    """Where 64 weight rows per program leave processors idle, its deeper ring makes up for them; and all leaves."""
    if layer.leaves == 1 and layer.width > 2048:
        return []
    if num_rows > 32 and layer.width <= 2048:
        # 64 rows are a tile's: 16 weight rows beside them give every processor one
        return [HopperTile(1, 16, swap=False, block_k=128, chunk=16), HopperTile(1, 16, swap=False, chunk=16)]
    cols = 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64
    return [HopperTile(1, cols, swap=cols < 64, block_k=128, chunk=16), HopperTile(1, cols, chunk=16)]


def _num_tiles(tile: HopperTile, width: int, num_rows: int) -> int:
    rows, cols = (width, num_rows) if tile.swap else (num_rows, width)
    return -(-rows // tile.rows) * -(-cols // tile.all_cols)


def _clocks(tile: HopperTile, layer: Layer, num_rows: int, num_processors: int) -> float:
    """Estimated time of a launch, less what all tiles have in common."""
    whole, rest = divmod(_num_tiles(tile, layer.width, num_rows), num_processors)
    last = _LAST_ROUND + (1 - _LAST_ROUND) * rest / num_processors if rest else 0.0
    written = _WRITING * tile.rows * tile.all_cols * (whole + (rest > 0))
    return (whole + last) * HOPPER_TILES[tile] * layer.depth / 64 + written


def _holds(tile: HopperTile, leaves: int) -> bool:
    """Whether a tree's waiting leaves fit a consumer's registers."""
    waiting = tile.all_cols // 2 * leaves.bit_length()
    return waiting <= (112 if tile.groups == 3 else 192 if leaves < 8 else 128)


def fitted(tile: HopperTile, out_dtype: torch.dtype) -> HopperTile:
    """``tile`` with as many boxes in flight as shared memory holds beside what is finished of it."""
    chunk = min(tile.chunk, tile.cols, tile.more or tile.cols)
    stage = (tile.rows + tile.all_cols) * tile.block_k * 2
    room = _SHARED_MEMORY - tile.rows * chunk * out_dtype.itemsize
    return replace(tile, num_stages=min(12, room // stage))


@lru_cache(4096)
def tile(layer: Layer, num_rows: int) -> Tile:
    """Of the stock kernel."""
    if layer.dtype == torch.float32:
        return _float32_tile(layer, num_rows)
    if not layer.boxes or layer.architecture != (9, 0):
        return _pointer_tile(layer, num_rows)
    found = _few_rows_tile(layer, num_rows) if num_rows <= FEW_ROWS else _boxed_tile(num_rows)
    leaf = layer.depth // layer.leaves
    return found if layer.leaves == 1 or leaf % found.block_k == 0 else _pointer_tile(layer, num_rows)


def _float32_tile(layer: Layer, num_rows: int) -> Tile:
    """A sum is two numbers here, and so is every leaf that waits in registers."""
    if num_rows <= 16:
        return Tile(16, 32, FLOAT32_BLOCK, 2, 3)
    return Tile(64, 64, FLOAT32_BLOCK, 4, 3) if layer.leaves == 1 else Tile(32, 32, FLOAT32_BLOCK, 4, 3)


def _pointer_tile(layer: Layer, num_rows: int) -> Tile:
    """Fits the shared memory of every GPU from sm_80 on."""
    if num_rows <= FEW_ROWS:
        return Tile(16 if num_rows <= 16 else 64, 64, 64, 4, 3, swap=True)
    return Tile(128, 128, 32, 8, 3) if layer.leaves == 1 else Tile(64, 64, 64, 4, 3)


def _few_rows_tile(layer: Layer, num_rows: int) -> Tile:
    """The time is that of reading the weights: as many bytes under way as fit, and a program for every processor."""
    block_m = 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64
    if layer.width > 64 * _PROCESSORS:
        # two programs per processor, in half of its memory each
        return Tile(block_m, 64, 128, 4, 4 if block_m <= 32 else 3, swap=True, tma=True)
    if layer.width > 2048:
        return Tile(block_m, 64, 128, 4, 6, swap=True, tma=True)
    return Tile(block_m, 32, 256, 4, 4, swap=True, tma=True)


def _boxed_tile(num_rows: int) -> Tile:
    return Tile(128, 64, 128, 4, 4, tma=True) if num_rows <= 256 else Tile(128, 128, 64, 8, 4, tma=True)
