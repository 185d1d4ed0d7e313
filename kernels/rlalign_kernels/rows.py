"""Records of the vocabulary operators. Legend: T rows, V vocabulary entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SamplingRows:
    """Sampling settings of each row, on the rows' device.

    temperature float32 [T] (0: greedy), top_k int64 [T] (0: off), top_p float32 [T] (1: off), min_p float32 [T] (0: off).
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor

    def __len__(self) -> int:
        return self.temperature.shape[0]

    def __getitem__(self, index: torch.Tensor | slice) -> SamplingRows:
        return SamplingRows(self.temperature[index], self.top_k[index], self.top_p[index], self.min_p[index])

    @property
    def greedy(self) -> torch.Tensor:
        """bool [T]."""
        return self.temperature == 0

    @property
    def truncated(self) -> torch.Tensor:
        """bool [T]: rows whose support can be smaller than the vocabulary."""
        filtered = (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)
        return filtered & ~self.greedy

    def check(self, operator: str, num_rows: int) -> None:
        """Raises ValueError naming the field that has another shape, or a value out of its bounds."""
        bounds = {
            "temperature": (torch.float32, lambda x: (x >= 0) & x.isfinite()),
            "top_k": (torch.int64, lambda x: x >= 0),
            "top_p": (torch.float32, lambda x: (x > 0) & (x <= 1)),
            "min_p": (torch.float32, lambda x: (x >= 0) & (x < 1)),
        }
        for name, (dtype, valid) in bounds.items():
            values = getattr(self, name)
            if values.dtype != dtype or tuple(values.shape) != (num_rows,):
                raise ValueError(
                    f"{operator}: rows.{name} is {values.dtype} {tuple(values.shape)}; expected {dtype} ({num_rows},)"
                )
            good = valid(values)
            if not bool(good.all()):
                row = int((~good).nonzero()[0])
                raise ValueError(f"{operator}: rows.{name}[{row}]={values[row].item()} is out of bounds")


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
