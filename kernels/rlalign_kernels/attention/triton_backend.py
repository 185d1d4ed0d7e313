"""Attention's forward on the "triton" backend: which kernels, which grids. Imported only when it is used.

No tensor is read on the host: grids follow from shapes, and from ``max_seqlen`` where the caller knows it. What follows
from a call's shapes is decided once (``Forward``); after that a call allocates and launches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from rlalign_kernels.attention import schedules
from rlalign_kernels.attention.schedules import Tile
from rlalign_kernels.attention.tile_plan import TilePlan, padded, tile_plan
from rlalign_kernels.attention.triton_decode import attention_decode_kernel
from rlalign_kernels.attention.triton_forward import attention_forward_kernel
from rlalign_kernels.attention.triton_problem import Keys, Masking, shape_of, workspace
from rlalign_kernels.gpu import BOX_ALIGNMENT, num_processors, rows
from rlalign_kernels.launch import Launch, Remembered

# Of both stock kernels: k_desc and v_desc.
_BOX_PARAMETERS = (3, 4)
# More than any GPU runs at once.
_MANY_PROGRAMS = 1 << 30
# Of a grid's third dimension.
_MOST_SEQUENCES = 65_535


def forward(
    q: torch.Tensor,
    keys: Keys,
    cu_seqlens_q: torch.Tensor,
    masking: Masking,
    sinks: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    return_lse: bool = False,
    tiles: tuple[Tile, Tile] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """out [T, Hq, Dv] and lse float32 [T, Hq] of q [T, Hq, D]; unchecked. ``tiles``: a schedule other than the chosen.

    Tokens from cu_seqlens_q[-1] on are not written.
    """
    call = find(q, keys, cu_seqlens_q, masking, sinks, max_seqlen_q, return_lse, tiles=tiles)
    return call(q, keys, cu_seqlens_q, sinks)


def find(
    q: torch.Tensor,
    keys: Keys,
    cu_seqlens_q: torch.Tensor,
    masking: Masking,
    sinks: torch.Tensor | None,
    max_seqlen_q: int | None,
    return_lse: bool,
    check: Callable[[torch.Tensor, Keys, torch.Tensor, torch.Tensor | None], None] | None = None,
    tiles: tuple[Tile, Tile] | None = None,
) -> Forward:
    """What calls of this layout launch, decided when it is new; ``check`` then raises for what can't be."""
    k, v, cu_seqlens_k, block_tables, kv_lens, max_seqlen_k = keys
    # lengths that a decision does not tell apart need no decisions of their own; other tiles may
    if tiles is None and max_seqlen_q is not None and max_seqlen_q > schedules.MANY_QUERIES:
        max_seqlen_q = schedules.MANY_QUERIES
    num_splits = None if max_seqlen_k is None else -(-max_seqlen_k // TilePlan.split)
    if block_tables is None:
        lens, where = cu_seqlens_k, None
        num_splits = num_splits if num_splits is None or num_splits < 2 else 2
    else:
        lens, where = kv_lens, (block_tables.shape, block_tables.stride(), block_tables.dtype, block_tables.device)
    # written out, for a function's call costs as much as what it would look up; strides cost more than to ask for none
    key = (
        q.shape, q.is_contiguous() or q.stride(), q.dtype, q.device, q.data_ptr() % BOX_ALIGNMENT == 0,
        k.shape, k.is_contiguous() or k.stride(), k.dtype, k.device, k.data_ptr() % BOX_ALIGNMENT == 0,
        v.shape, v.is_contiguous() or v.stride(), v.dtype, v.device, v.data_ptr() % BOX_ALIGNMENT == 0,
        cu_seqlens_q.dim(), cu_seqlens_q.numel(), cu_seqlens_q.is_contiguous(), cu_seqlens_q.dtype, cu_seqlens_q.device,
        lens.dim(), lens.numel(), lens.is_contiguous(), lens.dtype, lens.device, where,
        sinks if sinks is None else (sinks.shape, sinks.dtype, sinks.device), masking, num_splits, max_seqlen_q,
        return_lse, tiles,
    )  # fmt: skip
    call = _CALLS.get(key)
    if call is None:
        if check is not None:
            check(q, keys, cu_seqlens_q, sinks)
        call = _CALLS[key] = Forward(q, keys, cu_seqlens_q, masking, sinks, return_lse, max_seqlen_q, tiles)
        if tiles is None:
            call.compile_ahead(q, keys, cu_seqlens_q, sinks)
    return call


class Forward:
    """What is launched for calls of one layout. Holds no tensor."""

    def __init__(
        self,
        q: torch.Tensor,
        keys: Keys,
        cu_seqlens_q: torch.Tensor,
        masking: Masking,
        sinks: torch.Tensor | None,
        return_lse: bool,
        max_seqlen_q: int | None,
        tiles: tuple[Tile, Tile] | None,
    ) -> None:
        self.as_rows = any(rows(x) is not x for x in (q, keys.k, keys.v))
        q, keys = rows(q), keys._replace(k=rows(keys.k), v=rows(keys.v))
        self.return_lse, self.masking, self.has_sinks = return_lse, masking, sinks is not None
        self.page_size = keys.page_size
        self.num_tokens, self.num_heads = q.shape[:2]
        self.num_sequences, self.kv_heads = cu_seqlens_q.shape[0] - 1, keys.k.shape[-2]
        self.shape = shape_of(q, keys.k, keys.v)
        self.out_shape = (self.num_tokens, self.num_heads, self.shape.value_dim)
        # a tensor like another is had for less than one of a stated shape
        self.out_like_q = q.shape == self.out_shape and q.stride() == (q.shape[1] * q.shape[2], q.shape[2], 1)
        self.plan = tile_plan(self.shape.head_dim, self.shape.value_dim, q.dtype, self.shape.architecture)
        self.strides = (
            q.stride(0), q.stride(1), *_three_strides(keys.k, self.page_size), *_three_strides(keys.v, self.page_size),
            self.num_heads * self.shape.value_dim, self.shape.value_dim, self.num_heads,
            keys.block_tables.stride(0) if self.page_size else 0,
        )  # fmt: skip
        if self.page_size * keys.k.stride(-3) >= 2**31 or self.page_size * keys.v.stride(-3) >= 2**31:
            raise ValueError(f"attention_paged: page_size={self.page_size}: offsets within a page must fit 32 bits")
        self.boxes = _boxes(keys.k, keys.v, self.page_size, self.plan.kv_tile)
        self.few = tiles[1].block_m if tiles else schedules.few_rows(self.shape)
        self.most_rows = (self.num_tokens if max_seqlen_q is None else max_seqlen_q) * self.shape.group
        # as many as may be where nothing is said, so that batches of any size share a kernel
        known_rows = self.few if max_seqlen_q is None else self.most_rows
        self.merge_rows = triton.next_power_of_2(max(1, min(self.few, known_rows)))
        self.hopper: Launch | None = None
        self.stock: list[Launch] = []
        self.decode: tuple[Launch, int, int] | None = None
        if self.num_tokens and self.num_heads and self.num_sequences:
            self._choose(q, keys, tiles)

    def _choose(self, q: torch.Tensor, keys: Keys, tiles: tuple[Tile, Tile] | None) -> None:
        """The kernels: for sequences of few rows, as decoded ones are, and for the others."""
        processors, paged = num_processors(q.device), self.page_size > 0
        num_splits = triton.cdiv(max(1, keys.longest), self.plan.split)
        places = self.num_sequences * self.kv_heads
        apart = (
            paged and self.num_sequences <= _MOST_SEQUENCES and schedules.splits_apart(places, num_splits, processors)
        )
        prefill, decode = tiles or (
            schedules.prefill_tile(self.shape, self.plan),
            schedules.decode_tile(self.shape, self.plan, places * (num_splits if apart else 1), processors, paged),
        )
        if apart:
            self.decode = self._decode(decode, num_splits)
        elif paged or self.most_rows <= self.few:
            self.stock.append(self._of_few_rows(decode))
        if self.most_rows <= self.few:
            return
        self.hopper = None if tiles else self._hopper(q, keys, one_split=num_splits == 1)
        if self.hopper is None:
            self.stock.append(self._prefill(prefill, one_split=num_splits == 1))

    def compile_ahead(
        self, q: torch.Tensor, keys: Keys, cu_seqlens_q: torch.Tensor, sinks: torch.Tensor | None
    ) -> None:
        """The schedules that a decode comes to as its sequences grow, come and go: no step waits for a compiler.

        A decode has few rows a sequence by its bound or, where it has none, no more queries than sequences.
        """
        bounded = self.most_rows <= self.few
        if not (
            self.page_size and self.num_tokens and q.is_cuda and (bounded or self.num_tokens <= self.num_sequences)
        ):
            return
        results = (q, q.new_empty(1, dtype=torch.float32) if self.return_lse else q, q if sinks is None else sinks)
        tensors, lengths = (q, keys.k, keys.v), (keys.kv_lens, keys.block_tables)
        of_stock = (*tensors, keys.k, keys.v, *results, cu_seqlens_q)
        processors = num_processors(q.device)
        for tile in {schedules.decode_tile(self.shape, self.plan, n, processors, True) for n in (1, _MANY_PROGRAMS)}:
            launch, *sizes = self._decode(tile, num_splits=2)
            launch.compile(*of_stock, *lengths, *workspace(q.device, *sizes))
            self._of_few_rows(tile).compile(*of_stock, q, *lengths)
        for one_split in () if bounded else (True, False):
            hopper = self._hopper(q, keys, one_split)
            if hopper is not None:
                hopper.compile(*tensors, *results, cu_seqlens_q, q, *lengths, workspace(q.device, 0, 1)[1])
            else:
                self._prefill(schedules.prefill_tile(self.shape, self.plan), one_split).compile(*of_stock, q, *lengths)

    def __call__(
        self, q: torch.Tensor, keys: Keys, cu_seqlens_q: torch.Tensor, sinks: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        k, v, cu_seqlens_k, block_tables, kv_lens, _ = keys
        if self.as_rows:
            q, k, v = rows(q), rows(k), rows(v)
        out = torch.empty_like(q) if self.out_like_q else q.new_empty(self.out_shape)
        lse = q.new_empty(self.out_shape[:2], dtype=torch.float32) if self.return_lse else None
        # q stands in place of what is absent; it is not read there
        results = (out, q if lse is None else lse, q if sinks is None else sinks)
        cu_seqlens_k = q if cu_seqlens_k is None else cu_seqlens_k
        kv_lens, block_tables = (q, q) if block_tables is None else (kv_lens, block_tables)
        if self.hopper is not None:
            _, counter = workspace(q.device, 0, 1)
            self.hopper(q, k, v, *results, cu_seqlens_q, cu_seqlens_k, kv_lens, block_tables, counter)
        if self.decode is not None:
            launch, num_floats, num_counters = self.decode
            floats, counters = workspace(q.device, num_floats, num_counters)
            launch(q, k, v, k, v, *results, cu_seqlens_q, kv_lens, block_tables, floats, counters)
        for launch in self.stock:
            launch(q, k, v, k, v, *results, cu_seqlens_q, cu_seqlens_k, kv_lens, block_tables)
        return out, lse

    def _of_few_rows(self, tile: Tile) -> Launch:
        """A program per sequence of at most ``tile.block_m`` rows, through all of its keys."""
        return self._forward(tile, self.num_sequences, ONLY_FEW=True, FEW_ROWS=0, ONE_SPLIT=False)

    def _prefill(self, tile: Tile, one_split: bool) -> Launch:
        """A program per row tile, through all of its keys."""
        num_tiles = self.num_tokens * self.shape.group // tile.block_m + self.num_sequences
        return self._forward(tile, num_tiles, ONLY_FEW=False, FEW_ROWS=self._left_out(), ONE_SPLIT=one_split)

    def _left_out(self) -> int:
        """Sequences of no more rows have a launch of their own: on pages. Packed batches have none to speak of."""
        return self.few if self.page_size else 0

    def _forward(self, tile: Tile, num_tiles: int, **constants: bool | int) -> Launch:
        return Launch(
            attention_forward_kernel, (num_tiles * self.kv_heads,),
            (*self._numbers(), self.num_sequences, *self.strides), **self._constants(tile), **constants,
        )  # fmt: skip

    def _hopper(self, q: torch.Tensor, keys: Keys, one_split: bool) -> Launch | None:
        """Warp-specialised, where that kernel takes the call; the same bits."""
        tile = schedules.hopper_forward_tile(self.shape, self.masking.softcap is not None)
        if tile is None or 0 < self.page_size < tile.block_n:
            return None
        from rlalign_kernels.attention import hopper_backend

        if not hopper_backend.in_boxes(q, keys.k, keys.v):
            return None
        return hopper_backend.forward(
            self.shape, self.plan, tile, self.masking, num_tokens=self.num_tokens, num_sequences=self.num_sequences,
            num_heads=self.num_heads, num_programs=num_processors(q.device), has_sinks=self.has_sinks,
            has_lse=self.return_lse, one_split=one_split, few_rows=self._left_out(), page_size=self.page_size,
            stride_table=self.strides[-1],
        )  # fmt: skip

    def _decode(self, tile: Tile, num_splits: int) -> tuple[Launch, int, int]:
        """A program per split, for sequences of at most ``tile.block_m`` rows; and the floats and counters it needs."""
        places = self.num_sequences * self.kv_heads
        # a multiple of 16, as Triton then knows
        slots = triton.cdiv(places * num_splits * self.merge_rows, 16) * 16
        launch = Launch(
            attention_decode_kernel, (num_splits, self.kv_heads, self.num_sequences),
            (*self._numbers(), num_splits, slots, *self.strides), **self._constants(tile), MERGE_ROWS=self.merge_rows,
        )  # fmt: skip
        return launch, slots * (1 + self.plan.sum_width + padded(self.shape.value_dim)), places

    def _numbers(self) -> tuple[float, float, int, int]:
        masking = self.masking
        return masking.multiplier, masking.cap_scale, masking.left or 0, masking.right or 0

    def _constants(self, tile: Tile) -> dict[str, Any]:
        """What both stock kernels are compiled for, and the boxes of keys and values where whole tiles may be read."""
        if tile.block_n != self.plan.kv_tile:
            raise ValueError(f"attention: a tile of {tile.block_n} keys is another plan than {self.plan.kv_tile}")
        shape, plan, masking = self.shape, self.plan, self.masking
        boxes = self.boxes if tile.tma else {}
        return dict(
            GROUP=shape.group, KV_HEADS=self.kv_heads, HEAD_DIM=shape.head_dim, VALUE_DIM=shape.value_dim,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=padded(shape.head_dim),
            BLOCK_DV=padded(shape.value_dim), SPLIT=plan.split, WIDTH=plan.sum_width, PAGE=self.page_size,
            HAS_LEFT=masking.left is not None, HAS_RIGHT=masking.right is not None,
            HAS_CAP=masking.softcap is not None, HAS_SINK=self.has_sinks, HAS_LSE=self.return_lse, PRECISION="ieee",
            STAGES=tile.num_stages, num_warps=tile.num_warps, TMA=bool(boxes), boxes=boxes,
        )  # fmt: skip


def _three_strides(x: torch.Tensor, page_size: int) -> tuple[int, int, int]:
    """Of pages, tokens and heads."""
    return x.stride(0) if page_size else 0, x.stride(-3), x.stride(-2)


def _boxes(k: torch.Tensor, v: torch.Tensor, page: int, block_n: int) -> dict[int, Callable[[torch.Tensor], Any]]:
    """Makers of descriptors for the kernels' parameters k_desc and v_desc, or none where one can't be read by them.

    A box is rows [block_n, D] of one head: in one piece, at an address that the hardware takes.
    """
    made: dict[int, Callable[[torch.Tensor], Any]] = {}
    for index, x in zip(_BOX_PARAMETERS, (k, v), strict=True):
        heads, dim = x.shape[-2:]
        row = x.stride(-3)
        if page and (page < block_n or x.stride(0) != page * row):
            return {}
        if padded(dim) != dim or x.stride(-2) != dim or row * x.element_size() % BOX_ALIGNMENT:
            return {}
        if x.data_ptr() % BOX_ALIGNMENT or x.numel() == 0:
            return {}
        num_rows = x.shape[0] * max(1, page)
        made[index] = partial(
            TensorDescriptor, shape=[num_rows, heads * dim], strides=[row, 1], block_shape=[block_n, dim]
        )
    return made


_CALLS: Remembered[Forward] = Remembered()
