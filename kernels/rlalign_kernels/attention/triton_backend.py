"""Attention's "triton" backend: launches, workspaces and the autograd function. Imported only when it is used.

No tensor is read on the host: grids follow from shapes, and from ``max_seqlen_k`` where the caller knows it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from rlalign_kernels.attention import schedules
from rlalign_kernels.attention.schedules import Shape, Tile
from rlalign_kernels.attention.tile_plan import TilePlan, padded, tile_plan
from rlalign_kernels.attention.triton_backward import (
    attention_delta_kernel,
    attention_dkv_kernel,
    attention_dq_kernel,
    attention_sink_kernel,
)
from rlalign_kernels.attention.triton_decode import attention_decode_kernel
from rlalign_kernels.attention.triton_forward import attention_forward_kernel

_LOG2E = 1.4426950408889634
_INTERPRETER_ARCHITECTURE = (9, 0)


@dataclass(frozen=True)
class Masking:
    """Which keys a query at position i sees: i - left <= j <= i + right, None being no bound; and the soft cap."""

    scale: float
    left: int | None = None
    right: int | None = None
    softcap: float | None = None

    @property
    def multiplier(self) -> float:
        """c: from scores, or from their tanh, to exponents of 2."""
        return (self.scale if self.softcap is None else self.softcap) * _LOG2E

    @property
    def cap_scale(self) -> float:
        """From scores to the argument of tanh."""
        return 0.0 if self.softcap is None else self.scale / self.softcap


@dataclass(frozen=True)
class Keys:
    """Where the keys are: packed by ``cu_seqlens``, or on pages by ``block_tables`` and ``kv_lens``."""

    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens: torch.Tensor | None = None
    block_tables: torch.Tensor | None = None
    kv_lens: torch.Tensor | None = None
    max_seqlen: int | None = None

    @property
    def page_size(self) -> int:
        """0 where keys are packed."""
        return 0 if self.block_tables is None else self.k.shape[1]

    @property
    def longest(self) -> int:
        """No sequence has more keys; as close as shapes tell where the caller does not."""
        if self.max_seqlen is not None:
            return self.max_seqlen
        return self.k.shape[0] if self.block_tables is None else self.block_tables.shape[1] * self.page_size


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
    q = _rows(q)
    if keys.k.stride(-1) != 1 or keys.v.stride(-1) != 1:
        keys = replace(keys, k=_rows(keys.k), v=_rows(keys.v))
    out = torch.empty(q.shape[0], q.shape[1], keys.v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) if return_lse else None
    num_sequences = cu_seqlens_q.shape[0] - 1
    if out.numel() == 0 or num_sequences == 0:
        return out, lse
    launch = _Forward(q, keys, cu_seqlens_q, masking, sinks, out, lse)
    shape, plan, processors = launch.shape, launch.plan, _num_processors(q.device)
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
        _, counter = _workspace(self.q.device, 0, 1)
        hopper_backend.forward(
            self.q, k, v, self.out, self.lse, self.sinks, self.cu_q, self.keys.cu_seqlens, counter, self.plan, tile,
            _num_processors(self.q.device), multiplier=self.masking.multiplier, left=self.masking.left,
            right=self.masking.right, one_split=num_splits == 1,
        )  # fmt: skip
        return True

    def decode(self, tile: Tile, num_splits: int, most_rows: int) -> None:
        """A program per split, for sequences of at most ``tile.block_m`` rows; no sequence has more than most_rows."""
        places = self.num_sequences * self.kv_heads
        slots = places * num_splits * tile.block_m
        width = self.plan.sum_width
        floats, arrived = _workspace(self.q.device, slots * (1 + width + padded(self.shape.value_dim)), places)
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


class PackedAttention(torch.autograd.Function):
    """out and lse; lse carries no gradient."""

    @staticmethod
    def forward(
        ctx,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        masking: Masking,
        max_seqlen_q: int | None,
        max_seqlen_k: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys = Keys(k, v, cu_seqlens=cu_seqlens_k, max_seqlen=max_seqlen_k)
        out, lse = forward(q, keys, cu_seqlens_q, masking, sinks=sinks, max_seqlen_q=max_seqlen_q, return_lse=True)
        ctx.save_for_backward(q, k, v, sinks, out, lse, cu_seqlens_q, cu_seqlens_k)
        ctx.masking = masking
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, grad: torch.Tensor, _grad_lse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        need_q, need_k, need_v, need_sinks = ctx.needs_input_grad[:4]
        grads = backward(
            *ctx.saved_tensors, grad, ctx.masking, need_q=need_q, need_kv=need_k or need_v, need_sinks=need_sinks
        )
        return *grads, None, None, None, None, None


def backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    grad: torch.Tensor,
    masking: Masking,
    *,
    need_q: bool = True,
    need_kv: bool = True,
    need_sinks: bool = False,
    tiles: tuple[Tile, Tile] | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of q, k, v and sinks, None for what is not needed. ``tiles``: for dQ and for dK, dV."""
    q, k, v, grad = (_rows(x) for x in (q, k, v, grad))
    shape = shape_of(q, k, v)
    kv_heads, num_sequences = k.shape[1], cu_seqlens_q.shape[0] - 1
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device) if need_q else None
    dk = torch.zeros(k.shape, dtype=k.dtype, device=k.device) if need_kv else None
    dv = torch.zeros(v.shape, dtype=v.dtype, device=v.device) if need_kv else None
    dsinks = None if sinks is None or not need_sinks else torch.zeros(sinks.shape, device=q.device)
    if num_sequences == 0 or q.numel() == 0:
        return dq, dk, dv, dsinks if dsinks is None else dsinks.to(sinks.dtype)
    on_hopper = tiles is None and _backward_on_hopper(
        q, k, v, out, lse, grad, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, masking, shape
    )
    if on_hopper and dsinks is None:
        return dq, dk, dv, None
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    block_d, block_dv = padded(shape.head_dim), padded(shape.value_dim)
    num_rows = lse.numel()
    attention_delta_kernel[(triton.cdiv(num_rows, 32),)](
        out, grad, delta, num_rows, out.stride(0), out.stride(1), grad.stride(0), grad.stride(1),
        HEADS=q.shape[1], VALUE_DIM=shape.value_dim, BLOCK_M=32, BLOCK_DV=block_dv,
    )  # fmt: skip
    if dsinks is not None:
        attention_sink_kernel[(q.shape[1],)](sinks, lse, delta, dsinks, q.shape[0], HEADS=q.shape[1], BLOCK_T=1024)
        dsinks = dsinks.to(sinks.dtype)
    if on_hopper:
        return dq, dk, dv, dsinks
    dq_tile, dkv_tile = tiles or (schedules.dq_tile(shape), schedules.dkv_tile(shape))
    constants = dict(
        GROUP=shape.group, KV_HEADS=kv_heads, HEAD_DIM=shape.head_dim, VALUE_DIM=shape.value_dim, BLOCK_D=block_d,
        BLOCK_DV=block_dv, HAS_LEFT=masking.left is not None, HAS_RIGHT=masking.right is not None,
        HAS_CAP=masking.softcap is not None, PRECISION="ieee",
    )  # fmt: skip
    numbers = (
        masking.scale, masking.multiplier, masking.cap_scale, masking.left or 0, masking.right or 0, num_sequences
    )  # fmt: skip
    strides = (
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), grad.stride(0), grad.stride(1)
    )  # fmt: skip
    if dq is not None:
        grid = ((q.shape[0] * shape.group // dq_tile.block_m + num_sequences) * kv_heads,)
        attention_dq_kernel[grid](
            q, k, v, grad, lse, delta, dq, cu_seqlens_q, cu_seqlens_k, *numbers, *strides, dq.stride(0), dq.stride(1),
            **constants, **_launch(dq_tile),
        )  # fmt: skip
    if dk is not None and k.numel():
        grid = ((k.shape[0] // dkv_tile.block_n + num_sequences) * kv_heads,)
        attention_dkv_kernel[grid](
            q, k, v, grad, lse, delta, dk, dv, cu_seqlens_q, cu_seqlens_k, *numbers, *strides,
            **constants, **_launch(dkv_tile),
        )  # fmt: skip
    return dq, dk, dv, dsinks


def _backward_on_hopper(
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
    masking: Masking,
    shape: Shape,
) -> bool:
    """Whether Hopper's kernels took the call, and filled dq, dk and dv."""
    tiles = schedules.hopper_backward_tiles(shape, masking.softcap is not None)
    if tiles is None:
        return False
    from rlalign_kernels.attention import hopper_backend

    if not hopper_backend.in_boxes(q, k, v, grad):
        return False
    _, counter = _workspace(q.device, 0, 1)
    hopper_backend.backward(
        q, k, v, out, lse, grad, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, counter, tiles, _num_processors(q.device),
        scale=masking.scale, left=masking.left, right=masking.right,
    )  # fmt: skip
    return True


def shape_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Shape:
    """Of one layer: q [T, Hq, D], k [..., Hkv, D], v [..., Hkv, Dv]."""
    return Shape(q.shape[-1], v.shape[-1], q.shape[1] // k.shape[-2], q.dtype, _architecture(q.device))


def _launch(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "STAGES": tile.num_stages, "num_warps": tile.num_warps,
    }  # fmt: skip


def _rows(x: torch.Tensor) -> torch.Tensor:
    """With a contiguous last dimension, as the kernels read it, and no expanded one (a sum's gradient has them)."""
    return x if x.stride(-1) == 1 and 0 not in x.stride() else x.contiguous()


@cache
def _architecture(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else _INTERPRETER_ARCHITECTURE


@cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


_SPACES: dict[tuple[torch.device, int], tuple[torch.Tensor, torch.Tensor]] = {}


def _workspace(device: torch.device, num_floats: int, num_counters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Floats for the splits' states, and counters that are 0 between launches: one pair per stream, growing.

    While a graph is captured it gets its own, for its replays may run beside anything.
    """
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    key = (device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
    floats, counters = (None, None) if capturing else _SPACES.get(key, (None, None))
    if floats is None or floats.numel() < num_floats:
        floats = torch.empty(num_floats, dtype=torch.float32, device=device)
    if counters is None or counters.numel() < num_counters:
        counters = torch.zeros(num_counters, dtype=torch.int32, device=device)
    if not capturing:
        _SPACES[key] = (floats, counters)
    return floats, counters
