"""How attention's plan is executed: tiles along the rows, warps, pipeline depth. No choice here can change a bit.

Choosers are pure functions of features, dtype and architecture, asked at every call and therefore remembered. Values
for sm_90 were measured on an H200; elsewhere they are safe ones. ``architecture`` is (major, minor); Triton's
interpreter counts as (9, 0).
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from functools import cache, lru_cache

import torch

from rlalign_kernels.attention.tile_plan import SMALL_ARCHITECTURES, TilePlan, padded

_log = logging.getLogger(__name__)
# Rows of one sequence and key head that one tensor-core instruction takes: below, they would be padding.
_FEWEST_ROWS = 16
# So many queries are more than few rows, whatever the group.
MANY_QUERIES = _FEWEST_ROWS + 1


@dataclass(frozen=True)
class Tile:
    """One kernel's launch: rows and keys per tile, warps per program, pipeline stages, descriptors or pointers."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False


@dataclass(frozen=True)
class Shape:
    """What a schedule may depend on besides sizes of the batch."""

    head_dim: int
    value_dim: int
    group: int
    dtype: torch.dtype
    architecture: tuple[int, int]

    @property
    def widest(self) -> int:
        return padded(max(self.head_dim, self.value_dim))


@dataclass(frozen=True)
class HopperTile:
    """One warp-specialised kernel's launch: rows and keys per tile or box, boxes in flight, registers of a consumer's
    and of the producer's threads."""

    block_m: int
    block_n: int
    num_stages: int
    consumer_registers: int = 240
    producer_registers: int = 24


@cache
def hopper_available(architecture: tuple[int, int]) -> bool:
    """Whether Gluon's kernels can run: an sm_90 GPU, and a Triton with Gluon for it. Says so once where it lacks."""
    if architecture != (9, 0) or not torch.cuda.is_available():
        return False
    try:
        importlib.import_module("rlalign_kernels.attention.hopper_backend")
    except (ImportError, AttributeError) as reason:
        _log.warning("attention: Hopper's kernels need another Triton (%s); slower ones give the same bits", reason)
        return False
    return True


@lru_cache(1024)
def hopper_forward_tile(shape: Shape, has_cap: bool) -> HopperTile | None:
    """For sequences of many rows, None where the stock kernel runs: other head dims, float32, a soft cap."""
    if not _fits_hopper(shape) or has_cap:
        return None
    return HopperTile(128, 128, 2)


@lru_cache(1024)
def hopper_backward_tiles(shape: Shape, has_cap: bool) -> tuple[HopperTile, HopperTile] | None:
    """For dQ, and for dK and dV; None where the stock kernels run."""
    if not _fits_hopper(shape) or has_cap:
        return None
    return HopperTile(128, 64, 4), HopperTile(64, 128, 3)


def _fits_hopper(shape: Shape) -> bool:
    return (
        hopper_available(shape.architecture)
        and shape.dtype in (torch.bfloat16, torch.float16)
        and shape.head_dim == shape.value_dim
        and shape.head_dim in (64, 128)
    )


def _has_boxes(shape: Shape) -> bool:
    """Whether the hardware copies boxes, and has the shared memory for several of them: Hopper and large Blackwell."""
    return shape.architecture >= (9, 0) and shape.architecture not in SMALL_ARCHITECTURES


def few_rows(shape: Shape) -> int:
    """Up to so many rows (queries x heads of a group) a sequence is decoded rather than prefilled.

    Less than MANY_QUERIES x group.
    """
    return max(_FEWEST_ROWS, padded(shape.group))


@lru_cache(1024)
def prefill_tile(shape: Shape, plan: TilePlan) -> Tile:
    """For sequences of many rows."""
    if shape.dtype == torch.float32:
        return Tile(16 if shape.widest > 128 else 32, plan.kv_tile, 4, 2)
    if shape.widest > 128:
        return Tile(64, plan.kv_tile, 4, 2)
    return Tile(128, plan.kv_tile, 8, 3, tma=True) if _has_boxes(shape) else Tile(64, plan.kv_tile, 4, 2)


@lru_cache(1024)
def decode_tile(shape: Shape, plan: TilePlan, num_programs: int, num_processors: int, paged: bool) -> Tile:
    """For at most ``few_rows`` rows: the time is that of reading the keys.

    A program that has a processor to itself reads far ahead; programs that share one leave each other the memory.
    Behind a page table five stages are three buffers, the first two being the table's; without one they would not fit.
    """
    if not _has_boxes(shape):
        return Tile(few_rows(shape), plan.kv_tile, 4, 3 if shape.architecture == (8, 0) else 2)
    wide = shape.widest * shape.dtype.itemsize > 256
    stages = 5 if paged and num_programs <= num_processors and not wide else 3
    return Tile(few_rows(shape), plan.kv_tile, 4, stages, tma=True)


@lru_cache(1024)
def dq_tile(shape: Shape) -> Tile:
    """Gradient of the queries."""
    if shape.dtype == torch.float32:
        return Tile(16, 16, 4, 1)
    if shape.widest > 128:
        return Tile(64, 32, 8, 1)
    return Tile(128, 64, 8, 3) if _has_boxes(shape) else Tile(64, 64, 4, 2)


@lru_cache(1024)
def dkv_tile(shape: Shape) -> Tile:
    """Gradient of keys and values."""
    if shape.dtype == torch.float32:
        return Tile(16, 16, 4, 1)
    if shape.widest > 128:
        return Tile(32, 64 if shape.architecture not in SMALL_ARCHITECTURES else 32, 8, 1)
    return Tile(64, 64, 4, 3 if _has_boxes(shape) else 2)


def splits_apart(num_places: int, num_splits: int, num_processors: int) -> bool:
    """Whether each split of a decoded sequence gets a program of its own; a place is a sequence's key head.

    Not when there is one split, nor when the places fill the GPU and none is much longer than a program can read while
    the others are read.
    """
    return num_splits > 1 and (num_places < num_processors * 3 // 4 or num_splits > 8)
