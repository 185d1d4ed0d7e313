"""What attention's Hopper kernels share: boxes of one sequence, a queue of tiles, and the plan's arithmetic in Gluon.

A kernel is persistent: one producer warp draws tiles from a counter in device memory, copies their boxes to shared
memory and tells two consumer warpgroups about them; which program computes a tile, and when, cannot change its bits.
Rows past a sequence's end arrive as zeros and are never written, whatever the next sequence holds.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from rlalign_kernels.attention import triton_forward, triton_tiles

FLOOR = gl.constexpr(triton_tiles.FLOOR.value)
LOG2E = gl.constexpr(triton_tiles.LOG2E.value)
LN2 = gl.constexpr(triton_tiles.LN2.value)

# A sequence's rows end where a descriptor's third dimension does; the first two bring the address back (see box_at).
ROWS_BOUND = gl.constexpr(1 << 30)
ADDRESS_WRAP = 1 << 34
# Rows of one warpgroup.
WARPGROUP_ROWS = gl.constexpr(64)
# A tile in the queue: head, first token of the queries, their number, the number of keys, first row or key.
TILE_FIELDS = gl.constexpr(5)
TILE_SLOTS = gl.constexpr(2)
_NO_TILE = gl.constexpr(-1)
# One value for every thread: of the producer's warp, and of a consumer's four.
_PRODUCER_VALUE = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))
_CONSUMER_VALUE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))

# Names that moved between Triton's versions.
_REINTERPRET_IS_PUBLIC = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
all_warps_meet = getattr(gl, "thread_barrier", None) or gl.barrier
copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

find_sequence = gluon.jit(triton_tiles.find_sequence.fn)
key_range = gluon.jit(triton_forward.key_range.fn)


@gluon.jit
def as_box(memory, desc):
    """The same shared memory, or its beginning, as a box of ``desc``."""
    if _REINTERPRET_IS_PUBLIC:
        return memory.reinterpret(desc.dtype, desc.block_type.shape, desc.layout)
    else:
        return memory._reinterpret(desc.dtype, desc.block_type.shape, desc.layout)


@gluon.jit
def barriers(count: gl.constexpr, arrivals: gl.constexpr):
    """``count`` mbarriers [count, 1], each completed by ``arrivals`` arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(count):
        mbarrier.init(made.index(i), arrivals)
    return made


@gluon.jit
def boxes(desc, count: gl.constexpr):
    """Shared memory for ``count`` boxes of ``desc``."""
    shape: gl.constexpr = [count] + desc.block_type.shape  # noqa: RUF005  Gluon reads no starred list
    return gl.allocate_shared_memory(desc.dtype, shape, desc.layout)


@gluon.jit
def matrix(box):
    """[rows, columns] of a box."""
    return box.reshape([box.shape[2], box.shape[3]])


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
    _copy_out(desc, [ROWS_BOUND, begin + length, ROWS_BOUND - length + row, column], box)


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


@gluon.jit
def draw(counter_ptr):
    """Number of the next tile that nobody has drawn."""
    return gl.atomic_add(counter_ptr, 1, sem="relaxed")


@gluon.jit
def leave_counter(counter_ptr, drawn, num_tiles):
    """Every program draws one number too many; who draws the last of them sets the counter back for the next launch."""
    if drawn == num_tiles + gl.num_programs(0) - 1:
        gl.store(counter_ptr, 0)


@gluon.jit
def _halve(x, M: gl.constexpr, N: gl.constexpr):
    low, high = x.reshape([M, 2, N // 2]).permute([0, 2, 1]).split()
    return low + high


@gluon.jit
def fold(x, M: gl.constexpr, N: gl.constexpr, WIDTH: gl.constexpr):
    """[M, N] -> [M, WIDTH] by adding halves, as in triton_tiles."""
    if N > WIDTH:
        return fold(_halve(x, M, N), M, N // 2, WIDTH)
    else:
        return x


@gluon.jit
def column(x, layout: gl.constexpr):
    """[M] -> [M, 1], to be broadcast over rows laid out as ``layout``."""
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, layout)), 1)
