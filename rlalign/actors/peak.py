"""What a GPU multiplies at most, by its makers: what ``perf/mfu`` is a share of."""

from __future__ import annotations

import re

import torch

from rlalign.config import Config

# TFLOP/s of dense matrices of 16 bit numbers with float32 sums, from NVIDIA's data sheets; the narrower name first.
_TFLOPS = {
    "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.4, "H200": 989.4, "GH200": 989.4, "B200": 2250.0, "A100": 312.0,
    "L40S": 362.0, "L4": 121.0, "RTX 4090": 165.2, "RTX 3090": 71.0,
}  # fmt: skip


def peak_tflops(config: Config, device: str) -> float | None:
    """TFLOP/s: the setting's, or this GPU's; None for one that isn't in the table, a CPU, and float32 models."""
    if config.cluster.peak_tflops is not None:
        return config.cluster.peak_tflops
    if device != "cuda" or config.model.dtype == "float32":
        return None
    return known_tflops(torch.cuda.get_device_name())


def known_tflops(gpu: str) -> float | None:
    """TFLOP/s of a GPU, by the name that its driver gives it; None for one that isn't in the table."""
    return next((peak for name, peak in _TFLOPS.items() if re.search(rf"\b{name}\b", gpu)), None)
