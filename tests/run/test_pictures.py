"""Which part of which sample a step's trace shows."""

from __future__ import annotations

import numpy as np
import pytest

from rlalign.config import SamplingParams
from rlalign.records import Completion, Prompt, Sample
from rlalign.run.pictures import picture_data, worst_trace
from rlalign.verifier.compare import compare_samples
from rlalign.verifier.report import build_report


def sample(index: int, size: int) -> Sample:
    prompt = Prompt(prompt_id=7, token_ids=np.array([1]), text="p", ground_truth="")
    completion = Completion(
        request_id="r", sample_index=index, prompt_ids=prompt.token_ids, token_ids=np.arange(size),
        logprobs=np.full(size, -1, np.float32), raw_logprobs=None, batch_sizes=np.ones(size, np.int32), seed=0,
        weights_version=0, finish_reason="stop",
    )  # fmt: skip
    return Sample(step=2, prompt=prompt, completion=completion, sampling=SamplingParams())


SAMPLES = [sample(0, 3), sample(1, 0), sample(2, 5), sample(3, 5)]


def test_the_longest_sample_if_all_agree() -> None:
    trace = worst_trace(compare_samples(SAMPLES, [s.completion.logprobs for s in SAMPLES]), SAMPLES)
    assert (trace.name, trace.tokens) == ("2/7/2", ("0", "1", "2", "3", "4"))
    assert trace.positions.tolist() == [0, 1, 2, 3, 4]


def test_the_worst_tokens_sample_surplus_log_probs_included() -> None:
    train = [s.completion.logprobs for s in SAMPLES]
    train[0] = np.full(4, -1, np.float32)
    trace = worst_trace(compare_samples(SAMPLES, train), SAMPLES, lambda ids: f"{ids}\n")
    assert (trace.name, trace.tokens) == ("2/7/0", ("[0]⏎", "[1]⏎", "[2]⏎", "(no token)"))
    assert np.isnan(trace.rollout[3]) and trace.train[3] == -1


@pytest.mark.parametrize(("worst", "first"), [(0, 0), (300, 44), (599, 88)])
def test_at_most_512_tokens_around_the_worst(worst: int, first: int) -> None:
    samples = [*SAMPLES, sample(4, 600)]
    train = [s.completion.logprobs.copy() for s in samples]
    train[4][worst] = -2
    trace = worst_trace(compare_samples(samples, train), samples)
    assert trace.positions.tolist() == list(range(first, first + 512))
    assert trace.train[worst - first] == -2


def test_nothing_compared_has_no_trace_and_counts_must_agree() -> None:
    nothing = compare_samples([], [])
    assert worst_trace(nothing, []) is None
    with pytest.raises(ValueError, match="0 samples, got 4"):
        picture_data(nothing, build_report(nothing, []), SAMPLES)
