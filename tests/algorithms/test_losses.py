"""GRPO and PPO losses and their gradients against numbers worked out by hand, and under micro-batch splits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rlalign.algorithms import grpo, ppo
from rlalign.algorithms.aggregation import Denominators, token_weights
from rlalign.algorithms.metrics import merge
from rlalign.algorithms.surrogate import k3

LOG = math.log
LENGTHS = [3, 1]  # two sequences, four tokens
DENOMINATORS = Denominators.of(LENGTHS)
SEQUENCE_LENGTHS = torch.tensor([3, 3, 3, 1])
CLIP = {"clip_low": 0.2, "clip_high": 0.3}


def ratio_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ratios 2, 0.5, 1, 1.25; advantages 1, -1, 2, -4."""
    old = torch.tensor([-3.0, -1.0, -2.0, -4.0])
    train = old + torch.tensor([LOG(2.0), LOG(0.5), 0.0, LOG(1.25)])
    return train.requires_grad_(), old, torch.tensor([1.0, -1.0, 2.0, -4.0])


def test_denominators_count_only_sequences_with_tokens() -> None:
    assert Denominators.of([3, 0, 1]) == Denominators(tokens=4, sequences=2)
    with pytest.raises(ValueError, match="no response token"):
        Denominators.of([0, 0])


def test_token_weights() -> None:
    assert token_weights(SEQUENCE_LENGTHS, DENOMINATORS, "token_mean").tolist() == [0.25] * 4
    got = token_weights(SEQUENCE_LENGTHS, DENOMINATORS, "sequence_mean")
    assert torch.allclose(got, torch.tensor([1 / 6, 1 / 6, 1 / 6, 1 / 2]))
    with pytest.raises(ValueError, match="aggregation='mean'"):
        token_weights(SEQUENCE_LENGTHS, DENOMINATORS, "mean")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("aggregation", "expected", "weights"),
    [
        # surrogates: min(2, 1.3) = 1.3; min(-0.5, -0.8) = -0.8; 2; min(-5, -5) = -5
        ("token_mean", -(1.3 - 0.8 + 2.0 - 5.0) / 4, [1 / 4] * 4),
        ("sequence_mean", -((1.3 - 0.8 + 2.0) / 3 - 5.0) / 2, [1 / 6, 1 / 6, 1 / 6, 1 / 2]),
    ],
)
def test_grpo_value_and_gradient(aggregation: Any, expected: float, weights: list[float]) -> None:
    train, old, advantages = ratio_inputs()
    loss, metrics = grpo.loss(
        train,
        old,
        advantages,
        torch.zeros(4),
        sequence_lengths=SEQUENCE_LENGTHS,
        denominators=DENOMINATORS,
        aggregation=aggregation,
        **CLIP,
    )
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    loss.backward()
    # d(-r A w)/d train = -r A w where not clipped, 0 where the clipped branch was taken.
    gradient = [0.0, 0.0, -1.0 * 2.0 * weights[2], 1.25 * 4.0 * weights[3]]
    assert torch.allclose(train.grad, torch.tensor(gradient), rtol=1e-5)
    assert metrics["clip_frac"].value == 0.5
    assert metrics["ratio/min"].value == pytest.approx(0.5)
    assert metrics["ratio/max"].value == pytest.approx(2.0)
    assert metrics["ratio/mean"].value == pytest.approx(4.75 / 4)
    approx_kl = (2 - 1 - LOG(2.0) + 0.5 - 1 - LOG(0.5) + 1.25 - 1 - LOG(1.25)) / 4
    assert metrics["approx_kl"].value == pytest.approx(approx_kl, rel=1e-5)
    assert metrics["loss"].value == pytest.approx(expected, rel=1e-6)


def test_exact_rollout_gives_ratio_one_and_reinforce() -> None:
    torch.manual_seed(0)
    train = torch.randn(4, requires_grad=True)
    advantages = torch.randn(4)
    loss, metrics = grpo.loss(
        train,
        train.detach().clone(),
        advantages,
        torch.zeros(4),
        sequence_lengths=SEQUENCE_LENGTHS,
        denominators=DENOMINATORS,
        **CLIP,
    )
    loss.backward()
    assert torch.equal(train.grad, -advantages / 4)
    drift = {name: metrics[name].value for name in ("clip_frac", "ratio/min", "ratio/max", "approx_kl")}
    assert drift == {"clip_frac": 0.0, "ratio/min": 1.0, "ratio/max": 1.0, "approx_kl": 0.0}


def test_kl_and_entropy_terms() -> None:
    train = torch.tensor([-1.0, -2.0], requires_grad=True)
    entropy = torch.tensor([0.5, 1.5], requires_grad=True)
    ref = train.detach() + torch.tensor([LOG(2.0), 0.0])
    loss, metrics = grpo.loss(
        train,
        train.detach(),
        torch.zeros(2),
        entropy,
        sequence_lengths=torch.tensor([2, 2]),
        denominators=Denominators.of([2]),
        ref_logprobs=ref,
        kl_coef=0.1,
        entropy_coef=0.01,
        **CLIP,
    )
    loss.backward()
    kl = (2.0 - LOG(2.0) - 1.0) / 2  # k3 of d = log 2 and d = 0
    assert loss.item() == pytest.approx(0.1 * kl - 0.01 * 1.0, rel=1e-5)
    assert torch.allclose(train.grad, torch.tensor([0.1 * (1.0 - 2.0) / 2, 0.0]), atol=1e-7)
    assert torch.allclose(entropy.grad, torch.full((2,), -0.005))
    assert metrics["kl_ref"].value == pytest.approx(kl, rel=1e-5)
    assert metrics["entropy"].value == 1.0


def test_k3_estimates_kl_without_bias_and_is_never_negative() -> None:
    torch.manual_seed(1)
    p, q = torch.randn(8).log_softmax(0), torch.randn(8).log_softmax(0)
    values = k3(p, q)
    assert (values >= 0).all()
    assert (p.exp() * values).sum().item() == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-5)


def test_a_kl_coefficient_and_reference_log_probs_need_each_other() -> None:
    common = {"sequence_lengths": torch.tensor([1]), "denominators": Denominators.of([1]), **CLIP}
    one = torch.zeros(1)
    with pytest.raises(ValueError, match=r"kl_coef=0\.1 with ref_logprobs missing"):
        grpo.loss(one, one, one, one, kl_coef=0.1, **common)
    with pytest.raises(ValueError, match=r"kl_coef=0\.0 with ref_logprobs given"):
        grpo.loss(one, one, one, one, ref_logprobs=one, **common)


def test_shapes_never_broadcast() -> None:
    common = {"sequence_lengths": SEQUENCE_LENGTHS, "denominators": DENOMINATORS, **CLIP}
    four = torch.zeros(4)
    with pytest.raises(ValueError, match=r"advantages has shape \(1,\)"):
        grpo.loss(four, four, torch.zeros(1), four, **common)
    with pytest.raises(ValueError, match=r"returns has shape \(1,\)"):
        ppo.value_loss(four, four, torch.zeros(1), denominators=DENOMINATORS, value_clip=0.2)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("split", [1, 2, 5, 11])
def test_a_micro_batch_split_changes_nothing_but_rounding(aggregation: Any, split: int) -> None:
    generator = torch.Generator().manual_seed(split)
    lengths = [4, 1, 7, 2]
    per_token = torch.repeat_interleave(torch.tensor(lengths), torch.tensor(lengths))
    old, advantages, entropy = (torch.randn(14, generator=generator) for _ in range(3))
    base = old + 0.3 * torch.randn(14, generator=generator)

    def run(sizes: list[int]) -> tuple[float, torch.Tensor, dict[str, float]]:
        train = base.clone().requires_grad_()
        parts, total, start = [], 0.0, 0
        for size in sizes:
            part = slice(start, start + size)
            loss, metrics = grpo.loss(
                train[part],
                old[part],
                advantages[part],
                entropy[part],
                sequence_lengths=per_token[part],
                denominators=Denominators.of(lengths),
                aggregation=aggregation,
                entropy_coef=0.1,
                **CLIP,
            )
            loss.backward()
            parts.append(metrics)
            total, start = total + loss.item(), start + size
        return total, train.grad, {name: metric.value for name, metric in merge(parts).items()}

    whole, pieces = run([14]), run([split, 14 - split])
    assert pieces[0] == pytest.approx(whole[0], abs=1e-6)
    assert torch.allclose(pieces[1], whole[1], rtol=1e-6)
    assert pieces[2] == pytest.approx(whole[2], rel=1e-5, abs=1e-6)


def test_ppo_policy_loss_is_the_surrogate_with_entropy() -> None:
    train, old, advantages = ratio_inputs()
    loss, metrics = ppo.policy_loss(
        train,
        old,
        advantages,
        torch.full((4,), 2.0),
        sequence_lengths=SEQUENCE_LENGTHS,
        denominators=DENOMINATORS,
        entropy_coef=0.5,
        **CLIP,
    )
    assert loss.item() == pytest.approx(2.5 / 4 - 1.0, rel=1e-5)
    assert metrics["entropy"].value == 2.0


def test_value_loss_takes_the_larger_error() -> None:
    # token 0: v 2, old 0, clip 0.5 → clipped 0.5; R 1: errors 1 and 0.25 → 1, gradient (2 - 1)/2
    # token 1: v 2, old 0 → clipped 0.5; R 3: errors 1 and 6.25 → 6.25, no gradient: the clipped value is a constant
    values = torch.tensor([2.0, 2.0], requires_grad=True)
    loss, metrics = ppo.value_loss(
        values, torch.zeros(2), torch.tensor([1.0, 3.0]), denominators=Denominators.of([2]), value_clip=0.5
    )
    loss.backward()
    assert loss.item() == 0.5 * (1.0 + 6.25) / 2
    assert values.grad.tolist() == [0.5, 0.0]
    assert metrics["critic/clip_frac"].value == 0.5
    assert metrics["critic/squared_error"].value == 1.0


def test_token_rewards_with_kl() -> None:
    old, ref = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-2.0, -2.0, -2.0])
    got = ppo.token_rewards(5.0, 3, old_logprobs=old, ref_logprobs=ref, kl_coef=0.5)
    assert got.tolist() == [-0.5, 0.0, 5.5]
    assert ppo.token_rewards(5.0, 2).tolist() == [0.0, 5.0]
    with pytest.raises(ValueError, match="needs old_logprobs and ref_logprobs"):
        ppo.token_rewards(5.0, 3, kl_coef=0.5)


def test_whitening_ignores_the_order_of_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(999, generator=generator) * 10.0 ** torch.randint(-9, 9, (999,), generator=generator)
    shuffle = torch.randperm(999, generator=generator)
    expected = ppo.whiten(values)
    assert torch.equal(ppo.whiten(values[shuffle]).view(torch.int32), expected[shuffle].view(torch.int32))


def test_whiten() -> None:
    got = ppo.whiten(torch.tensor([1.0, 3.0]), eps=0.0)
    assert got.tolist() == [-1.0, 1.0]
    assert torch.allclose(ppo.whiten(torch.full((5,), 0.1)), torch.zeros(5), atol=1e-6)
