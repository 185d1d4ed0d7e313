"""Launches of the Hopper kernel. Imported only where it can run: see schedules.hopper_available."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from rlalign_kernels.gemm.hopper_chain import hopper_linear_kernel
from rlalign_kernels.gemm.schedules import HopperTile
from rlalign_kernels.launch import Launch

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
# Registers of a consumer's threads, by number of consumer warpgroups; of the producer's.
_CONSUMER_REGISTERS = {1: 240, 2: 240, 3: 160}
_PRODUCER_REGISTERS = 24


def make_call(
    num_rows: int,
    width: int,
    leaf: int,
    leaves: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    has_bias: bool,
    tile: HopperTile,
    num_programs: int,
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor], None]:
    """What fills out [num_rows, width] from x, weight, bias, out."""
    rows, cols = (width, num_rows) if tile.swap else (num_rows, width)
    num_tiles = triton.cdiv(rows, tile.rows) * triton.cdiv(cols, tile.cols + tile.more)
    chunk = min(tile.chunk, tile.cols, tile.more or tile.cols)
    launch = Launch(
        hopper_linear_kernel,
        (min(num_programs, num_tiles),),
        (rows, cols, triton.cdiv(leaf, tile.block_k), num_tiles),
        boxes={
            0: _box([64, tile.block_k], dtype),
            1: _box([tile.cols, tile.block_k], dtype),
            2: _box([tile.more or tile.cols, tile.block_k], dtype),
            3: _box([chunk, 64] if tile.swap else [64, chunk], out_dtype),
        },
        LEAVES=leaves, GROUPS=tile.groups, COLS=tile.cols, MORE=tile.more, STAGES=tile.num_stages, TURNS=tile.turns,
        CHUNK=chunk, SWAP=tile.swap, HAS_BIAS=has_bias,
        CONSUMER_REGISTERS=_CONSUMER_REGISTERS[tile.groups], PRODUCER_REGISTERS=_PRODUCER_REGISTERS, num_warps=4,
    )  # fmt: skip
    return partial(_run, launch, tile.swap)


def _run(
    launch: Launch, swap: bool, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    if swap:
        launch(weight, x, x, out, bias)
    else:
        launch(x, weight, weight, out, bias)


def _box(shape: list[int], dtype: torch.dtype) -> Callable[[torch.Tensor], TensorDescriptor]:
    """What makes a descriptor for boxes of ``shape`` of a matrix."""
    layout = gl.NVMMASharedLayout.get_default_for(shape, _DTYPES[dtype])
    return lambda x: TensorDescriptor(x, list(x.shape), list(x.stride()), shape, layout)
