"""The plan of a row sum on a GPU, and how it is executed.

Plan: column c belongs to lane c mod ``lanes``; a lane adds its columns in ascending order, one after another. Lanes are
added in neighbouring pairs until every 8 are one, then by halves: lane i and lane i + half, until one is left. Missing
columns count as 0. ``lanes`` follows from the row's length alone; float32 throughout.

Schedule: rows per program and warps. Neither can change a bit, since every addition is of two written-out operands.
Gradients are promised the same bits in every run, no more: Triton adds a row's columns, in the order of the tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

LARGEST_ROW = 16384
MOST_LANES = 1024
# Elements of a program that short rows share.
_SHARED = 4096
# Bytes that a thread loads at once.
_WIDEST_LOAD = 16
# Bytes of backward's tile of rows that share a program.
_SHARED_BYTES = 4096
# Bytes of a row that is read ahead, by architecture: shared memory holds six, a sum's gradient too, two stages of each.
_READ_AHEAD = {(8, 0): 24576, (9, 0): 32768, (10, 0): 32768}
_READ_AHEAD_ELSEWHERE = 8192


@dataclass(frozen=True)
class RowTile:
    """One launch: rows and warps per program; backward, stages of reading ahead."""

    rows: int
    num_warps: int
    num_stages: int = 1


@cache
def lanes(size: int) -> int:
    """Of rows of ``size``: the plan.

    Example:
        >>> lanes(100), lanes(4096)
        (128, 1024)
    """
    return min(MOST_LANES, 1 << max(0, size - 1).bit_length())


@cache
def forward_tile(size: int, itemsize: int) -> RowTile:
    """Short rows share a program; a warp takes a row of up to 4 KB alone."""
    if size <= 512:
        return RowTile(_SHARED // lanes(size), 4)
    if size > 8192:
        return RowTile(1, 8)
    return RowTile(1, 1 if size * itemsize <= 4096 else 2 if size * itemsize <= 8192 else 4)


@cache
def backward_tile(size: int, itemsize: int, architecture: tuple[int, int], centered: bool) -> RowTile:
    """A program holds the weight gradient of its rows besides the row itself, and the weight where it reads ahead.

    Rows are read ahead as far as shared memory has room for them, on the smallest GPU that ``architecture`` names, and
    registers for the weight; layer_norm (``centered``) has a bias gradient in them too.
    """
    row = size * itemsize
    if row <= _SHARED_BYTES // 2:
        return RowTile(_SHARED_BYTES // (lanes(size) * itemsize), 2, 3)
    four, eight = (5120, 8192) if centered else (6144, 12288)
    num_warps = 2 if size <= 1024 else 4 if size <= four else 8 if size <= eight and row <= 32768 else 16
    ahead = num_warps < 16 and row <= _READ_AHEAD.get(architecture, _READ_AHEAD_ELSEWHERE)
    return RowTile(1, num_warps, 3 if ahead else 1)


@cache
def backward_width(size: int, itemsize: int, num_warps: int) -> int:
    """Columns that a program takes at once: as many as its threads load with their widest loads, ``lanes`` at least.

    Example:
        >>> backward_width(1024, 2, 2), backward_width(16384, 2, 16), backward_width(16384, 4, 16)
        (1024, 4096, 2048)
    """
    loaded = num_warps * 32 * _WIDEST_LOAD // itemsize
    return max(lanes(size), min(loaded, 1 << max(0, size - 1).bit_length()))


@cache
def most_parts(size: int) -> int:
    """Programs that add up weight gradients, at most: about as many as are at work at a time, but the machine's number
    of processors has no say in the order of a sum."""
    return 512 if size <= 2048 else 256 if size <= 8192 else 128
