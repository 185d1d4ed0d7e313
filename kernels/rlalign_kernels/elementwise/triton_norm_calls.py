"""From the public norms to their kernels: launches kept by shape, and the autograd function around both directions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from rlalign_kernels.elementwise.layout import Rows, as_rows
from rlalign_kernels.elementwise.row_plan import (
    LARGEST_ROW,
    RowTile,
    backward_tile,
    forward_tile,
    lanes,
    rows_per_part,
)
from rlalign_kernels.elementwise.triton_norm import norm_backward_kernel, norm_forward_kernel, norm_parts_kernel
from rlalign_kernels.elementwise.triton_rows import check_device
from rlalign_kernels.launch import Launch

_PART_LANES, _PART_COLUMNS = 64, 32
_NONE = (0, 0, 0)


@dataclass(frozen=True)
class NormSettings:
    """centered: LayerNorm. cast: the normalised row is rounded to x's dtype before the weight is applied."""

    operator: str
    eps: float
    offset: float = 0.0
    cast: bool = False
    centered: bool = False


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
    given = (x,) if residual is None else (x, residual)
    rows, given = as_rows(*given, keep_last=True)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty_like(out)
    mean = torch.empty(rows.num_rows, dtype=torch.float32, device=x.device) if save and settings.centered else None
    inverse = torch.empty(rows.num_rows, dtype=torch.float32, device=x.device) if save else None
    if out.numel():
        launch = _forward_launch(
            rows, x.dtype, _stride(weight), _stride(bias), settings, tile or forward_tile(x.shape[-1], x.itemsize), save
        )
        launch(given[0], None if residual is None else given[1], weight, bias, out, total, mean, inverse)
    return out, total, mean, inverse


def _stride(vector: torch.Tensor | None) -> int | None:
    return None if vector is None else vector.stride(0)


@lru_cache(4096)
def _forward_launch(
    rows: Rows,
    dtype: torch.dtype,
    stride_w: int | None,
    stride_b: int | None,
    settings: NormSettings,
    tile: RowTile,
    save: bool,
) -> Launch:
    strides = (*rows.strides, _NONE)[:2]
    return Launch(
        norm_forward_kernel,
        (-(-rows.num_rows // tile.rows),),
        (rows.num_rows, rows.inner, *strides[0], *strides[1], stride_w or 0, stride_b or 0, settings.eps,
         settings.offset),
        H=rows.num_columns, LANES=lanes(rows.num_columns), ROWS=tile.rows, CENTERED=settings.centered,
        CAST=settings.cast and dtype != torch.float32, HAS_RESIDUAL=len(rows.strides) == 2,
        HAS_WEIGHT=stride_w is not None, HAS_BIAS=stride_b is not None, HAS_OFFSET=settings.offset != 0, SAVE=save,
        num_warps=tile.num_warps, enable_fp_fusion=False,
    )  # fmt: skip


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
        ctx.settings, ctx.bias_dtype = settings, None if bias is None else bias.dtype
        ctx.set_materialize_grads(False)
        return out, total

    @staticmethod
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
    num_warps: int | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Gradients of h = x + residual, of weight and of bias, None for what is not needed. ``num_warps``: a schedule."""
    size, dtype = h.shape[-1], h.dtype
    dh = torch.empty(h.shape, dtype=dtype, device=h.device) if need_h else None
    if h.numel() == 0:
        empty = [torch.zeros(size, dtype=dtype, device=h.device) if need else None for need in (need_weight, need_bias)]
        return dh, *empty
    given = (grad, h) if grad_total is None else (grad, h, grad_total)
    rows, given = as_rows(*given, keep_last=True)
    launch, num_parts = _backward_launch(
        rows, dtype, _stride(weight), settings, need_h, need_weight, need_bias, num_warps
    )
    parts = [
        torch.empty(num_parts, size, dtype=torch.float32, device=h.device) if need else None
        for need in (need_weight, need_bias)
    ]
    launch(given[0], None if grad_total is None else given[2], given[1], weight, mean, inverse, dh, *parts)
    return dh, *(_add_parts(part, dtype) for part in parts)


@lru_cache(4096)
def _backward_launch(
    rows: Rows,
    dtype: torch.dtype,
    stride_w: int | None,
    settings: NormSettings,
    need_h: bool,
    need_weight: bool,
    need_bias: bool,
    num_warps: int | None,
) -> tuple[Launch, int]:
    size = rows.num_columns
    tile = backward_tile(size, dtype.itemsize)
    per_part = rows_per_part(rows.num_rows, tile.rows) if need_weight or need_bias else tile.rows
    num_parts = -(-rows.num_rows // per_part)
    grad, h, grad_total = (*rows.strides, _NONE)[:3]
    launch = Launch(
        norm_backward_kernel,
        (num_parts,),
        (rows.num_rows, rows.inner, *grad, *grad_total, *h, stride_w or 0, settings.offset, per_part),
        H=size, LANES=lanes(size), ROWS=tile.rows, CENTERED=settings.centered, HAS_SUM=len(rows.strides) == 3,
        HAS_WEIGHT=stride_w is not None, NEED_H=need_h, NEED_WEIGHT=need_weight, NEED_BIAS=need_bias,
        num_warps=num_warps or tile.num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return launch, num_parts


def _add_parts(parts: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    if parts is None:
        return None
    out = torch.empty(parts.shape[1], dtype=dtype, device=parts.device)
    _parts_launch(*parts.shape, dtype)(parts, out)
    return out


@lru_cache(1024)
def _parts_launch(num_parts: int, size: int, dtype: torch.dtype) -> Launch:
    return Launch(
        norm_parts_kernel, (-(-size // _PART_COLUMNS),), (num_parts, size),
        PARTS=_PART_LANES, BLOCK=_PART_COLUMNS, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
