"""Attention's forward on the "triton" backend: which kernel, which grid. Imported only when it is used.

No tensor is read on the host: grids follow from shapes, and from ``max_seqlen_k`` where the caller knows it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from rlalign_kernels.attention import schedules
from rlalign_kernels.attention.schedules import Shape, Tile
from rlalign_kernels.attention.tile_plan import TilePlan, padded, tile_plan
from rlalign_kernels.attention.triton_decode import attention_decode_kernel
from rlalign_kernels.attention.triton_forward import attention_forward_kernel
from rlalign_kernels.attention.triton_problem import Keys, Masking, num_processors, rows, shape_of, workspace


def forward(
    q: torch.Tensor,
    keys: Keys,
    cu_seqlens_q: torch.Tensor,
    masking: Masking,
    *,
    sinks: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    return_lse: bool = False,
    tiles: tuple[Tile, Tile] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """out [T, Hq, Dv] and lse float32 [T, Hq] of q [T, Hq, D]. ``tiles``: a schedule other than the chosen one.

    Tokens from cu_seqlens_q[-1] on are not written.
    """
    q = rows(q)
    if keys.k.stride(-1) != 1 or keys.v.stride(-1) != 1:
        keys = replace(keys, k=rows(keys.k), v=rows(keys.v))
    out = torch.empty(q.shape[0], q.shape[1], keys.v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) if return_lse else None
    num_sequences = cu_seqlens_q.shape[0] - 1
    if out.numel() == 0 or num_sequences == 0:
        return out, lse
    launch = _Forward(q, keys, cu_seqlens_q, masking, sinks, out, lse)
    shape, plan, processors = launch.shape, launch.plan, num_processors(q.device)
    num_splits = triton.cdiv(max(1, keys.longest), plan.split)
    apart = keys.page_size > 0 and schedules.splits_apart(num_sequences, launch.kv_heads, num_splits, processors)
    num_programs = num_sequences * launch.kv_heads * (num_splits if apart else 1)
    prefill, decode = tiles or (
        schedules.prefill_tile(shape, plan),
        schedules.decode_tile(shape, plan, num_programs, processors, keys.page_size > 0),
    )
    most_rows = (q.shape[0] if max_seqlen_q is None else max_seqlen_q) * shape.group
    all_few = most_rows <= decode.block_m
    if apart:
        launch.decode(decode, num_splits, most_rows)
        if not all_few:
            launch.prefill(prefill, num_splits, few_rows=decode.block_m)
    elif all_few or tiles or not launch.hopper(num_splits):
        launch.prefill(decode if all_few else prefill, num_splits, few_rows=0)
    return out, lse


class _Forward:
    """One call's arguments, ready for either launch."""

    def __init__(
        self,
        q: torch.Tensor,
        keys: Keys,
        cu_seqlens_q: torch.Tensor,
        masking: Masking,
        sinks: torch.Tensor | None,
        out: torch.Tensor,
        lse: torch.Tensor | None,
    ) -> None:
        k, v = keys.k, keys.v
        self.q, self.keys, self.cu_q, self.masking, self.sinks, self.out, self.lse = (
            q, keys, cu_seqlens_q, masking, sinks, out, lse,
        )  # fmt: skip
        self.kv_heads = k.shape[-2]
        self.shape = shape_of(q, k, v)
        self.plan = tile_plan(self.shape.head_dim, self.shape.value_dim, q.dtype, self.shape.architecture)
        self.num_sequences = cu_seqlens_q.shape[0] - 1

    def prefill(self, tile: Tile, num_splits: int, few_rows: int) -> None:
        """A program per row tile, through all of its keys. few_rows: sequences of no more rows are not its own."""
        num_tiles = self.q.shape[0] * self.shape.group // tile.block_m + self.num_sequences
        keys, paged = self.keys, self.keys.page_size > 0
        tma, *boxes = self._boxes(tile)
        attention_forward_kernel[(num_tiles * self.kv_heads,)](
            self.q, keys.k, keys.v, *boxes, self.out, *self._optional(), self.cu_q, keys.cu_seqlens, keys.kv_lens,
            keys.block_tables, *self._numbers(), self.num_sequences, *self._strides(),
            keys.block_tables.stride(0) if paged else 0,
            **self._constants(tile), FEW_ROWS=few_rows, ONE_SPLIT=num_splits == 1, TMA=tma,
        )  # fmt: skip

    def hopper(self, num_splits: int) -> bool:
        """Warp-specialised, where that kernel takes the call; the same bits."""
        tile = schedules.hopper_forward_tile(self.shape, self.masking.softcap is not None)
        if tile is None or self.keys.page_size > 0:
            return False
        from rlalign_kernels.attention import hopper_backend

        k, v = self.keys.k, self.keys.v
        if not hopper_backend.in_boxes(self.q, k, v):
            return False
        _, counter = workspace(self.q.device, 0, 1)
        hopper_backend.forward(
            self.q, k, v, self.out, self.lse, self.sinks, self.cu_q, self.keys.cu_seqlens, counter, self.plan, tile,
            num_processors(self.q.device), multiplier=self.masking.multiplier, left=self.masking.left,
            right=self.masking.right, one_split=num_splits == 1,
        )  # fmt: skip
        return True

    def decode(self, tile: Tile, num_splits: int, most_rows: int) -> None:
        """A program per split, for sequences of at most ``tile.block_m`` rows; no sequence has more than most_rows."""
        places = self.num_sequences * self.kv_heads
        slots = places * num_splits * tile.block_m
        width = self.plan.sum_width
        floats, arrived = workspace(self.q.device, slots * (1 + width + padded(self.shape.value_dim)), places)
        keys = self.keys
        tma, *boxes = self._boxes(tile)
        attention_decode_kernel[(num_splits, self.kv_heads, self.num_sequences)](
            self.q, keys.k, keys.v, *boxes, self.out, *self._optional(), self.cu_q, keys.kv_lens, keys.block_tables,
            floats, floats[slots:], floats[slots * (1 + width) :], arrived, *self._numbers(), num_splits,
            *self._strides(), keys.block_tables.stride(0),
            **self._constants(tile), MERGE_ROWS=min(tile.block_m, triton.next_power_of_2(most_rows)), TMA=tma,
        )  # fmt: skip

    def _optional(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-sum-exp and sinks, or something in their place that is not read."""
        return self.q if self.lse is None else self.lse, self.q if self.sinks is None else self.sinks

    def _numbers(self) -> tuple[float, float, int, int]:
        masking = self.masking
        return masking.multiplier, masking.cap_scale, masking.left or 0, masking.right or 0

    def _strides(self) -> tuple[int, ...]:
        q, k, v, out = self.q, self.keys.k, self.keys.v, self.out
        paged = self.keys.page_size > 0
        return (
            q.stride(0), q.stride(1), k.stride(0) if paged else 0, k.stride(-3), k.stride(-2),
            v.stride(0) if paged else 0, v.stride(-3), v.stride(-2), out.stride(0), out.stride(1), out.shape[1],
        )  # fmt: skip

    def _constants(self, tile: Tile) -> dict[str, object]:
        if tile.block_n != self.plan.kv_tile:
            raise ValueError(f"attention: a tile of {tile.block_n} keys is another plan than {self.plan.kv_tile}")
        return _constants(
            self.shape, self.plan, self.masking, self.kv_heads, self.keys.page_size, self.sinks is not None,
            self.lse is not None, tile,
        )  # fmt: skip

    def _boxes(self, tile: Tile) -> tuple[bool, object, object]:
        """(True, descriptors of keys and values) where whole tiles may be read by them."""
        found = [_box(x, self.keys.page_size, tile.block_n) for x in (self.keys.k, self.keys.v)] if tile.tma else []
        return (True, *found) if found and None not in found else (False, None, None)


@lru_cache(256)
def _constants(
    shape: Shape,
    plan: TilePlan,
    masking: Masking,
    kv_heads: int,
    page_size: int,
    has_sink: bool,
    has_lse: bool,
    tile: Tile,
) -> dict[str, object]:
    """What both forward kernels are compiled for; made once, since a launch has no time for it."""
    return dict(
        GROUP=shape.group, KV_HEADS=kv_heads, HEAD_DIM=shape.head_dim, VALUE_DIM=shape.value_dim,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=padded(shape.head_dim), BLOCK_DV=padded(shape.value_dim),
        SPLIT=plan.split, WIDTH=plan.sum_width, PAGE=page_size, HAS_LEFT=masking.left is not None,
        HAS_RIGHT=masking.right is not None, HAS_CAP=masking.softcap is not None, HAS_SINK=has_sink,
        HAS_LSE=has_lse, PRECISION="ieee", STAGES=tile.num_stages, num_warps=tile.num_warps,
    )  # fmt: skip


def _box(x: torch.Tensor, page: int, block_n: int) -> TensorDescriptor | None:
    """Of rows [block_n, D] of one head, if such boxes lie in one piece and at addresses that the hardware takes."""
    heads, dim = x.shape[-2:]
    row = x.stride(-3)
    if page and (page < block_n or x.stride(0) != page * row):
        return None
    if padded(dim) != dim or x.stride(-2) != dim or row * x.element_size() % 16 or x.data_ptr() % 16:
        return None
    rows = x.shape[0] * max(1, page)
    return TensorDescriptor(x, [rows, heads * dim], [row, 1], [block_n, dim])
