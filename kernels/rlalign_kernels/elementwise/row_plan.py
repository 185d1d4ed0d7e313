"""The plan of a row sum on a GPU, and how it is executed.

Plan: column c belongs to lane c mod ``lanes``; a lane adds its columns in ascending order, one after another. Lanes are
added in neighbouring pairs until every 8 are one, then by halves: lane i and lane i + half, until one is left. Missing
columns count as 0. ``lanes`` follows from the row's length alone; float32 throughout.

Schedule: rows per program and warps. Neither can change a bit, since every addition is of two written-out operands.
Gradients of long rows are promised the same bits in every run, no more: Triton adds their lanes, in the tile's order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

LARGEST_ROW = 16384
MOST_LANES = 1024
# Elements of a program that short rows share.
_SHARED = 4096
# Rows of more columns: backward's sums are in another order, and fewer programs add up weight gradients.
LONG_ROW = 2048
# Architectures with 164 KB of shared memory a program or more.
_ROOMY = ((8, 0), (9, 0), (10, 0))


@dataclass(frozen=True)
class RowTile:
    """One launch: rows and warps per program; backward, buffers of rows that are read ahead, and a thread's registers
    where the compiler would take so many that a processor held one program."""

    rows: int
    num_warps: int
    num_stages: int = 1
    registers: int | None = None


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
    """A program holds the weight gradient of its rows besides the row itself, and of short rows the weight too.

    Rows are read ahead as far as shared memory has room for them, on the smallest GPU that ``architecture`` names. From
    5,121 to 8,192 columns two programs share a processor instead; layer_norm's (``centered``) bias gradient leaves no
    room for that.
    """
    if size <= 512:
        return RowTile(_SHARED // 2 // lanes(size), 4)
    if size * itemsize <= 2048:
        return RowTile(2, 2, 3)
    if size > 5120 and not centered:
        return RowTile(1, 8, registers=128) if size <= 8192 else RowTile(1, 16)
    num_warps = 2 if size <= 1024 else 4 if size <= 4096 else 8 if size * itemsize <= 32768 else 16
    most = 16384 if architecture in _ROOMY else 8192
    return RowTile(1, num_warps, 3 if size * itemsize <= most else 1)


@cache
def rows_per_part(num_rows: int, tile_rows: int, size: int) -> int:
    """Rows whose weight gradients one program adds up: at most 512 programs, 256 of long rows, each with a power of two
    of tiles."""
    tiles = -(-num_rows // tile_rows)
    per_part = -(-tiles // (512 if size <= LONG_ROW else 256))
    return tile_rows * (1 << max(0, per_part - 1).bit_length())
