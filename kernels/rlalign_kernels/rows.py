"""Records of the vocabulary operators. Legend: T rows, V vocabulary entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

# Logits up to 14,000 may be divided by it: beyond 2^31, float32 is coarser than the range of its exponential.
LEAST_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class SamplingRows:
    """Sampling settings of each row, on the rows' device.

    temperature float32 [T] (0: greedy, otherwise at least LEAST_TEMPERATURE), top_k int64 [T] (0: off), top_p float32
    [T] (1: off), min_p float32 [T] (0: off). Make new rows rather than changing these tensors: what follows
    from them is remembered.
    ``truncates``: whether any row has a filter, where who made the rows knows. Without it a GPU is asked, and waited
    for; with False the triton backend reads nothing on the host, and gives NaN to a row that has a filter after all.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    truncates: bool | None = None

    def __len__(self) -> int:
        return self.temperature.shape[0]

    def __getitem__(self, index: torch.Tensor | slice) -> SamplingRows:
        truncates = None if self.truncates else self.truncates
        return SamplingRows(
            self.temperature[index], self.top_k[index], self.top_p[index], self.min_p[index], truncates
        )  # fmt: skip

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
        return bool(self.truncated.any()) if self.truncates is None else self.truncates

    @cached_property
    def divisor(self) -> torch.Tensor | None:
        """float32 [T, 1] to divide logits by, greedy rows counting as 1; None if that is 1 everywhere."""
        divisor = torch.where(self.greedy, 1.0, self.temperature) if self.any_greedy else self.temperature
        return None if bool((divisor == 1).all()) else divisor.unsqueeze(1)

    def check(self, operator: str, num_rows: int, *, values: bool = True) -> None:
        """Raises ValueError naming the field that has another shape or, with ``values``, one that is out of bounds."""
        for name, (dtype, valid) in _BOUNDS.items():
            given = getattr(self, name)
            if given.dtype != dtype or tuple(given.shape) != (num_rows,):
                raise ValueError(
                    f"{operator}: rows.{name} is {given.dtype} {tuple(given.shape)}; expected {dtype} ({num_rows},)"
                )
            if not values:
                continue
            host = given.cpu().numpy()
            good = valid(host)
            if not good.all():
                row = int(good.argmin())
                raise ValueError(f"{operator}: rows.{name}[{row}]={host[row]} is out of bounds")
        if values and self.truncates is False and bool(self.truncated.any()):
            row = int(self.truncated.nonzero()[0])
            raise ValueError(f"{operator}: rows.truncates=False, but row {row} has a filter")


_BOUNDS: dict[str, tuple[torch.dtype, Callable[[np.ndarray], np.ndarray]]] = {
    "temperature": (torch.float32, lambda x: (x == 0) | (x >= np.float32(LEAST_TEMPERATURE)) & np.isfinite(x)),
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
