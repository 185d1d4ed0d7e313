"""From samples to advantages: groups by (step, prompt), whitening in order of key."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlalign.algorithms.estimate import estimate_gae, estimate_grpo
from rlalign.config import AlgorithmConfig, SamplingParams
from rlalign.records import Completion, Prompt, Sample


def make_sample(prompt: int, index: int, length: int, reward: float, step: int = 0) -> Sample:
    ids = np.array([1, 2], dtype=np.int64)
    completion = Completion(
        request_id=f"{prompt}",
        sample_index=index,
        prompt_ids=ids,
        token_ids=np.arange(length, dtype=np.int64),
        logprobs=np.full(length, -1.0, dtype=np.float32),
        raw_logprobs=None,
        batch_sizes=np.ones(length, dtype=np.int32),
        seed=0,
        weights_version=0,
        finish_reason="stop",
    )
    return Sample(step, Prompt(prompt, ids, "", ""), completion, SamplingParams(), reward)


def test_grpo_repeats_the_group_advantage_over_tokens() -> None:
    samples = [
        make_sample(0, 0, 3, 1.0),
        make_sample(1, 0, 1, 5.0),
        make_sample(0, 1, 2, 0.0),
        make_sample(1, 1, 0, 5.0),
    ]
    estimate = estimate_grpo(samples, AlgorithmConfig(normalize_std=False))
    assert [a.tolist() for a in estimate.advantages] == [[0.5] * 3, [0.0], [-0.5] * 2, []]
    assert estimate.no_signal_frac == 0.5
    assert estimate.returns is None
    assert all(a.dtype == np.float32 for a in estimate.advantages)


@pytest.mark.parametrize(("rewards", "share"), [((0.1, 0.1, 0.1), 1.0), ((0.0, 1.0, 2.0), 0.0), ((0.1, 0.1, 0.3), 0.0)])
def test_a_group_has_a_signal_once_one_reward_differs(rewards, share) -> None:
    samples = [make_sample(7, index, 2, reward) for index, reward in enumerate(rewards)]
    assert estimate_grpo(samples, AlgorithmConfig()).no_signal_frac == share


def test_the_same_prompt_in_two_steps_is_two_groups() -> None:
    samples = [make_sample(0, i, 1, r, step) for step, i, r in [(0, 0, 1.0), (1, 0, 4.0), (0, 1, 0.0), (1, 1, 2.0)]]
    estimate = estimate_grpo(samples, AlgorithmConfig(normalize_std=False))
    assert [a.item() for a in estimate.advantages] == [0.5, 1.0, -0.5, -1.0]


def test_gae_whitens_over_all_tokens_whatever_the_order() -> None:
    generator = np.random.default_rng(0)
    samples = [make_sample(i // 2, i % 2, 1 + i, float(i)) for i in range(60)]
    values = [(10.0 ** generator.uniform(-6, 3, 1 + i)).astype(np.float32) for i in range(60)]
    algorithm = AlgorithmConfig(adv_estimator="gae", gamma=0.9)
    first = estimate_gae(samples, algorithm, values)
    flat = np.concatenate(first.advantages).astype(np.float64)
    assert abs(flat.mean()) < 1e-6
    assert flat.std() == pytest.approx(1.0, abs=1e-6)
    order = generator.permutation(60)
    second = estimate_gae([samples[i] for i in order], algorithm, [values[i] for i in order])
    for place, index in enumerate(order):
        assert second.advantages[place].tobytes() == first.advantages[index].tobytes()
        assert second.returns[place].tobytes() == first.returns[index].tobytes()


def test_gae_kl_enters_through_the_rewards() -> None:
    sample = make_sample(0, 0, 2, 1.0)
    algorithm = AlgorithmConfig(adv_estimator="gae", kl_coef=0.5, gae_lambda=1.0)
    zeros, ref = [np.zeros(2, np.float32)], [np.array([-3.0, -1.0], np.float32)]
    old = [np.array([-2.0, -1.0], np.float32)]  # the trainer's, not the -1 that the rollout reported
    estimate = estimate_gae([sample], algorithm, zeros, old_logprobs=old, ref_logprobs=ref)
    assert estimate.returns[0].tolist() == [0.5, 1.0]  # rewards -0.5 * (-2 + 3) = -0.5, then 1
    with pytest.raises(ValueError, match="needs old_logprobs"):
        estimate_gae([sample], algorithm, zeros, ref_logprobs=ref)
    with pytest.raises(ValueError, match="needs ref_logprobs"):
        estimate_gae([sample], algorithm, zeros, old_logprobs=old)
    with pytest.raises(ValueError, match=r"kl_coef=0\.0 would not use ref_logprobs"):
        estimate_gae([sample], AlgorithmConfig(adv_estimator="gae"), zeros, ref_logprobs=ref)


def test_unrewarded_samples_are_refused() -> None:
    samples = [make_sample(0, 0, 2, math.nan), make_sample(0, 1, 2, 1.0)]
    with pytest.raises(ValueError, match="not all finite"):
        estimate_grpo(samples, AlgorithmConfig())
    with pytest.raises(ValueError, match=r"sample \(0, 0, 0\): reward nan"):
        estimate_gae(samples, AlgorithmConfig(adv_estimator="gae"), [np.zeros(2, np.float32)] * 2)
