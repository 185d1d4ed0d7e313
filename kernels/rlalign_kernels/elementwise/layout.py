"""How tensors of any strides become rows of columns.

Kernels see a tensor as rows [outer, inner] of columns with three strides in elements. Leading dimensions that lie
together in memory are one; tensors that still have more than two are copied first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rows:
    """Tensors of one shape as ``num_rows`` rows of ``num_columns``; row r is (r // inner, r % inner).

    strides: per tensor (outer, inner, column), in elements.
    """

    num_rows: int
    inner: int
    num_columns: int
    strides: tuple[tuple[int, int, int], ...]


def as_rows(shape: torch.Size, *strides: tuple[int, ...] | None, keep_last: bool) -> tuple[Rows, bool]:
    """Tensors of one shape as rows, and whether they must be made contiguous first. Strides None: no such tensor.

    keep_last: the last dimension is the columns; otherwise as much as lies together.
    """
    given = tuple(stride for stride in strides if stride is not None)
    found = _rows(shape, given, keep_last)
    if found is not None:
        return found, False
    return _rows(shape, (_contiguous_strides(shape),) * len(given), keep_last), True


def _contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def made_contiguous(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    return tuple(None if x is None else x.contiguous() for x in tensors)


def stride_of(x: torch.Tensor | None) -> tuple[int, ...] | None:
    return None if x is None else x.stride()


def _rows(shape: torch.Size, strides: tuple[tuple[int, ...], ...], keep_last: bool) -> Rows | None:
    """None where more than two leading dimensions are left."""
    sizes: list[int] = []
    steps: list[tuple[int, ...]] = []
    last = len(shape) - 1
    for i, size in enumerate(shape):
        step = tuple(stride[i] for stride in strides)
        if size == 1 and not (keep_last and i == last):
            continue
        joins = sizes and not (keep_last and i == last) and all(a == b * size for a, b in zip(steps[-1], step))  # noqa: B905
        if joins:
            sizes[-1], steps[-1] = sizes[-1] * size, step
        else:
            sizes.append(size)
            steps.append(step)
    while len(sizes) < 3:
        sizes.insert(0, 1)
        steps.insert(0, (0,) * len(strides))
    if len(sizes) > 3:
        return None
    (outer, inner, columns), (outers, inners, steps_c) = sizes, steps
    if inner == 1 or outer == 1:  # a single leading dimension counts as the outer one: nothing to divide by
        outers, inners = (outers if inner == 1 else inners), (0,) * len(strides)
        outer, inner = outer * inner, 1
    return Rows(outer * inner, inner, columns, tuple(zip(outers, inners, steps_c, strict=True)))
