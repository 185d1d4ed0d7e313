"""What attention's Hopper kernels share: boxes of one sequence, a queue of tiles, and the keys of a tile.

A kernel is persistent: one producer warp draws tiles from a counter in device memory, copies their boxes to shared
memory and tells two consumer warpgroups about them; which program computes a tile, and when, cannot change its bits.
Rows past a sequence's end arrive as zeros and are never written, whatever the next sequence holds.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from rlalign_kernels.attention import triton_forward, triton_tiles
from rlalign_kernels.hopper_common import copy_in, copy_out

# A sequence's rows end where a descriptor's third dimension does; the first two bring the address back (see load_box).
ROWS_BOUND = gl.constexpr(1 << 30)
ADDRESS_WRAP = 1 << 34
# A tile in the queue: head, first token of the queries, their number, the number of keys, first row or key.
TILE_FIELDS = gl.constexpr(5)
TILE_SLOTS = gl.constexpr(2)
_NO_TILE = gl.constexpr(-1)
# One value for every thread: of the producer's warp, and of a consumer's four.
_PRODUCER_VALUE = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))
_CONSUMER_VALUE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))

find_sequence = gluon.jit(triton_tiles.find_sequence.fn)
key_range = gluon.jit(triton_forward.key_range.fn)


@gluon.jit
def load_box(desc, begin, length, row, column, full, box):
    """Rows from ``row`` of the sequence of ``length`` rows at ``begin``; those past its end come as zeros.

    The bound of the third dimension lies at the sequence's end; with the strides of ``box_descriptor`` the three
    coordinates' offsets add up, modulo 2^64, to row begin + row.
    """
    copy_in(desc, [ROWS_BOUND, begin + length, ROWS_BOUND - length + row, column], full, box)


@gluon.jit
def store_box(desc, begin, length, row, column, box):
    """The converse: rows past the sequence's end are not written."""
    copy_out(desc, [ROWS_BOUND, begin + length, ROWS_BOUND - length + row, column], box)


@gluon.jit
def tell_tile(tile_s, full, empty, count, head, begin, num_queries, num_keys, first):
    """Producer: put the ``count``-th tile into the queue."""
    slot = count % TILE_SLOTS
    mbarrier.wait(empty.index(slot), (count // TILE_SLOTS & 1) ^ 1)
    fields = (head, begin, num_queries, num_keys, first)
    for i in gl.static_range(TILE_FIELDS):
        tile_s.index(slot * TILE_FIELDS + i).store(gl.full([1], fields[i], gl.int32, _PRODUCER_VALUE))
    mbarrier.arrive(full.index(slot))


@gluon.jit
def tell_end(tile_s, full, empty, count):
    tell_tile(tile_s, full, empty, count, _NO_TILE, 0, 0, 0, 0)


@gluon.jit
def _field(tile_s, index):
    return gl.max(tile_s.index(index).load(_CONSUMER_VALUE), 0)


@gluon.jit
def hear_tile(tile_s, full, empty, count):
    """Consumer: (head, begin, num_queries, num_keys, first) of the ``count``-th tile; a negative head ends the work."""
    slot = count % TILE_SLOTS
    mbarrier.wait(full.index(slot), count // TILE_SLOTS & 1)
    head = _field(tile_s, slot * TILE_FIELDS)
    begin = _field(tile_s, slot * TILE_FIELDS + 1)
    num_queries = _field(tile_s, slot * TILE_FIELDS + 2)
    num_keys = _field(tile_s, slot * TILE_FIELDS + 3)
    first = _field(tile_s, slot * TILE_FIELDS + 4)
    mbarrier.arrive(empty.index(slot))
    return head, begin, num_queries, num_keys, first


@gluon.jit
def tiles_of_keys(
    row0, num_queries, num_keys, left, right,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """key_range in tiles; a row that sees no key still meets one tile, which changes nothing."""
    begin, whole, part, end = key_range(
        row0, num_queries, num_keys, left, right, 1, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    begin = begin // BLOCK_N
    end = gl.maximum((gl.maximum(end, 0) + BLOCK_N - 1) // BLOCK_N, begin + 1)
    return begin, whole // BLOCK_N, part // BLOCK_N, end
