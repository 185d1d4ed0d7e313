"""Launches of the output layer's kernels: one per shapes, strides, dtypes and schedule, kept.

Legend: T rows, V ids, H hidden channels.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from rlalign_kernels import tuned
from rlalign_kernels.gemm.triton_backend import in_boxes
from rlalign_kernels.gpu import BOX_ALIGNMENT, architecture, num_processors, rows
from rlalign_kernels.launch import Launch
from rlalign_kernels.vocab.plan import HEAD_PLAN
from rlalign_kernels.vocab.schedules import HeadTile, head_tile
from rlalign_kernels.vocab.triton_finish import draw_kernel, score_kernel
from rlalign_kernels.vocab.triton_logits import gradient_kernel, logits_kernel
from rlalign_kernels.vocab.triton_scan import scan_kernel

# Rows that one program finishes: the diagonal of a product gives their targets' logits.
_FINISH_ROWS = 16
# Fields of the scan's result.
_SCORE_FIELDS, _DRAW_FIELDS, _RAW_FIELDS = 3, 5, 7


_NO_CUT = (None, None)


class Head(NamedTuple):
    """The output layer: weight [V, H] and bias [V] in hidden's dtype; soft cap."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    softcap: float | None

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None) -> Head:
        """With strides that the kernels take."""
        return cls(rows(weight), None if bias is None else bias.contiguous(), softcap)

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def num_blocks(self) -> int:
        return -(-self.weight.shape[0] // HEAD_PLAN.block)

    def part(self, ids: slice) -> Head:
        return Head(self.weight[ids], None if self.bias is None else self.bias[ids], self.softcap)


class Settings(NamedTuple):
    """Sampling settings of each row, as in SamplingRows: contiguous tensors [T]."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor


class Cut(NamedTuple):
    """The last id that each row keeps, ids in the order of descending logits, ascending among equals: its logit
    float32 [T], and itself int32 [T]; -inf and V where all are kept."""

    limit: torch.Tensor
    last: torch.Tensor

    def part(self, rows: slice) -> Cut:
        return Cut(self.limit[rows], self.last[rows])


class _Product(NamedTuple):
    """What a launch depends on: a product of hidden [T, H] and weight [V, H], and how its logits come about."""

    num_rows: int
    num_ids: int
    depth: int
    stride_hidden: int
    stride_weight: int
    dtype: torch.dtype
    device: torch.device
    has_bias: bool
    softcap: float | None
    boxes: bool

    @property
    def numbers(self) -> tuple[int, ...]:
        return self.num_rows, self.num_ids, self.depth, self.stride_hidden, self.stride_weight

    @property
    def cap(self) -> float:
        return self.softcap or 1.0

    def constants(self) -> dict[str, bool]:
        return {"HAS_BIAS": self.has_bias, "HAS_CAP": self.softcap is not None}


def _product(hidden: torch.Tensor, head: Head) -> _Product:
    weight = head.weight
    boxes = (hidden.data_ptr() | weight.data_ptr()) % BOX_ALIGNMENT == 0 and all(
        in_boxes(x.stride(), x.shape[1], x.dtype) for x in (hidden, weight)
    )
    return _Product(
        *hidden.shape[:1], *weight.shape, hidden.stride(0), weight.stride(0), hidden.dtype, hidden.device,
        head.bias is not None, head.softcap, boxes,
    )  # fmt: skip


def _tiled(product: _Product, tile: HeadTile) -> tuple[tuple[int], dict[str, object]]:
    """Grid, and constants of a kernel over tiles of the logits."""
    if product.dtype == torch.float32 and tile.block_k != HEAD_PLAN.float32_block:
        raise ValueError(f"HeadTile: block_k={tile.block_k}; the plan's float32 blocks are {HEAD_PLAN.float32_block}")
    num_tiles = -(-product.num_rows // tile.block_m) * -(-product.num_ids // tile.block_n)
    programs = min(num_tiles, num_processors(product.device) * tile.per_processor)
    tma = tile.tma and product.boxes
    boxes = {0: partial(_box, block=(tile.block_m, tile.block_k)), 1: partial(_box, block=(tile.block_n, tile.block_k))}
    return (programs,), dict(
        boxes=boxes if tma else None, BLOCK=HEAD_PLAN.block, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k, SWAP=tile.swap, TMA=tma, FLATTEN=tile.flatten, ROW_TILES=tile.row_tiles,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=False, **product.constants(),
    )  # fmt: skip


def _box(x: torch.Tensor, block: tuple[int, int]) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], list(block))


@lru_cache(1024)
def _scan_launch(
    product: _Product, tile: HeadTile, has_rows: bool, stride_mask: int | None, has_cut: bool, sample: bool, raw: bool
) -> Launch:
    grid, constants = _tiled(product, tile)
    numbers = (*product.numbers, stride_mask or 0, product.cap, grid[0])
    return Launch(
        scan_kernel, grid, numbers, **constants, HAS_TEMPERATURE=has_rows, HAS_MASK=stride_mask is not None,
        HAS_CUT=has_cut, RAGGED=product.num_ids % HEAD_PLAN.block != 0, SAMPLE=sample, RAW=raw,
    )  # fmt: skip


def scan(
    hidden: torch.Tensor,
    head: Head,
    settings: Settings | None,
    mask: torch.Tensor | None,
    cut: Cut | None = None,
    *,
    seeds: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    raw: bool = False,
    tile: HeadTile | None = None,
) -> torch.Tensor:
    """float32 [fields, blocks, T], see triton_scan.py; draws where there are seeds. mask bool [T, V]: False is out."""
    product = _product(hidden, head)
    sample = seeds is not None
    tile = tile or _scan_tile(product, sample, mask is not None or cut is not None)
    fields = (_RAW_FIELDS if raw else _DRAW_FIELDS) if sample else _SCORE_FIELDS
    parts = torch.empty(fields, head.num_blocks, product.num_rows, dtype=torch.float32, device=product.device)
    launch = _scan_launch(product, tile, settings is not None, _stride(mask), cut is not None, sample, raw)
    temperature = None if settings is None else settings.temperature
    # where there are no boxes, their parameters are not used
    launch(*(hidden, head.weight) * 2, head.bias, temperature, mask, *(cut or _NO_CUT), seeds, positions, parts)
    return parts


def _scan_tile(product: _Product, sample: bool, masked: bool) -> HeadTile:
    where = product.dtype, architecture(product.device)
    found = None
    if product.boxes and not masked:
        found = tuned.head_tile(product.num_rows, product.num_ids, product.depth, *where, sample)
    return found or head_tile(product.num_rows, *where, sample, masked)


def _stride(mask: torch.Tensor | None) -> int | None:
    return None if mask is None else mask.stride(0)


@lru_cache(1024)
def _score_launch(
    product: _Product, has_rows: bool, stride_mask: int | None, has_cut: bool, stride_out: int, untruncated: bool
) -> Launch:
    numbers = (*product.numbers, stride_mask or 0, stride_out, product.cap)
    return Launch(
        score_kernel, (-(-product.num_rows // _FINISH_ROWS),), numbers, BLOCK=HEAD_PLAN.block, GROUP=HEAD_PLAN.group,
        M=_FINISH_ROWS, BLOCK_K=HEAD_PLAN.float32_block if product.dtype == torch.float32 else 128, HAS_ROWS=has_rows,
        HAS_MASK=stride_mask is not None, HAS_CUT=has_cut, UNTRUNCATED=untruncated, num_warps=4,
        enable_fp_fusion=False, **product.constants(),
    )  # fmt: skip


def score(
    hidden: torch.Tensor,
    head: Head,
    settings: Settings | None,
    mask: torch.Tensor | None,
    cut: Cut | None,
    targets: torch.Tensor,
    kept: torch.Tensor,
    parts: torch.Tensor,
    out: torch.Tensor,
    untruncated: bool,
) -> None:
    """Fill out float32 [5, T] from the scan's ``parts``: log-prob, entropy, log-sum-exp; m and s for the gradient.

    untruncated: settings with a filter are refused, by NaN.
    """
    has_rows, has_cut = settings is not None, cut is not None
    launch = _score_launch(_product(hidden, head), has_rows, _stride(mask), has_cut, out.stride(0), untruncated)
    given = (*(settings or (None,) * 4), mask, *(cut or _NO_CUT))
    launch(hidden, head.weight, head.bias, *given, targets, kept, parts, out)


@lru_cache(1024)
def _draw_launch(num_rows: int, num_ids: int, stride_out: int, untruncated: bool, raw: bool) -> Launch:
    return Launch(
        draw_kernel, (-(-num_rows // _FINISH_ROWS),), (num_rows, num_ids, stride_out), BLOCK=HEAD_PLAN.block,
        GROUP=HEAD_PLAN.group, M=_FINISH_ROWS, UNTRUNCATED=untruncated, RAW=raw, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip


def draw(
    num_ids: int, settings: Settings, parts: torch.Tensor, token: torch.Tensor, out: torch.Tensor, untruncated: bool
) -> None:
    """Fill token int64 [T] and out float32 [2, T]: log-prob and, where ``parts`` has it, that at temperature 1."""
    launch = _draw_launch(token.shape[0], num_ids, out.stride(0), untruncated, parts.shape[0] == _RAW_FIELDS)
    launch(*settings, parts, token, out)


@lru_cache(1024)
def _logits_launch(product: _Product, tile: HeadTile, stride_out: int) -> Launch:
    grid, constants = _tiled(product, tile)
    return Launch(logits_kernel, grid, (*product.numbers, stride_out, product.cap, grid[0]), **constants)


def logits(hidden: torch.Tensor, head: Head, tile: HeadTile | None = None) -> torch.Tensor:
    """float32 [T, V], before temperature: the bits that ``scan`` works on."""
    product = _product(hidden, head)
    tile = tile or head_tile(product.num_rows, product.dtype, architecture(product.device), masked=True)
    out = torch.empty(product.num_rows, product.num_ids, dtype=torch.float32, device=product.device)
    launch = _logits_launch(product, tile, out.stride(0))
    launch(*(hidden, head.weight) * 2, head.bias, out)
    return out


@lru_cache(1024)
def _gradient_launch(
    product: _Product, tile: HeadTile, has_rows: bool, has_cut: bool, has_entropy: bool, first_id: int,
    strides: tuple[int | None, ...],
) -> Launch:  # fmt: skip
    grid, constants = _tiled(product, tile)
    numbers = (*product.numbers, *(stride or 0 for stride in strides), product.cap, first_id, grid[0])
    return Launch(
        gradient_kernel, grid, numbers, **constants, HAS_TEMPERATURE=has_rows, HAS_MASK=strides[0] is not None,
        HAS_CUT=has_cut, HAS_ENTROPY=has_entropy,
    )  # fmt: skip


def logit_gradients(
    hidden: torch.Tensor,
    head: Head,
    settings: Settings | None,
    mask: torch.Tensor | None,
    cut: Cut | None,
    targets: torch.Tensor,
    kept: torch.Tensor,
    stats: torch.Tensor,
    upstream: torch.Tensor,
    first_id: int,
    out: torch.Tensor,
    *,
    has_entropy: bool = True,
    tile: HeadTile | None = None,
) -> None:
    """Fill out [T, V] in hidden's dtype for a part of the ids, of which ``head`` and ``mask`` are slices.

    stats float32 [5, T] as scored; upstream float32 [3, T]: gradients of log-prob, entropy and log-sum-exp.
    """
    product = _product(hidden, head)
    masked = mask is not None or cut is not None
    tile = tile or head_tile(product.num_rows, product.dtype, architecture(product.device), masked=masked)
    strides = (_stride(mask), stats.stride(0), upstream.stride(0), out.stride(0))
    launch = _gradient_launch(product, tile, settings is not None, cut is not None, has_entropy, first_id, strides)
    temperature = None if settings is None else settings.temperature
    launch(
        *(hidden, head.weight) * 2, head.bias, temperature, mask, *(cut or _NO_CUT), targets, kept, stats, upstream, out
    )
