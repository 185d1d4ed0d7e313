"""What Hopper's Gluon kernels share: shared memory in boxes, barriers, a queue's counter, and sums of a fixed order."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

# Rows of one warpgroup.
WARPGROUP_ROWS = gl.constexpr(64)

# Names that moved between Triton's versions.
_REINTERPRET_IS_PUBLIC = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
all_warps_meet = getattr(gl, "thread_barrier", None) or gl.barrier
copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


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
    """[M, N] -> [M, WIDTH] by adding halves, as in triton_math."""
    if N > WIDTH:
        return fold(_halve(x, M, N), M, N // 2, WIDTH)
    else:
        return x


@gluon.jit
def column(x, layout: gl.constexpr):
    """[M] -> [M, 1], to be broadcast over rows laid out as ``layout``."""
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, layout)), 1)
