"""T3 on the trainer's side: what other samples of a micro-batch hold reaches no bit of a sample's log-probs."""

from __future__ import annotations

import pytest
import torch
from support.models import tiny_model
from support.samples import make_samples

from rlalign.config import AlgorithmConfig, TrainerConfig
from rlalign.modeling import Policy, align
from rlalign.trainer import Trainer

SHAPES = [(3, 4), (6, 2), (20, 5), (2, 6), (9, 9), (1, 3)]
BROKEN = (1, 4)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3e38])
def test_broken_samples_in_the_same_micro_batch(family: str, value: float) -> None:
    policy = Policy(align(tiny_model(family), backend="reference"))  # untied: a broken embedding stays in its sample
    samples = make_samples(SHAPES)
    used = {int(t) for s in samples for t in (*s.completion.prompt_ids, *s.completion.token_ids)}
    unused = min(set(range(policy.vocab_size)) - used)
    for index in BROKEN:
        samples[index].completion.prompt_ids[:] = unused
    whole = [sample for index, sample in enumerate(samples) if index not in BROKEN]
    trainer = Trainer(policy, TrainerConfig(micro_batch_tokens=1000), AlgorithmConfig(), total_steps=1)
    expected = [values.tobytes() for values in trainer.compute_logprobs(whole)]

    with torch.no_grad():
        policy.model.get_input_embeddings().weight[unused] = value
    trainer.begin_batch()
    together = trainer.compute_logprobs(samples)
    assert [v.tobytes() for i, v in enumerate(together) if i not in BROKEN] == expected
    if value != value or value > 0:
        assert not any(torch.from_numpy(together[index]).isfinite().all() for index in BROKEN)
