"""Random rewarded samples, as a rollout would hand them over, for every room's tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlalign.config import SamplingParams
from rlalign.records import Completion, Prompt, Sample

DEFAULT = SamplingParams()


def make_sample(
    prompt_id: int,
    index: int,
    prompt_length: int,
    response_length: int,
    *,
    vocab_size: int = 97,
    sampling: SamplingParams = DEFAULT,
    step: int = 0,
    version: int = 0,
    reward: float | None = None,
) -> Sample:
    """Random token ids, log-probs and reward: a function of (step, prompt_id, index) alone."""
    generator = np.random.default_rng([step, prompt_id, index])
    prompt_ids = generator.integers(vocab_size, size=prompt_length)
    completion = Completion(
        request_id=f"{step}-{prompt_id}",
        sample_index=index,
        prompt_ids=prompt_ids,
        token_ids=generator.integers(vocab_size, size=response_length),
        logprobs=-generator.random(response_length, dtype=np.float32),
        raw_logprobs=None,
        batch_sizes=np.ones(response_length, dtype=np.int32),
        seed=0,
        weights_version=version,
        finish_reason="stop",
    )
    prompt = Prompt(prompt_id, prompt_ids, text="", ground_truth="")
    return Sample(step, prompt, completion, sampling, generator.normal() if reward is None else reward)


def make_samples(
    shapes: Sequence[tuple[int, int]], *, samplings: Sequence[SamplingParams] = (DEFAULT,), vocab_size: int = 97
) -> list[Sample]:
    """One sample per (prompt length, response length), two per prompt; sampling parameters go round."""
    return [
        make_sample(i // 2, i % 2, p, n, vocab_size=vocab_size, sampling=samplings[i % len(samplings)])
        for i, (p, n) in enumerate(shapes)
    ]
