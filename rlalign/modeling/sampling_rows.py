"""Sampling parameters of requests as the per-row tensors that the kernels take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rlalign_kernels import SamplingRows

from rlalign.config import SamplingParams


def sampling_rows(params: Sequence[SamplingParams], device: torch.device | str = "cpu") -> SamplingRows:
    """One row per entry of ``params``; repeat an entry for each of its rows."""
    return SamplingRows(
        temperature=torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device),
        top_k=torch.tensor([p.top_k for p in params], dtype=torch.int64, device=device),
        top_p=torch.tensor([p.top_p for p in params], dtype=torch.float32, device=device),
        min_p=torch.tensor([p.min_p for p in params], dtype=torch.float32, device=device),
    )
