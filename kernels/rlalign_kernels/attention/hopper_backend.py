"""Launches of attention's Hopper kernels. Imported only where they can run: see schedules.hopper_available."""

from __future__ import annotations

from functools import cache

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from rlalign_kernels.attention.hopper_backward import hopper_dq_kernel, row_terms_kernel
from rlalign_kernels.attention.hopper_backward_keys import hopper_dkv_kernel
from rlalign_kernels.attention.hopper_forward import hopper_forward_kernel
from rlalign_kernels.attention.hopper_tiles import ADDRESS_WRAP, ROWS_BOUND, WARPGROUP_ROWS
from rlalign_kernels.attention.schedules import HopperTile
from rlalign_kernels.attention.tile_plan import TilePlan

_GLUON_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_TERMS_LAYOUT = gl.NVMMASharedLayout(0, 32, 1)
_LOG2E = 1.4426950408889634
# Larger than any coordinate.
_UNBOUNDED = 0x7FFF0000


def box_descriptor(x: torch.Tensor, num_rows: int) -> TensorDescriptor:
    """Of x [T, heads, D], for boxes of ``num_rows`` tokens of one head that end where their sequence does.

    Coordinates: see hopper_tiles.load_box. The first dimension's stride takes back, modulo 2^64, what the third's
    coordinate adds for its bound.
    """
    stride, dim = x.stride(0), x.shape[2]
    return TensorDescriptor(
        x,
        [_UNBOUNDED, _UNBOUNDED, ROWS_BOUND.value, x.shape[1] * dim],
        [ADDRESS_WRAP - stride, stride, stride, 1],
        [1, 1, num_rows, dim],
        _box_layout(num_rows, dim, x.dtype),
    )


@cache
def _box_layout(num_rows: int, dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, 1, num_rows, dim], _GLUON_DTYPES[dtype])


def in_boxes(*tensors: torch.Tensor) -> bool:
    """Whether the copy engine can read each [T, heads, D]: heads side by side, rows apart and on 16-byte boundaries."""
    return all(
        x.numel() > 0
        and x.stride(2) == 1
        and (x.shape[1] == 1 or x.stride(1) == x.shape[2])
        and x.stride(0) >= x.shape[1] * x.shape[2]
        and x.stride(0) * x.element_size() % 16 == 0
        and x.data_ptr() % 16 == 0
        for x in tensors
    )


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    sinks: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    counter: torch.Tensor,
    plan: TilePlan,
    tile: HopperTile,
    num_programs: int,
    *,
    multiplier: float,
    left: int | None,
    right: int | None,
    one_split: bool,
) -> None:
    """Fills out [T, Hq, D] and lse [T, Hq]. ``counter``: int32, 0 between launches. left and right as in Masking."""
    heads, num_sequences = q.shape[1], cu_seqlens_q.shape[0] - 1
    num_tiles = (q.shape[0] // tile.block_m + num_sequences) * heads
    rows = WARPGROUP_ROWS.value
    hopper_forward_kernel[(min(num_programs, num_tiles),)](
        box_descriptor(q, rows), box_descriptor(k, tile.block_n), box_descriptor(v, tile.block_n),
        box_descriptor(out, rows), q if lse is None else lse, q if sinks is None else sinks,
        cu_seqlens_q, cu_seqlens_k, counter, multiplier, left or 0, right or 0, num_sequences, num_tiles,
        HEADS=heads, GROUP=heads // k.shape[1], HEAD_DIM=q.shape[2], SPLIT=plan.split,
        WIDTH=plan.sum_width, HAS_LEFT=left is not None, HAS_RIGHT=right is not None, HAS_SINK=sinks is not None,
        HAS_LSE=lse is not None, ONE_SPLIT=one_split, num_warps=4, **_launch(tile),
    )  # fmt: skip


def backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    counter: torch.Tensor,
    tiles: tuple[HopperTile, HopperTile],
    num_programs: int,
    *,
    scale: float,
    left: int | None,
    right: int | None,
) -> None:
    """Fills dq, and dk and dv, which come as zeros, where they are wanted. ``tiles``: for dq and for dk, dv."""
    heads, kv_heads, dim, num_sequences = q.shape[1], k.shape[1], q.shape[2], cu_seqlens_q.shape[0] - 1
    rows = WARPGROUP_ROWS.value
    num_row_tiles = q.shape[0] // rows + num_sequences
    terms = torch.empty(2 * heads * num_row_tiles * rows, dtype=torch.float32, device=q.device)
    row_terms_kernel[(num_row_tiles, heads)](
        out, grad, lse, terms, cu_seqlens_q, num_sequences, out.stride(0), out.stride(1), grad.stride(0),
        grad.stride(1), HEADS=heads, VALUE_DIM=dim, BLOCK_M=rows, num_warps=4,
    )  # fmt: skip
    terms_desc = TensorDescriptor(terms, [terms.numel()], [1], [rows], _TERMS_LAYOUT)
    q_desc, do_desc = box_descriptor(q, rows), box_descriptor(grad, rows)
    numbers = (scale, scale * _LOG2E, left or 0, right or 0, num_sequences)
    constants = dict(
        GROUP=heads // kv_heads, HEAD_DIM=dim, HAS_LEFT=left is not None, HAS_RIGHT=right is not None, num_warps=4
    )
    if dq is not None:
        tile = tiles[0]
        num_tiles = (q.shape[0] // tile.block_m + num_sequences) * heads
        hopper_dq_kernel[(min(num_programs, num_tiles),)](
            q_desc, do_desc, box_descriptor(k, tile.block_n), box_descriptor(v, tile.block_n), terms_desc,
            box_descriptor(dq, rows), cu_seqlens_q, cu_seqlens_k, counter, *numbers, num_tiles, num_row_tiles,
            HEADS=heads, **constants, **_launch(tile),
        )  # fmt: skip
    if dk is not None:
        tile = tiles[1]
        num_tiles = (k.shape[0] // tile.block_n + num_sequences) * kv_heads
        hopper_dkv_kernel[(min(num_programs, num_tiles),)](
            q_desc, do_desc, box_descriptor(k, rows), box_descriptor(v, rows), terms_desc, box_descriptor(dk, rows),
            box_descriptor(dv, rows), cu_seqlens_q, cu_seqlens_k, counter, *numbers, num_tiles, num_row_tiles,
            KV_HEADS=kv_heads, **constants, **_launch(tile),
        )  # fmt: skip


def _launch(tile: HopperTile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "STAGES": tile.num_stages,
        "CONSUMER_REGISTERS": tile.consumer_registers, "PRODUCER_REGISTERS": tile.producer_registers,
    }  # fmt: skip
