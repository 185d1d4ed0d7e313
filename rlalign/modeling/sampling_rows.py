"""Sampling parameters of requests as the per-row tensors that the kernels take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from rlalign_kernels import SamplingRows
from torch import Tensor

from rlalign.config import SamplingParams


def sampling_arrays(params: Sequence[SamplingParams]) -> dict[str, np.ndarray]:
    """The fields of ``SamplingRows`` on the host, one entry per entry of ``params``."""
    return {
        "temperature": np.array([p.temperature for p in params], np.float32),
        "top_k": np.array([p.top_k for p in params], np.int64),
        "top_p": np.array([p.top_p for p in params], np.float32),
        "min_p": np.array([p.min_p for p in params], np.float32),
    }


def rows_of(arrays: Mapping[str, np.ndarray], tensors: Mapping[str, Tensor]) -> SamplingRows:
    """Rows of ``sampling_arrays`` and the same on the device, which need not be asked whether any row has a filter."""
    filtered = (arrays["top_k"] > 0) | (arrays["top_p"] < 1) | (arrays["min_p"] > 0)
    truncates = bool((filtered & (arrays["temperature"] != 0)).any())
    return SamplingRows(**{name: tensors[name] for name in arrays}, truncates=truncates)


def sampling_rows(params: Sequence[SamplingParams], device: torch.device | str = "cpu") -> SamplingRows:
    """One row per entry of ``params``; repeat an entry for each of its rows."""
    arrays = sampling_arrays(params)
    return rows_of(arrays, {name: torch.from_numpy(array).to(device) for name, array in arrays.items()})
