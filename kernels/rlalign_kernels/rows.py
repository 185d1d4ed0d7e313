"""Records of the vocabulary operators. Legend: T rows, V vocabulary entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch


@dataclass(frozen=True)
class SamplingRows:
    """Sampling settings of each row, on the rows' device.

    temperature float32 [T] (0: greedy), top_k int64 [T] (0: off), top_p float32 [T] (1: off), min_p float32 [T] (0:
    off). Make new rows rather than changing these tensors: what follows from them is remembered.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor

    def __len__(self) -> int:
        return self.temperature.shape[0]

    def __getitem__(self, index: torch.Tensor | slice) -> SamplingRows:
        return SamplingRows(self.temperature[index], self.top_k[index], self.top_p[index], self.min_p[index])

    @cached_property
    def greedy(self) -> torch.Tensor:
        """bool [T]."""
        return self.temperature == 0

    @cached_property
    def truncated(self) -> torch.Tensor:
        """bool [T]: rows whose support can be smaller than the vocabulary."""
        filtered = (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)
        return filtered & ~self.greedy

    @cached_property
    def any_greedy(self) -> bool:
        return bool(self.greedy.any())

    @cached_property
    def any_truncated(self) -> bool:
        return bool(self.truncated.any())

    @cached_property
    def divisor(self) -> torch.Tensor | None:
        """float32 [T, 1] to divide logits by, greedy rows counting as 1; None if that is 1 everywhere."""
        divisor = torch.where(self.greedy, 1.0, self.temperature) if self.any_greedy else self.temperature
        return None if bool((divisor == 1).all()) else divisor.unsqueeze(1)

    def check(self, operator: str, num_rows: int) -> None:
        """Raises ValueError naming the field that has another shape, or a value out of its bounds."""
        for name, (dtype, valid) in _BOUNDS.items():
            values = getattr(self, name)
            if values.dtype != dtype or tuple(values.shape) != (num_rows,):
                raise ValueError(
                    f"{operator}: rows.{name} is {values.dtype} {tuple(values.shape)}; expected {dtype} ({num_rows},)"
                )
            host = values.cpu().numpy()
            good = valid(host)
            if not good.all():
                row = int(good.argmin())
                raise ValueError(f"{operator}: rows.{name}[{row}]={host[row]} is out of bounds")


_BOUNDS: dict[str, tuple[torch.dtype, Callable[[np.ndarray], np.ndarray]]] = {
    "temperature": (torch.float32, lambda x: (x >= 0) & np.isfinite(x)),
    "top_k": (torch.int64, lambda x: x >= 0),
    "top_p": (torch.float32, lambda x: (x > 0) & (x <= 1)),
    "min_p": (torch.float32, lambda x: (x >= 0) & (x < 1)),
}


@dataclass(frozen=True)
class LogprobOutput:
    """logprob, entropy, logsumexp: float32 [T]; support: bool [T, V], or None if it was not asked for."""

    logprob: torch.Tensor
    entropy: torch.Tensor
    logsumexp: torch.Tensor
    support: torch.Tensor | None = None


@dataclass(frozen=True)
class SampleOutput:
    """token int64 [T]; logprob float32 [T]; raw_logprob float32 [T], or None if it was not asked for."""

    token: torch.Tensor
    logprob: torch.Tensor
    raw_logprob: torch.Tensor | None = None
