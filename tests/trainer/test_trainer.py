"""The trainer's numbers: right (against PyTorch alone), the same bits under T9, and refused where they can't be."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.models import tiny_model
from support.samples import make_sample, make_samples
from support.trainers import choose_tokens, make_trainer

from rlalign.algorithms.aggregation import Denominators
from rlalign.config import AlgorithmConfig, Correction, SamplingParams, TrainerConfig
from rlalign.modeling import Policy, align
from rlalign.modeling.inner_attention import Reference
from rlalign.records import Sample
from rlalign.trainer import Trainer

SHAPES = [(3, 4), (1, 1), (5, 2), (2, 6), (4, 3), (1, 9), (20, 5), (7, 7)]
NARROW_SHAPES = [(4, 6), (3, 5), (6, 4)]
PLAIN = SamplingParams(temperature=0.7)
GREEDY = SamplingParams(temperature=0.0)
TOP_K = SamplingParams(temperature=1.3, top_k=60)
NUCLEUS = SamplingParams(top_p=0.95, min_p=0.001)
MIXED = (PLAIN, TOP_K, GREEDY, NUCLEUS)


def advantages_of(samples: list[Sample]) -> list[np.ndarray]:
    return [np.full(len(s.completion.token_ids), s.reward, np.float32) for s in samples]


def old_of(samples: list[Sample]) -> list[np.ndarray]:
    return [s.completion.logprobs for s in samples]


def train(trainer: Trainer, samples: list[Sample]) -> list[np.ndarray]:
    result = trainer.accumulate(samples, advantages_of(samples), old_logprobs=old_of(samples))
    return result.train_logprobs


def as_bytes(arrays: list[np.ndarray]) -> list[bytes]:
    assert all(array.dtype == np.float32 for array in arrays)
    return [array.tobytes() for array in arrays]


def plain_logprobs(sample: Sample) -> torch.Tensor:
    """Of the untouched Hugging Face model, one sequence at a time, with PyTorch's own log_softmax."""
    model = tiny_model("qwen3")
    response = torch.from_numpy(sample.completion.token_ids)
    ids = torch.cat([torch.from_numpy(sample.completion.prompt_ids), response])
    with torch.no_grad():
        logits = model(ids.unsqueeze(0)).logits[0, -len(response) - 1 : -1]
    temperature = sample.sampling.temperature or 1.0
    return (logits / temperature).log_softmax(-1).gather(1, response[:, None])[:, 0]


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_log_probs_are_the_models(backend: str) -> None:
    samples = make_samples(SHAPES, samplings=[PLAIN, GREEDY])
    got = make_trainer(backend).compute_logprobs(samples)
    for sample, logprobs in zip(samples, got, strict=True):
        assert torch.allclose(torch.from_numpy(logprobs), plain_logprobs(sample), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_micro_batches_and_checkpointing_change_no_bit(dtype: torch.dtype) -> None:
    samples = choose_tokens(make_samples(SHAPES, samplings=MIXED))
    expected = as_bytes(make_trainer(dtype=dtype, micro_batch_tokens=1000).compute_logprobs(samples))
    for budget in (1, 40):
        for checkpointing in (False, True):
            trainer = make_trainer(dtype=dtype, micro_batch_tokens=budget, gradient_checkpointing=checkpointing)
            assert as_bytes(train(trainer, samples)) == expected
            assert as_bytes(trainer.compute_logprobs(samples)) == expected


@pytest.mark.parametrize("family", ["gemma2", "mistral", "phi3"])
def test_soft_caps_windows_and_fused_weights_too(family: str) -> None:
    samples = make_samples(SHAPES, samplings=[PLAIN, GREEDY])
    policy = Policy(align(tiny_model(family), backend="reference"))
    results = []
    for budget in (1, 1000):
        trainer = Trainer(policy, TrainerConfig(micro_batch_tokens=budget), AlgorithmConfig(), total_steps=1)
        results.append(as_bytes(trainer.compute_logprobs(samples)))
    assert results[0] == results[1]


def test_attention_gets_the_longest_sequence_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, attend, seen = make_trainer(), Reference.packed, []

    def recording(self: Reference, *tensors: torch.Tensor, **settings: Any) -> torch.Tensor:
        longest = int(settings["cu_seqlens_q"].diff().max())
        assert (settings["max_seqlen_q"], settings["max_seqlen_k"]) == (longest, longest)
        seen.append(longest)
        return attend(self, *tensors, **settings)

    monkeypatch.setattr(Reference, "packed", recording)
    trainer.compute_logprobs(make_samples([(3, 4), (9, 2)]))
    assert max(seen) == 10


def test_the_order_of_arrival_changes_no_bit_of_anything() -> None:
    samples = choose_tokens(make_samples(SHAPES, samplings=MIXED))
    shuffled = random.Random(0).sample(samples, len(samples))
    hashes, logprobs = [], []
    for batch in (samples, shuffled):
        trainer = make_trainer(micro_batch_tokens=16)
        result = dict(zip([s.key for s in batch], as_bytes(train(trainer, batch)), strict=True))
        trainer.apply_update()
        logprobs.append(result)
        hashes.append(trainer.masters_sha256())
    assert logprobs[0] == logprobs[1]
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_the_same_batch_twice_gives_the_same_masters(backend: str) -> None:
    samples = choose_tokens(make_samples(SHAPES, samplings=MIXED))
    hashes = []
    for _ in range(2):
        trainer = make_trainer(backend, micro_batch_tokens=16, algorithm={"entropy_coef": 0.01})
        before = trainer.masters_sha256()
        train(trainer, samples)
        trainer.apply_update()
        hashes.append(trainer.masters_sha256())
        assert before != hashes[-1]
    assert hashes[0] == hashes[1]


def test_checkpointing_gives_the_same_update() -> None:
    samples = make_samples(SHAPES)
    hashes = set()
    for checkpointing in (False, True):
        trainer = make_trainer(gradient_checkpointing=checkpointing)
        train(trainer, samples)
        trainer.apply_update()
        hashes.add(trainer.masters_sha256())
    assert len(hashes) == 1


def test_gradient_is_that_of_the_loss_written_out() -> None:
    """REINFORCE on the untouched model: with old = train the clipped surrogate has this gradient exactly."""
    samples = make_samples(SHAPES)
    trainer = make_trainer(micro_batch_tokens=16)
    old = trainer.compute_logprobs(samples)
    trainer.accumulate(samples, advantages_of(samples), old_logprobs=old)
    model = tiny_model("qwen3")
    total = sum(n for _, n in SHAPES)
    for sample in samples:
        response = torch.from_numpy(sample.completion.token_ids)
        ids = torch.cat([torch.from_numpy(sample.completion.prompt_ids), response])
        logprob = model(ids.unsqueeze(0)).logits[0, -len(response) - 1 : -1].log_softmax(-1)
        (-logprob.gather(1, response[:, None]).sum() * sample.reward / total).backward()
    for name, parameter in model.named_parameters():
        got = trainer.optimizers["optimizer"]._gradients[name]
        assert torch.allclose(got, parameter.grad, rtol=1e-3, atol=1e-5), name


def test_nothing_changes_before_apply_update() -> None:
    trainer, samples = make_trainer(), make_samples(SHAPES)
    before = trainer.weights()[1:]
    train(trainer, samples)
    assert trainer.weights()[1:] == before
    metrics = trainer.apply_update()
    weights, version, sha256 = trainer.weights()
    assert (version, sha256 != before[1]) == (1, True)
    assert metrics["lr"] == trainer.config.lr
    assert metrics["grad_norm"] > 0
    assert all(torch.equal(weights[n], m) for n, m in trainer.optimizers["optimizer"].masters.items())


def test_exact_old_log_probs_give_zero_drift() -> None:
    trainer, samples = make_trainer(micro_batch_tokens=16), choose_tokens(make_samples(SHAPES, samplings=MIXED))
    old = trainer.compute_logprobs(samples)
    metrics = trainer.accumulate(samples, advantages_of(samples), old_logprobs=old).metrics
    drift = [metrics[name] for name in ("ratio/min", "ratio/mean", "ratio/max", "approx_kl", "clip_frac")]
    assert drift == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert metrics["entropy"] > 0


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_without_old_log_probs_the_forward_is_its_own_and_the_rollouts_reach_nothing(backend: str) -> None:
    samples = choose_tokens(make_samples(SHAPES, samplings=MIXED))
    trainer, other = (make_trainer(backend, micro_batch_tokens=16) for _ in range(2))
    metrics = trainer.accumulate(samples, advantages_of(samples)).metrics
    assert [metrics[name] for name in ("ratio/min", "ratio/max", "approx_kl", "clip_frac")] == [1.0, 1.0, 0.0, 0.0]
    shifted = [replace(s, completion=replace(s.completion, logprobs=s.completion.logprobs - 1)) for s in samples]
    other.accumulate(shifted, advantages_of(samples))
    for each in (trainer, other):
        each.apply_update()
    assert trainer.masters_sha256() == other.masters_sha256()


def corrected(samples: list[Sample], ratio: float, **arrays: list[np.ndarray]) -> tuple[dict[str, float], str]:
    """Metrics and masters of one update whose samples report log-probs that are ``ratio`` times less likely."""
    trainer = make_trainer(correction=Correction(2.0), micro_batch_tokens=16, grad_clip=1e9)
    for sample, exact in zip(samples, trainer.compute_logprobs(samples), strict=True):
        sample.completion.logprobs[:] = exact - np.float32(np.log(ratio))
    trainer.begin_batch()
    metrics = trainer.accumulate(samples, advantages_of(samples), **arrays).metrics | trainer.apply_update()
    return metrics, trainer.masters_sha256()


def test_a_correction_weights_the_gradient_and_changes_nothing_where_both_sides_agree() -> None:
    samples = make_samples(SHAPES, samplings=(PLAIN, GREEDY))
    plain = make_trainer(micro_batch_tokens=16, grad_clip=1e9)
    uncorrected = plain.accumulate(samples, advantages_of(samples)).metrics | plain.apply_update()
    equal, masters = corrected(samples, 1.0)
    assert masters == plain.masters_sha256() and equal["correction/is/truncated_frac"] == 0.0
    assert equal["correction/is/mean"] == equal["correction/is/max"] == 1.0
    for ratio, weight in ((0.5, 0.5), (1.5, 1.5), (9.0, 2.0)):
        metrics, _ = corrected(samples, ratio)
        assert metrics["grad_norm"] == pytest.approx(weight * uncorrected["grad_norm"], rel=1e-5)
        assert metrics["correction/is/mean"] == pytest.approx(weight, rel=1e-5)
        assert metrics["correction/is/truncated_frac"] == (ratio > 2.0)
        assert metrics["ratio/max"] == 1.0, "train/old knows nothing of the rollout"


@pytest.mark.parametrize("micro_batch_tokens", [1, 16, 4096])
def test_what_a_correction_leaves_out_has_no_gradient_in_any_packing(micro_batch_tokens: int) -> None:
    """A veto by sample 2's last token, which in the two larger packings has neighbours; sample 4 loses its first."""
    samples, settings = make_samples(SHAPES), {"micro_batch_tokens": micro_batch_tokens, "grad_clip": 1e9}
    trainer = make_trainer(correction=Correction(2.0, reject_beyond=20.0, veto_below=0.1), **settings)
    for sample, exact in zip(samples, trainer.compute_logprobs(samples), strict=True):
        sample.completion.logprobs[:] = exact
    samples[2].completion.logprobs[-1] += np.float32(np.log(15.0))
    samples[4].completion.logprobs[0] -= np.float32(np.log(30.0))
    metrics = trainer.accumulate(samples, advantages_of(samples)).metrics | trainer.apply_update()

    zeroed = advantages_of(samples)
    zeroed[2][:], zeroed[4][0] = 0.0, 0.0
    plain = make_trainer(**settings)
    expected = plain.accumulate(samples, zeroed).metrics | plain.apply_update()
    assert trainer.masters_sha256() == plain.masters_sha256() and metrics["loss"] == expected["loss"]
    assert metrics["correction/rs/token_frac"] == pytest.approx((2 + 1) / sum(length for _, length in SHAPES))
    assert metrics["correction/rs/sequence_frac"] == pytest.approx(2 / len(SHAPES))
    assert metrics["correction/rs/veto_frac"] == pytest.approx(1 / len(SHAPES))


def test_a_correction_refuses_a_sample_with_a_missing_log_prob() -> None:
    trainer, (sample,) = make_trainer(correction=Correction(2.0)), make_samples([(3, 4)])
    short = replace(sample, completion=replace(sample.completion, logprobs=sample.completion.logprobs[:3]))
    with pytest.raises(ValueError, match=r"rollout log-probs\[0\] has shape \(3,\); the response has 4 tokens"):
        trainer.accumulate([short], advantages_of([sample]))


def test_after_an_update_old_log_probs_must_be_given() -> None:
    trainer, samples = make_trainer(), make_samples(SHAPES)
    train(trainer, samples)
    trainer.apply_update()
    with pytest.raises(ValueError, match=r"old_logprobs is missing: sample \(0, 0, 0\) was sampled by .* version 0"):
        trainer.accumulate(samples, advantages_of(samples))


def test_the_kept_support_is_held_through_later_updates() -> None:
    narrow = SamplingParams(top_k=2)
    trainer = make_trainer(lr=0.05, micro_batch_tokens=8)
    samples = choose_tokens(make_samples(NARROW_SHAPES, samplings=[narrow]))
    first = trainer.compute_logprobs(samples)
    assert all(np.isfinite(array).all() for array in first)
    for _ in range(4):
        result = trainer.accumulate(samples, advantages_of(samples), old_logprobs=first)
        assert all(np.isfinite(array).all() for array in result.train_logprobs)
        trainer.apply_update()
    held = trainer.compute_logprobs(samples)
    assert all(np.isfinite(array).all() for array in held)
    assert as_bytes(held) != as_bytes(first)
    trainer.begin_batch()
    with pytest.raises(ValueError, match="sampled by weights version 0, the trainer is at 4"):
        trainer.compute_logprobs(samples)
    relabelled = [sampled_again(s, version=4) for s in samples]
    moved = np.concatenate(trainer.compute_logprobs(relabelled))
    assert np.isneginf(moved).any(), "the updates were meant to push some token out of the top 2"


def sampled_again(sample: Sample, version: int) -> Sample:
    return replace(sample, completion=replace(sample.completion, weights_version=version))


def test_a_held_support_gives_the_bits_of_a_recomputed_one() -> None:
    samples = choose_tokens(make_samples(SHAPES, samplings=MIXED))
    recomputed = train(make_trainer(), samples)
    trainer = make_trainer()
    scored = trainer.compute_logprobs(samples)
    held = train(trainer, samples)
    assert as_bytes(scored) == as_bytes(held) == as_bytes(recomputed)


def test_denominators_span_several_calls() -> None:
    samples = make_samples(SHAPES)
    whole, halves = make_trainer(), make_trainer()
    train(whole, samples)
    denominators = Denominators.of([n for _, n in SHAPES])
    for part in (samples[:3], samples[3:]):
        halves.accumulate(part, advantages_of(part), old_logprobs=old_of(part), denominators=denominators)
    norms = [t.optimizers["optimizer"].grad_norm() for t in (whole, halves)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_kl_to_the_reference_is_over_the_policys_support() -> None:
    trainer = make_trainer(algorithm={"kl_coef": 0.1}, micro_batch_tokens=8)
    samples = choose_tokens(make_samples(NARROW_SHAPES, samplings=[SamplingParams(top_k=2)]))
    old = trainer.compute_logprobs(samples)
    ref = trainer.reference_logprobs(samples)
    assert all(np.isfinite(array).all() for array in ref)
    assert as_bytes(ref) != as_bytes(old)
    metrics = trainer.accumulate(samples, advantages_of(samples), old_logprobs=old, ref_logprobs=ref).metrics
    delta = np.concatenate(ref).astype(np.float64) - np.concatenate(old)
    assert metrics["kl_ref"] == pytest.approx((np.exp(delta) - delta - 1).mean(), rel=1e-4)
    # Without a call of compute_logprobs before it, the supports are found on the way.
    assert as_bytes(make_trainer(algorithm={"kl_coef": 0.1}).reference_logprobs(samples)) == as_bytes(ref)


def test_an_empty_response_trains_nothing() -> None:
    samples = make_samples([(3, 4), (2, 0), (1, 2)])
    result = train(make_trainer(), samples)
    assert [len(array) for array in result] == [4, 0, 2]
    with pytest.raises(ValueError, match="no response token"):
        train(make_trainer(), make_samples([(2, 0)]))


def test_nan_is_refused_by_name_and_forgotten() -> None:
    trainer, samples = make_trainer(), make_samples(SHAPES)
    before = trainer.masters_sha256()
    advantages = advantages_of(samples)
    advantages[2][0] = np.nan
    trainer.accumulate(samples, advantages, old_logprobs=old_of(samples))
    with pytest.raises(FloatingPointError, match="gradient norm is nan at update 0"):
        trainer.apply_update()
    assert trainer.masters_sha256() == before
    train(trainer, samples)
    trainer.apply_update()


def test_arguments_that_do_not_fit_are_refused() -> None:
    trainer, samples = make_trainer(), make_samples(SHAPES)
    advantages, old = advantages_of(samples), old_of(samples)
    with pytest.raises(ValueError, match="ref_logprobs is given, but nothing would use it"):
        trainer.accumulate(samples, advantages, old_logprobs=old, ref_logprobs=old)
    with pytest.raises(ValueError, match="advantages has 7 arrays for 8 samples"):
        trainer.accumulate(samples, advantages[:-1], old_logprobs=old)
    with pytest.raises(ValueError, match=r"advantages\[0\] has shape \(3,\)"):
        trainer.accumulate(samples, [advantages[0][:3], *advantages[1:]], old_logprobs=old)
    with pytest.raises(ValueError, match="ref_logprobs is missing"):
        make_trainer(algorithm={"kl_coef": 0.1}).accumulate(samples, advantages, old_logprobs=old)
    with pytest.raises(ValueError, match="reference=None"):
        trainer.reference_logprobs(samples)
    with pytest.raises(ValueError, match="critic=None"):
        trainer.compute_values(samples)
    with pytest.raises(ValueError, match="needs 257 positions"):
        trainer.compute_logprobs([make_sample(0, 0, 250, 8)])


def test_a_learning_step_raises_the_chosen_tokens() -> None:
    trainer, samples = make_trainer(lr=1e-2), make_samples(SHAPES)
    before = np.concatenate(trainer.compute_logprobs(samples)).mean()
    for _ in range(3):
        old = trainer.compute_logprobs(samples)
        trainer.accumulate(samples, [np.ones_like(a) for a in old], old_logprobs=old)
        trainer.apply_update()
    assert np.concatenate(trainer.compute_logprobs(samples)).mean() > before + 0.5
