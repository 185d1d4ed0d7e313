"""Metrics that carry their reduction, so that micro-batches, minibatches and ranks merge exactly.

A mean is kept as (sum, count) and divided once, when it is read; an extreme stays an extreme. The mean of means over
micro-batches of unequal size is therefore impossible to write by accident.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

Reduction = Literal["mean", "sum", "max", "min"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One partial result. ``total``: the sum (mean, sum) or the extreme (max, min) over ``count`` entries.

    Example:
        >>> (Metric("mean", 6.0, 3) + Metric("mean", 0.0, 1)).value
        1.5
    """

    reduction: Reduction
    total: float
    count: int

    def __add__(self, other: Metric) -> Metric:
        if self.reduction != other.reduction:
            raise ValueError(f"cannot merge a {self.reduction} with a {other.reduction}")
        # An empty part must not win an extreme with its placeholder.
        if self.count == 0 or other.count == 0:
            return other if self.count == 0 else self
        count = self.count + other.count
        if self.reduction in ("max", "min"):
            pair = torch.tensor([self.total, other.total], dtype=torch.float64)
            # Through torch, because Python's max() may drop a NaN.
            extreme = pair.max() if self.reduction == "max" else pair.min()
            return Metric(self.reduction, float(extreme), count)
        return Metric(self.reduction, self.total + other.total, count)

    @property
    def value(self) -> float:
        """The reduced number; NaN for anything but a sum over no entries."""
        if self.count == 0:
            return 0.0 if self.reduction == "sum" else float("nan")
        return self.total / self.count if self.reduction == "mean" else self.total


def mean_of(values: torch.Tensor) -> Metric:
    """Mean over all entries of ``values`` (any shape and dtype), summed in float64."""
    return Metric("mean", float(values.detach().double().sum()), values.numel())


def sum_of(values: torch.Tensor) -> Metric:
    """Sum over all entries: for parts of a loss whose denominator is inside already."""
    return Metric("sum", float(values.detach().double().sum()), values.numel())


def max_of(values: torch.Tensor) -> Metric:
    """Maximum over all entries; NaN if one is NaN."""
    return Metric("max", float(values.detach().max()) if values.numel() else float("nan"), values.numel())


def min_of(values: torch.Tensor) -> Metric:
    """Minimum over all entries; NaN if one is NaN."""
    return Metric("min", float(values.detach().min()) if values.numel() else float("nan"), values.numel())


def merge(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """One dict over all parts, in the order given; a name may be missing from some parts."""
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = merged[name] + metric if name in merged else metric
    return merged


def merge_updates(updates: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """One dict over the optimizer's updates of a step: as ``merge``, but what is summed within an update, its loss, is
    averaged over them."""
    return merge({name: _of_an_update(metric) for name, metric in update.items()} for update in updates)


def _of_an_update(metric: Metric) -> Metric:
    return replace(metric, reduction="mean", count=1) if metric.reduction == "sum" else metric


def values(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """The reduced numbers, for logging."""
    return {name: metric.value for name, metric in metrics.items()}
