"""Kept supports: exact after compaction, small, bounded."""

from __future__ import annotations

import pytest
import torch
from support.samples import make_sample

from rlalign.trainer import SupportStore


@pytest.mark.parametrize("share", [0.0, 0.002, 0.5, 1.0])
@pytest.mark.parametrize("vocab_size", [1, 97, 1000])
def test_round_trip(share: float, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    support = torch.rand(7, vocab_size, generator=generator) < share
    store, sample = SupportStore(), make_sample(0, 0, 1, 7)
    assert sample not in store
    store.put(sample, support)
    assert sample in store
    assert torch.equal(store.get(sample), support)


def test_takes_the_smaller_form() -> None:
    sparse = torch.zeros(10, 100_000, dtype=torch.bool)
    sparse[:, 5:9] = True
    store = SupportStore()
    store.put(make_sample(0, 0, 1, 10), sparse)
    assert store.num_bytes < 10 * 4 * 8
    store.clear()
    store.put(make_sample(0, 0, 1, 10), ~sparse)
    assert store.num_bytes == 10 * 100_000 // 8


def test_memory_is_bounded_and_replacing_does_not_leak() -> None:
    store = SupportStore(max_bytes=200)
    full = torch.ones(10, 97, dtype=torch.bool)
    for _ in range(3):
        store.put(make_sample(0, 0, 1, 10), full)
    assert store.num_bytes == 130
    with pytest.raises(MemoryError, match="more than 200 bytes"):
        store.put(make_sample(0, 1, 1, 10), full)
    store.clear()
    assert store.num_bytes == 0
    assert make_sample(0, 0, 1, 10) not in store
