"""``linear`` on the "triton" backend: which kernel, which grid. Imported only when it is used."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from rlalign_kernels import tuned
from rlalign_kernels.gemm import space
from rlalign_kernels.gemm.chain_plan import FLOAT32_BLOCK
from rlalign_kernels.gemm.schedules import HopperTile, Layer, Tile
from rlalign_kernels.gemm.triton_chain import linear_kernel
from rlalign_kernels.gpu import BOX_ALIGNMENT, architecture, num_processors
from rlalign_kernels.launch import Launch

# x, weight, bias, out
Call = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor], None]
_REMEMBERED = 4096


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    leaves: int = 1,
    *,
    out_dtype: torch.dtype | None = None,
    schedule: Tile | HopperTile | None = None,
) -> torch.Tensor:
    """[M, N] of x [M, K] and weight [N, K], of any strides, rounded to ``out_dtype``, x's unless told.

    ``schedule``: another one than the chosen. Not differentiable; arguments are taken as checked.
    """
    dtype = out_dtype or x.dtype
    out = torch.empty((x.shape[0], weight.shape[0]), dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    call = _call(
        x.shape, x.stride(), weight.shape, weight.stride(), x.dtype, dtype, x.device, bias is not None, leaves,
        (x.data_ptr() | weight.data_ptr()) % BOX_ALIGNMENT == 0, schedule,
    )  # fmt: skip
    call(x, weight, bias, out)
    return out


@lru_cache(_REMEMBERED)
def _call(
    x_shape: tuple[int, int],
    x_stride: tuple[int, int],
    w_shape: tuple[int, int],
    w_stride: tuple[int, int],
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    device: torch.device,
    has_bias: bool,
    leaves: int,
    aligned: bool,
    schedule: Tile | HopperTile | None,
) -> Call:
    """What to launch for tensors of this layout."""
    num_rows, depth = x_shape
    width = w_shape[0]
    boxes = aligned and in_boxes(x_stride, depth, dtype) and in_boxes(w_stride, depth, dtype)
    layer = Layer(width, depth, dtype, leaves, architecture(device), boxes)
    found = (
        schedule
        or tuned.linear_tile(layer, num_rows, out_dtype)
        or space.chosen(layer, num_rows, out_dtype, num_processors(device))
    )
    if isinstance(found, HopperTile):
        from rlalign_kernels.gemm import hopper_backend

        return hopper_backend.make_call(
            num_rows,
            width,
            depth // leaves,
            leaves,
            dtype,
            out_dtype,
            has_bias,
            found,
            num_processors(device),
        )
    if dtype == torch.float32 and found.block_k != FLOAT32_BLOCK:
        raise ValueError(f"linear: a tile of {found.block_k} k is another plan than float32's {FLOAT32_BLOCK}")
    launch = Launch(
        linear_kernel,
        (triton.cdiv(num_rows, found.block_m) * triton.cdiv(width, found.block_n),),
        (num_rows, width, depth // leaves, *x_stride, *w_stride),
        boxes={2: _box(found.block_m, found.block_k), 3: _box(found.block_n, found.block_k)} if found.tma else None,
        LEAVES=leaves, BLOCK_M=found.block_m, BLOCK_N=found.block_n, BLOCK_K=found.block_k, GROUP=found.group,
        SWAP=found.swap, TMA=found.tma, HAS_BIAS=has_bias, STAGES=found.num_stages, num_warps=found.num_warps,
    )  # fmt: skip
    return partial(_run, launch, found.tma)


def _run(
    launch: Launch, tma: bool, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    if tma:
        launch(x, weight, x, weight, bias, out)
    else:
        launch(x, weight, None, None, bias, out)


def in_boxes(stride: tuple[int, int], depth: int, dtype: torch.dtype) -> bool:
    """Whether the copy engine can read rows of ``depth`` numbers: in one piece, apart, on 16-byte boundaries."""
    return stride[1] == 1 and stride[0] >= depth > 0 and stride[0] * dtype.itemsize % BOX_ALIGNMENT == 0


def _box(num_rows: int, depth: int) -> Callable[[torch.Tensor], TensorDescriptor]:
    """What makes a descriptor for boxes [num_rows, depth] of a matrix."""
    return lambda x: TensorDescriptor(x, list(x.shape), list(x.stride()), [num_rows, depth])
