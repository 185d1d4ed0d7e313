"""T11: log-probs of tokens as they were drawn, token by token, against the trainer's packed forward: equal bits.

What is drawn here goes through ``Policy.sample``, as in the engine, but over whole prefixes and without a cache.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.samples import make_samples
from support.trainers import make_trainer

from rlalign.config import SamplingParams
from rlalign.modeling import PackedContext, Policy, sampling_rows
from rlalign.records import Sample

EOS = (3, 4, 5)
SAMPLINGS = (
    SamplingParams(),
    SamplingParams(temperature=0.6),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.7, top_k=5),
    SamplingParams(top_p=0.7),
    SamplingParams(min_p=0.05),
    SamplingParams(temperature=1.2, top_k=40, top_p=0.9, min_p=0.01),
    SamplingParams(min_tokens=3, stop_token_ids=(0, 1, 2)),
    SamplingParams(min_tokens=3, top_k=30, stop_token_ids=tuple(range(6, 60)), ignore_eos=True),
    SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=tuple(range(40, 97))),
)
SHAPES = [(3 + i, 4 + i % 3) for i in range(len(SAMPLINGS))]


def banned_ids(sampling: SamplingParams, place: int) -> list[int]:
    if place >= sampling.min_tokens:
        return []
    return [*sampling.stop_token_ids, *(() if sampling.ignore_eos else EOS)]


@torch.no_grad()
def draw(policy: Policy, sample: Sample) -> Sample:
    """The sample with every response token drawn from ``policy``, and the log-prob that the draw reported."""
    completion, sampling = sample.completion, sample.sampling
    tokens, logprobs = completion.prompt_ids.tolist(), []
    for place in range(len(completion.token_ids)):
        ids = torch.tensor(tokens)
        context = PackedContext(torch.tensor([0, len(ids)], dtype=torch.int32))
        hidden = policy.hidden(ids, torch.arange(len(ids)), context)[-1:]
        banned = torch.zeros(1, policy.vocab_size, dtype=torch.bool)
        banned[0, banned_ids(sampling, place)] = True
        seed, position = torch.tensor([sample.key[1]]), torch.tensor([place])
        output = policy.sample(hidden, sampling_rows([sampling]), seed, position, banned=banned)
        tokens.append(int(output.token))
        logprobs.append(output.logprob.numpy())
    response = np.array(tokens[len(completion.prompt_ids) :])
    return replace(sample, completion=replace(completion, token_ids=response, logprobs=np.concatenate(logprobs)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_way_of_sampling_in_one_batch(dtype: torch.dtype) -> None:
    trainer = make_trainer(dtype=dtype, eos_ids=EOS)
    samples = [draw(trainer.policy, sample) for sample in make_samples(SHAPES, samplings=SAMPLINGS)]
    rollout = [sample.completion.logprobs for sample in samples]
    assert np.isfinite(np.concatenate(rollout)).all()
    for budget in (1000, 20):
        trainer = make_trainer(dtype=dtype, micro_batch_tokens=budget, eos_ids=EOS)
        advantages = [np.ones_like(array) for array in rollout]
        recomputed = trainer.accumulate(samples, advantages, old_logprobs=rollout).train_logprobs
        stored = trainer.compute_logprobs(samples)
        held = trainer.compute_logprobs(samples)
        for way in (recomputed, stored, held):
            assert [array.tobytes() for array in way] == [array.tobytes() for array in rollout]
        assert np.isfinite(trainer.apply_update()["grad_norm"])


def test_forgetting_the_ban_would_be_seen() -> None:
    trainer = make_trainer(eos_ids=EOS)
    samples = [draw(trainer.policy, sample) for sample in make_samples([(4, 5)], samplings=SAMPLINGS[7:8])]
    without = [replace(sample, sampling=replace(sample.sampling, min_tokens=0)) for sample in samples]
    (right,), (wrong,) = trainer.compute_logprobs(samples), trainer.compute_logprobs(without)
    assert (right[:3] > wrong[:3]).all()
    assert right[3:].tobytes() == wrong[3:].tobytes()


def test_a_ban_that_cannot_be_known_is_refused() -> None:
    (sample,) = make_samples([(4, 5)], samplings=SAMPLINGS[7:8])
    with pytest.raises(ValueError, match="min_tokens=3, which bans the end of sequence"):
        make_trainer().compute_logprobs([sample])
    make_trainer().compute_logprobs([replace(sample, sampling=replace(sample.sampling, ignore_eos=True))])
