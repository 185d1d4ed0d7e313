"""How the chain plan is executed: tiles, warps, stages, which operand comes first. No choice here can change a bit.

Choosers are pure functions of layer shape, dtype, architecture and number of rows, asked once per layout. Values for
sm_90 were measured on an H200; elsewhere they are safe ones. ``architecture`` is (major, minor); Triton's interpreter
counts as (9, 0).
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from functools import cache, lru_cache

import torch

from rlalign_kernels.gemm.chain_plan import FLOAT32_BLOCK

_log = logging.getLogger(__name__)


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
    weights as the rows or not, k per box, row tiles that take turns, columns that are written at a time, boxes of
    weights by which requests to the cache run ahead of the copies (0: none)."""

    groups: int
    cols: int
    num_stages: int
    swap: bool = True
    block_k: int = 64
    turns: int = 8
    chunk: int = 128
    ahead: int = 0

    @property
    def rows(self) -> int:
        return 64 * self.groups


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


@lru_cache(4096)
def hopper_tile(layer: Layer, num_rows: int, out_dtype: torch.dtype) -> HopperTile | None:
    """Of the warp-specialised kernel; None where the stock one runs."""
    return None


@lru_cache(4096)
def tile(layer: Layer, num_rows: int) -> Tile:
    """Of the stock kernel."""
    if layer.dtype == torch.float32:
        return _float32_tile(num_rows)
    if not layer.boxes or layer.architecture != (9, 0):
        return _pointer_tile(num_rows)
    found = _few_rows_tile(layer, num_rows) if num_rows <= 64 else _boxed_tile(num_rows)
    leaf = layer.depth // layer.leaves
    return found if layer.leaves == 1 or leaf % found.block_k == 0 else _pointer_tile(num_rows)


def _float32_tile(num_rows: int) -> Tile:
    return Tile(16, 32, FLOAT32_BLOCK, 2, 3) if num_rows <= 16 else Tile(64, 64, FLOAT32_BLOCK, 4, 3)


def _pointer_tile(num_rows: int) -> Tile:
    """Fits the shared memory of every GPU from sm_80 on."""
    if num_rows <= 64:
        return Tile(16 if num_rows <= 16 else 64, 64, 64, 4, 3, swap=True)
    return Tile(128, 128, 32, 8, 3)


def _few_rows_tile(layer: Layer, num_rows: int) -> Tile:
    """The time is that of reading the weights: as many bytes under way as fit, and a program for every processor."""
    block_m = 16 if num_rows <= 16 else 32 if num_rows <= 32 else 64
    if layer.width > 4096:
        return Tile(block_m, 64, 128, 4, 6, swap=True, tma=True)
    if layer.width > 2048:
        return Tile(block_m, 32, 256, 4, 4, swap=True, tma=True)
    return Tile(block_m, 16, 256, 1, 4, swap=True, tma=True)


def _boxed_tile(num_rows: int) -> Tile:
    return Tile(128, 64, 128, 4, 4, tma=True) if num_rows <= 256 else Tile(128, 128, 64, 8, 4, tma=True)
