"""Model FLOPs and their share of a device's peak, against counts made by hand."""

from __future__ import annotations

import pytest

from rlalign.actors.peak import known_tflops
from rlalign.run.numbers import training_flops


def test_flops_of_two_sequences_by_hand():
    size = {"weights": 100, "head": 10, "attention": 7}
    # per sequence: 2 a weight and token, 2 a weight of the head and response token, pairs of tokens in each layer
    first, second = 2 * (100 * 5 + 10 * 2) + 7 * 25, 2 * (100 * 3 + 10 * 1) + 7 * 9
    assert training_flops(size, [(5, 2), (3, 1)]) == 3 * (first + second)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989.4), ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA L40S", 362.0), ("NVIDIA L4", 121.0), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_a_gpus_peak_is_known_by_its_name(name, tflops):
    assert known_tflops(name) == tflops
