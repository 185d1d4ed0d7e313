"""Launches of attention's Hopper kernels. Imported only where they can run: see schedules.hopper_available."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from rlalign_kernels.attention.hopper_backward import hopper_dq_kernel, row_terms_kernel
from rlalign_kernels.attention.hopper_backward_keys import hopper_dkv_kernel
from rlalign_kernels.attention.hopper_forward import hopper_forward_kernel
from rlalign_kernels.attention.hopper_tiles import ADDRESS_WRAP, ROWS_BOUND
from rlalign_kernels.attention.schedules import HopperTile, Shape
from rlalign_kernels.attention.tile_plan import TilePlan
from rlalign_kernels.attention.triton_problem import Masking
from rlalign_kernels.hopper_common import WARPGROUP_ROWS
from rlalign_kernels.launch import Launch

_GLUON_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_TERMS_LAYOUT = gl.NVMMASharedLayout(0, 32, 1)
# Larger than any coordinate.
_UNBOUNDED = 0x7FFF0000


def box_descriptor(x: torch.Tensor, num_rows: int) -> TensorDescriptor:
    """Of x [T, heads, D] or [pages, page, heads, D], for boxes of ``num_rows`` tokens of one head.

    They end where their sequence does. Coordinates: see hopper_tiles.load_box. The first dimension's stride takes back,
    modulo 2^64, what the third's coordinate adds for its bound.
    """
    x = _as_rows(x)
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


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """Pages one after the other."""
    return x.flatten(0, 1) if x.dim() == 4 else x


def in_boxes(*tensors: torch.Tensor) -> bool:
    """Whether the copy engine can read each [T, heads, D] or [pages, page, heads, D].

    Heads side by side, rows apart and on 16-byte boundaries, pages without gaps.
    """
    if any(x.dim() == 4 and x.stride(0) != x.shape[1] * x.stride(1) for x in tensors):
        return False
    return all(
        x.numel() > 0
        and x.stride(2) == 1
        and (x.shape[1] == 1 or x.stride(1) == x.shape[2])
        and x.stride(0) >= x.shape[1] * x.shape[2]
        and x.stride(0) * x.element_size() % 16 == 0
        and x.data_ptr() % 16 == 0
        for x in map(_as_rows, tensors)
    )


def forward(
    shape: Shape,
    plan: TilePlan,
    tile: HopperTile,
    masking: Masking,
    *,
    num_tokens: int,
    num_sequences: int,
    num_heads: int,
    num_programs: int,
    has_sinks: bool,
    has_lse: bool,
    one_split: bool,
    few_rows: int,
    page_size: int,
    stride_table: int,
) -> Launch:
    """Of q, k, v, out, lse, sinks, cu_seqlens_q, cu_seqlens_k, kv_lens, block_tables and a counter: int32, 0 between
    launches. few_rows, page_size: FEW_ROWS and PAGE of the kernel."""
    num_tiles = (num_tokens // tile.block_m + num_sequences) * num_heads
    rows, keys = (_boxes_of(n) for n in (WARPGROUP_ROWS.value, tile.block_n))
    return Launch(
        hopper_forward_kernel, (min(num_programs, num_tiles),),
        (masking.multiplier, masking.left or 0, masking.right or 0, num_sequences, num_tiles, stride_table),
        boxes={0: rows, 1: keys, 2: keys, 3: rows}, HEADS=num_heads, GROUP=shape.group, HEAD_DIM=shape.head_dim,
        SPLIT=plan.split, WIDTH=plan.sum_width, HAS_LEFT=masking.left is not None,
        HAS_RIGHT=masking.right is not None, HAS_SINK=has_sinks, HAS_LSE=has_lse, ONE_SPLIT=one_split,
        PAGE=page_size, FEW_ROWS=few_rows, **_launch(tile),
    )  # fmt: skip


class Backward:
    """Launches of dQ's, and of dK's and dV's kernel, and of what both need first: terms of every row."""

    def __init__(
        self,
        shape: Shape,
        tiles: tuple[HopperTile, HopperTile],
        masking: Masking,
        strides: tuple[int, int, int, int],
        *,
        num_tokens: int,
        num_keys: int,
        num_sequences: int,
        kv_heads: int,
        num_programs: int,
    ) -> None:
        """strides: of the output's and its gradient's tokens and heads."""
        rows, heads = WARPGROUP_ROWS.value, kv_heads * shape.group
        num_row_tiles = num_tokens // rows + num_sequences
        self.num_terms = 2 * heads * num_row_tiles * rows
        self.terms = Launch(
            row_terms_kernel, (num_row_tiles, heads), (num_sequences, *strides), HEADS=heads,
            VALUE_DIM=shape.value_dim, BLOCK_M=rows, num_warps=4,
        )  # fmt: skip
        box, terms = _boxes_of(rows), partial(_terms_descriptor, num_terms=self.num_terms)
        numbers = (masking.scale, masking.multiplier, masking.left or 0, masking.right or 0, num_sequences)
        constants = dict(
            GROUP=shape.group, HEAD_DIM=shape.head_dim, HAS_LEFT=masking.left is not None,
            HAS_RIGHT=masking.right is not None,
        )  # fmt: skip
        of_q, of_keys = tiles
        num_tiles = (num_tokens // of_q.block_m + num_sequences) * heads
        keys = _boxes_of(of_q.block_n)
        self.dq = Launch(
            hopper_dq_kernel, (min(num_programs, num_tiles),), (*numbers, num_tiles, num_row_tiles),
            boxes={0: box, 1: box, 2: keys, 3: keys, 4: terms, 5: box}, HEADS=heads, **constants, **_launch(of_q),
        )  # fmt: skip
        num_tiles = (num_keys // of_keys.block_n + num_sequences) * kv_heads
        self.dkv = Launch(
            hopper_dkv_kernel, (min(num_programs, num_tiles),), (*numbers, num_tiles, num_row_tiles),
            boxes={0: box, 1: box, 2: box, 3: box, 4: terms, 5: box, 6: box}, KV_HEADS=kv_heads, **constants,
            **_launch(of_keys),
        )  # fmt: skip

    def __call__(
        self,
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
    ) -> None:
        """Fills dq, and dk and dv, which come as zeros, where they are wanted. ``counter``: as in forward."""
        terms = lse.new_empty(self.num_terms)
        self.terms(out, grad, lse, terms, cu_seqlens_q)
        if dq is not None:
            self.dq(q, grad, k, v, terms, dq, cu_seqlens_q, cu_seqlens_k, counter)
        if dk is not None:
            self.dkv(q, grad, k, v, terms, dk, dv, cu_seqlens_q, cu_seqlens_k, counter)


def _boxes_of(num_rows: int) -> Callable[[torch.Tensor], TensorDescriptor]:
    return partial(box_descriptor, num_rows=num_rows)


def _terms_descriptor(terms: torch.Tensor, num_terms: int) -> TensorDescriptor:
    return TensorDescriptor(terms, [num_terms], [1], [WARPGROUP_ROWS.value], _TERMS_LAYOUT)


def _launch(tile: HopperTile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "STAGES": tile.num_stages,
        "CONSUMER_REGISTERS": tile.consumer_registers, "PRODUCER_REGISTERS": tile.producer_registers, "num_warps": 4,
    }  # fmt: skip
