"""From the public norms to their kernels: launches kept by shape, and the autograd function around both directions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.autograd.function import once_differentiable
from triton import knobs

from rlalign_kernels.elementwise.layout import as_rows, made_contiguous, stride_of
from rlalign_kernels.elementwise.row_plan import (
    LARGEST_ROW,
    RowTile,
    backward_tile,
    backward_width,
    forward_tile,
    lanes,
    most_parts,
)
from rlalign_kernels.elementwise.triton_norm import norm_backward_kernel, norm_forward_kernel, norm_parts_kernel
from rlalign_kernels.elementwise.triton_rows import check_device
from rlalign_kernels.gpu import architecture
from rlalign_kernels.launch import Launch

_PART_LANES, _PART_COLUMNS = 32, 8
_NONE = (0, 0, 0)


@dataclass(frozen=True, eq=False)
class NormSettings:
    """centered: LayerNorm. cast: the normalised row is rounded to x's dtype before the weight is applied.

    Compared by identity, which costs nothing: ``norm_settings`` makes one of each.
    """

    operator: str
    eps: float
    offset: float = 0.0
    cast: bool = False
    centered: bool = False


norm_settings = lru_cache(256)(NormSettings)


def norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    settings: NormSettings,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """y, or (y, x + residual) where there is a residual. Raises ValueError, NotImplementedError for what can't be."""
    check_device(settings.operator, x)
    if x.shape[-1] > LARGEST_ROW:
        raise NotImplementedError(
            f"{settings.operator}: rows of {x.shape[-1]} are not there with backend='triton'; up to {LARGEST_ROW} are"
        )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, weight, bias)):
        out, total = _Norm.apply(x, residual, weight, bias, settings)
    else:
        out, total, _, _ = forward(x, residual, weight, bias, settings)
    return out if residual is None else (out, total)


def forward(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    settings: NormSettings,
    *,
    save: bool = False,
    tile: RowTile | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """y, x + residual, mean and 1 / sqrt (float32 [rows]), the latter three where asked for. ``tile``: a schedule."""
    launch, num_rows, copy = _forward_launch(
        x.shape, x.stride(), stride_of(residual), stride_of(weight), stride_of(bias), x.dtype, settings, tile, save
    )
    if copy:
        x, residual = made_contiguous(x, residual)
    out = x.new_empty(x.shape)
    total = None if residual is None else x.new_empty(x.shape)
    mean = x.new_empty(num_rows, dtype=torch.float32) if save and settings.centered else None
    inverse = x.new_empty(num_rows, dtype=torch.float32) if save else None
    if launch is not None:
        launch(x, residual, weight, bias, out, total, mean, inverse)
    return out, total, mean, inverse


@lru_cache(4096)
def _forward_launch(
    shape: torch.Size,
    stride_x: tuple[int, ...],
    stride_r: tuple[int, ...] | None,
    stride_w: tuple[int] | None,
    stride_b: tuple[int] | None,
    dtype: torch.dtype,
    settings: NormSettings,
    tile: RowTile | None,
    save: bool,
) -> tuple[Launch | None, int, bool]:
    """None where there is nothing to do, number of rows, and whether x and residual must be made contiguous."""
    rows, copy = as_rows(shape, stride_x, stride_r, keep_last=True)
    size, strides = rows.num_columns, (*rows.strides, _NONE)[:2]
    if 0 in shape:
        return None, rows.num_rows, False
    tile = tile or forward_tile(size, dtype.itemsize)
    launch = Launch(
        norm_forward_kernel,
        (-(-rows.num_rows // tile.rows),),
        (rows.num_rows, rows.inner, *strides[0], *strides[1], *(stride_w or (0,)), *(stride_b or (0,)), settings.eps,
         settings.offset),
        H=size, LANES=lanes(size), ROWS=tile.rows, CENTERED=settings.centered,
        CAST=settings.cast and dtype != torch.float32, HAS_RESIDUAL=stride_r is not None,
        HAS_WEIGHT=stride_w is not None, HAS_BIAS=stride_b is not None, HAS_OFFSET=settings.offset != 0, SAVE=save,
        num_warps=tile.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return launch, rows.num_rows, copy


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        settings: NormSettings,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, total, mean, inverse = forward(x, residual, weight, bias, settings, save=True)
        ctx.save_for_backward(x if total is None else total, weight, mean, inverse)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        if total is not None and not (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
            ctx.mark_non_differentiable(total)
        return out, total

    @staticmethod
    @once_differentiable
    def backward(
        ctx, grad: torch.Tensor | None, grad_total: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, None]:
        need_x, need_residual, need_weight, need_bias, _ = ctx.needs_input_grad
        if grad is None:
            dh, dweight, dbias = grad_total, None, None
        else:
            dh, dweight, dbias = backward(
                grad, grad_total, *ctx.saved_tensors, ctx.settings,
                need_h=need_x or need_residual, need_weight=need_weight, need_bias=need_bias,
            )  # fmt: skip
        return dh if need_x else None, dh if need_residual else None, dweight, dbias, None


def backward(
    grad: torch.Tensor,
    grad_total: torch.Tensor | None,
    h: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor | None,
    inverse: torch.Tensor,
    settings: NormSettings,
    *,
    need_h: bool = True,
    need_weight: bool = True,
    need_bias: bool = False,
    tile: RowTile | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of h = x + residual, of weight and of bias, None for what is not needed.

    ``tile``: a schedule; its rows per program are part of the order in which weight gradients are added, its warps of
    that of a row's sums.
    """
    size = h.shape[-1]
    launch, num_parts, copy = _backward_launch(
        h.shape, grad.stride(), h.stride(), stride_of(grad_total), stride_of(weight), h.dtype, settings,
        need_h, need_weight, need_bias, architecture(h.device), tile,
    )  # fmt: skip
    if copy:
        grad, h, grad_total = made_contiguous(grad, h, grad_total)
    dh = h.new_empty(h.shape) if need_h else None
    needed = (need_weight, need_bias)
    if launch is None:
        return dh, *(h.new_zeros(size) if need else None for need in needed)
    parts = h.new_empty(sum(needed), num_parts, size, dtype=torch.float32)
    launch(grad, grad_total, h, weight, mean, inverse, dh, *_by_need(parts, needed))
    return dh, *_by_need(_add_parts(parts, h.dtype), needed)


def _by_need(tensors: torch.Tensor, needed: tuple[bool, ...]) -> list[torch.Tensor | None]:
    """One tensor [N, ...] as N for those that are needed, None for the others."""
    found = iter(tensors.unbind())
    return [next(found) if need else None for need in needed]


@lru_cache(4096)
def _backward_launch(
    shape: torch.Size,
    stride_g: tuple[int, ...],
    stride_h: tuple[int, ...],
    stride_s: tuple[int, ...] | None,
    stride_w: tuple[int] | None,
    dtype: torch.dtype,
    settings: NormSettings,
    need_h: bool,
    need_weight: bool,
    need_bias: bool,
    machine: tuple[int, int],
    tile: RowTile | None,
) -> tuple[Launch | None, int, bool]:
    """None where there is nothing to do, number of programs, and whether the inputs must be made contiguous."""
    rows, copy = as_rows(shape, stride_g, stride_h, stride_s, keep_last=True)
    if 0 in shape:
        return None, 0, False
    size = rows.num_columns
    tile = tile or backward_tile(size, dtype.itemsize, machine, settings.centered)
    num_tiles = -(-rows.num_rows // tile.rows)
    num_parts = min(num_tiles, most_parts(size)) if need_weight or need_bias else num_tiles
    grad, h, grad_total = (*rows.strides, _NONE)[:3]
    launch = Launch(
        norm_backward_kernel,
        (num_parts,),
        (rows.num_rows, rows.inner, *grad, *grad_total, *h, *(stride_w or (0,)), settings.offset,
         num_parts * tile.rows),
        H=size, WIDTH=backward_width(size, dtype.itemsize, tile.num_warps), ROWS=tile.rows, CENTERED=settings.centered,
        HAS_SUM=stride_s is not None,
        HAS_WEIGHT=stride_w is not None, NEED_H=need_h, NEED_WEIGHT=need_weight, NEED_BIAS=need_bias,
        STAGES=tile.num_stages, OVERLAP=_overlap(size, machine), num_warps=tile.num_warps,
        enable_fp_fusion=False,
    )  # fmt: skip
    return launch, num_parts, copy


def _add_parts(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sums [N, H] of ``dtype`` of float32 parts [N, P, H]: weight's and bias's gradient in one launch."""
    out = parts.new_empty(parts.shape[0], parts.shape[2], dtype=dtype)
    if parts.shape[0]:
        _parts_launch(*parts.shape, dtype, architecture(parts.device))(parts, out)
    return out


@lru_cache(1024)
def _parts_launch(num_sums: int, num_parts: int, size: int, dtype: torch.dtype, machine: tuple[int, int]) -> Launch:
    overlap = _overlap(size, machine)
    # a power of two: few kernels to compile
    turns = 1 << (-(-num_parts // _PART_LANES) - 1).bit_length()
    return Launch(
        norm_parts_kernel, (-(-size // _PART_COLUMNS), num_sums), (num_parts, size),
        PARTS=_PART_LANES, TURNS=turns, BLOCK=_PART_COLUMNS, OVERLAP=overlap, num_warps=1, enable_fp_fusion=False,
        **({"launch_pdl": True} if overlap else {}),
    )  # fmt: skip


def _overlap(size: int, machine: tuple[int, int]) -> bool:
    """Whether the second kernel is launched while the first one runs: worth it where that one takes little time."""
    return size <= 1024 and machine >= (9, 0) and not knobs.runtime.interpret
