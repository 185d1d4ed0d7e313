"""A step's arrays on their way to the device, and what they say there without being asked."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlalign.config import EngineConfig, SamplingParams
from rlalign.engine.transfer import pack, to_device, unpack
from rlalign.modeling import sampling_rows

ARRAYS = {
    "tokens": np.arange(7, dtype=np.int64),
    "tables": np.arange(6, dtype=np.int32).reshape(2, 3),
    "none": np.zeros((2, 0), np.int64),
    "temperature": np.array([0.5, -0.0, np.inf], np.float32),
    "transposed": np.arange(6, dtype=np.int64).reshape(2, 3).T,
}


def test_arrays_survive_one_buffer():
    arrived = unpack(pack(ARRAYS, pinned=False), ARRAYS)
    assert list(arrived) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert arrived[name].numpy().dtype == array.dtype and arrived[name].shape == array.shape
        assert arrived[name].numpy().tobytes() == array.tobytes()
        assert arrived[name].storage_offset() * arrived[name].element_size() % 64 == 0


def test_on_a_cpu_nothing_is_copied():
    assert to_device(ARRAYS, torch.device("cpu"))["tokens"].data_ptr() == ARRAYS["tokens"].ctypes.data


@pytest.mark.parametrize(
    ("params", "truncates"),
    [
        ([], False),
        ([SamplingParams(), SamplingParams(temperature=0.5)], False),
        ([SamplingParams(temperature=0.0, top_k=3)], False),
        ([SamplingParams(), SamplingParams(top_k=3)], True),
        ([SamplingParams(top_p=1 - 1e-12)], False),  # 1 in float32
        ([SamplingParams(min_p=0.1)], True),
    ],
)
def test_rows_know_whether_any_of_them_has_a_filter(params, truncates):
    rows = sampling_rows(params)
    assert rows.truncates is truncates
    assert bool(rows.truncated.any()) is truncates


@pytest.mark.parametrize(("device", "page_size", "num_pages"), [("cpu", 16, 2048), ("cuda", 128, 256)])
def test_pages_are_as_large_as_the_device_likes_them(device, page_size, num_pages):
    found = EngineConfig().on(device)
    assert (found.page_size, found.num_pages) == (page_size, num_pages)
    assert EngineConfig(page_size=32).on(device).num_pages == 1024
    given = EngineConfig(page_size=4, num_pages=7)
    assert given.on(device) == given
