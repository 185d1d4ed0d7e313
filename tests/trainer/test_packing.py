"""Packing: by sample key and config alone, without padding, with every row's own sampling parameters."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from support.samples import make_sample, make_samples

from rlalign.config import SamplingParams
from rlalign.records import Sample
from rlalign.trainer import PackedBatch, pack_samples

SHAPES = [(3, 4), (1, 1), (5, 2), (2, 6), (4, 3), (1, 9)]


def pack(samples: list[Sample], budget: int, vocab_size: int = 97, max_positions: int = 64) -> list[PackedBatch]:
    return pack_samples(samples, micro_batch_tokens=budget, vocab_size=vocab_size, max_positions=max_positions)


def test_rows_predict_their_response_tokens() -> None:
    samples = make_samples([(3, 2), (1, 3)])
    (batch,) = pack(samples, 100)
    first, second = (s.completion for s in samples)
    expected = [*first.prompt_ids, first.token_ids[0], *second.prompt_ids, *second.token_ids[:2]]
    assert batch.token_ids.tolist() == expected
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.cu_seqlens.tolist() == [0, 4, 7]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.max_seqlen == 4
    assert batch.predict_rows.tolist() == [2, 3, 4, 5, 6]
    assert batch.targets.tolist() == [*first.token_ids, *second.token_ids]
    assert batch.sequence_lengths.tolist() == [2, 2, 3, 3, 3]
    assert batch.owner.tolist() == [0, 0, 1, 1, 1]


def test_the_order_of_arrival_reaches_owners_only() -> None:
    samples = make_samples(SHAPES)
    shuffled = random.Random(0).sample(samples, len(samples))
    for ours, theirs in zip(pack(samples, 9), pack(shuffled, 9), strict=True):
        assert torch.equal(ours.token_ids, theirs.token_ids)
        assert torch.equal(ours.cu_seqlens, theirs.cu_seqlens)
        assert [samples[i].key for i in ours.owners] == [shuffled[i].key for i in theirs.owners]


@pytest.mark.parametrize("budget", [1, 7, 9, 14, 1000])
def test_micro_batches_are_greedy_within_the_budget(budget: int) -> None:
    batches = pack(make_samples(SHAPES), budget)
    rows = {index: p + n - 1 for index, (p, n) in enumerate(SHAPES)}
    assert [index for batch in batches for index in batch.owners] == sorted(rows)
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        size = len(batch.token_ids)
        assert size == sum(rows[index] for index in batch.owners)
        assert size <= budget or len(batch.owners) == 1
        assert following is None or size + rows[following.owners[0]] > budget


def test_every_row_carries_its_own_sampling_parameters() -> None:
    samplings = [SamplingParams(temperature=0.5), SamplingParams(top_k=3, top_p=0.9), SamplingParams(min_p=0.1)]
    samples = make_samples([(2, 2), (2, 3), (2, 1)], samplings=samplings)
    (batch,) = pack(samples, 100)
    assert batch.rows.temperature.tolist() == [0.5, 0.5, 1, 1, 1, 1]
    assert batch.rows.top_k.tolist() == [0, 0, 3, 3, 3, 0]
    assert torch.equal(batch.rows.min_p, torch.tensor([0, 0, 0, 0, 0, 0.1]))
    assert batch.truncated == (False, True, True)
    assert batch.truncated_rows.tolist() == [2, 3, 4, 5]


def test_gather_and_scatter_keep_bits_and_order() -> None:
    samples = random.Random(1).sample(make_samples(SHAPES), len(SHAPES))
    generator = np.random.default_rng(0)
    arrays = [generator.standard_normal(len(s.completion.token_ids)).astype(np.float32) for s in samples]
    result: list[np.ndarray] = [np.empty(0, np.float32)] * len(samples)
    for batch in pack(samples, 9):
        batch.scatter(batch.gather("x", arrays), result)
    assert [a.tobytes() for a in result] == [a.tobytes() for a in arrays]
    with pytest.raises(ValueError, match=r"x\[0\] has shape \(1,\)"):
        pack(make_samples([(2, 2)]), 9)[0].gather("x", [np.zeros(1, np.float32)])


def test_a_sample_without_response_is_left_out() -> None:
    (batch,) = pack(make_samples([(2, 0), (3, 1)]), 100)
    assert batch.owners == (1,)
    assert pack(make_samples([(2, 0)]), 100) == []


def test_what_cannot_be_packed_is_named() -> None:
    with pytest.raises(ValueError, match=r"two samples have the key \(0, 1, 0\)"):
        pack([make_sample(1, 0, 2, 2), make_sample(1, 0, 2, 2)], 100)
    with pytest.raises(ValueError, match=r"sample \(0, 1, 0\) has an empty prompt"):
        pack([make_sample(1, 0, 0, 2)], 100)
    with pytest.raises(ValueError, match=r"sample \(0, 1, 0\) needs 65 positions"):
        pack([make_sample(1, 0, 60, 6)], 100)
    assert len(pack([make_sample(1, 0, 60, 5)], 100)) == 1
    bad = make_sample(1, 0, 2, 2)
    bad.completion.token_ids[1] = 97
    with pytest.raises(ValueError, match="response token id 97 is outside the vocabulary of 97"):
        pack([bad], 100)
    bad.completion.prompt_ids[0] = -1
    with pytest.raises(ValueError, match="prompt token id -1"):
        pack([bad], 100)
