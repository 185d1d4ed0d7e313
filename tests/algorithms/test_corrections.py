"""Importance weights, truncated and left out, worked out by hand, alone and inside both losses."""

from __future__ import annotations

import math

import pytest
import torch

from rlalign.algorithms import grpo, ppo
from rlalign.algorithms.aggregation import Denominators
from rlalign.algorithms.corrections import importance_weights
from rlalign.config import Correction, config_from_dict

LOG = math.log
# rho = 1/2, 4, 1, 1.5 with a cap of 2: weights 1/2, 2, 1, 1.5
OLD = torch.tensor([-3.0, -1.0, -2.0, -4.0])
ROLLOUT = OLD - torch.tensor([LOG(0.5), LOG(4.0), 0.0, LOG(1.5)])
WEIGHTS = [0.5, 2.0, 1.0, 1.5]


def test_weights_and_their_metrics() -> None:
    weights, metrics = importance_weights(OLD, ROLLOUT, [3, 1], Correction(2.0))
    assert weights.tolist() == pytest.approx(WEIGHTS)
    assert weights[1] == 2.0 and weights[2] == 1.0, "the cap, and agreement, are exact"
    assert {name: metric.value for name, metric in metrics.items()} == pytest.approx(
        {"correction/is/mean": 5.0 / 4, "correction/is/max": 2.0, "correction/is/truncated_frac": 0.25,
         "correction/rs/token_frac": 0.0, "correction/rs/sequence_frac": 0.0, "correction/rs/veto_frac": 0.0}
    )  # fmt: skip
    assert torch.equal(weights, (OLD - ROLLOUT).exp().clamp(max=2.0)), "nothing left out: the truncated weights' bits"


@pytest.mark.parametrize(
    ("correction", "expected", "shares"),
    [
        # a bound holds on both sides, and is itself inside
        (Correction(2.0, reject_beyond=2.5), [0.5, 0.0, 1.0, 1.5], (1 / 4, 1 / 3, 0)),
        (Correction(2.0, reject_beyond=1.75), [0.0, 0.0, 1.0, 1.5], (2 / 4, 1 / 3, 0)),
        (Correction(2.0, reject_beyond=1.25), [0.0, 0.0, 1.0, 0.0], (3 / 4, 2 / 3, 0)),
        (Correction(2.0, veto_below=0.75), [0.0, 0.0, 1.0, 1.5], (2 / 4, 1 / 3, 1 / 3)),
        (Correction(2.0, veto_below=0.25), WEIGHTS, (0, 0, 0)),
        (Correction(2.0, 1.25, 0.75), [0.0, 0.0, 1.0, 0.0], (3 / 4, 2 / 3, 1 / 3)),
    ],
)
def test_tokens_and_sequences_left_out(
    correction: Correction, expected: list[float], shares: tuple[float, ...]
) -> None:
    """Three sequences: rho 1/2 and 4, 1, 1.5."""
    weights, metrics = importance_weights(OLD, ROLLOUT, [2, 1, 1], correction)
    assert weights.tolist() == pytest.approx(expected)
    found = [metrics[f"correction/rs/{name}_frac"].value for name in ("token", "sequence", "veto")]
    assert found == pytest.approx(shares)
    assert metrics["correction/is/mean"].value == pytest.approx(5.0 / 4), "of the weights before any is left out"


def test_nothing_is_left_out_where_both_sides_agree() -> None:
    weights, metrics = importance_weights(OLD, OLD.clone(), [4], Correction(1.0, 1.0000001, 0.9999999))
    assert weights.tolist() == [1.0] * 4
    assert all(metrics[f"correction/rs/{name}_frac"].value == 0.0 for name in ("token", "sequence", "veto"))


@pytest.mark.parametrize("loss", [grpo.loss, ppo.policy_loss], ids=["grpo", "ppo"])
def test_a_loss_of_which_all_is_left_out_is_zero(loss) -> None:
    train = OLD.clone().requires_grad_()
    weights, _ = importance_weights(OLD, OLD - 9.0, [3, 1], Correction(2.0, reject_beyond=2.0))
    value, _ = loss(
        train, OLD, torch.ones(4), torch.zeros(4), sequence_lengths=torch.tensor([3, 3, 3, 1]),
        denominators=Denominators.of([3, 1]), clip_low=0.2, clip_high=0.3, weights=weights,
    )  # fmt: skip
    value.backward()
    assert value.item() == 0.0 and train.grad.tolist() == [0.0] * 4


@pytest.mark.parametrize(("align", "message"), [
    ({"reject_beyond": 2.0}, "reject_beyond=2.0 is for on_mismatch=correct, not auto"),
    ({"on_mismatch": "log", "veto_below": 0.1}, "veto_below=0.1 is for on_mismatch=correct, not log"),
    ({"on_mismatch": "correct", "reject_beyond": 1.0}, "greater than 1"),
    ({"on_mismatch": "correct", "veto_below": 1.0}, "less than 1"),
    ({"on_mismatch": "correct", "correction_cap": 0.5}, "greater than or equal to 1"),
])  # fmt: skip
def test_settings_that_cannot_be_are_refused(align: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_from_dict({"align": align})


@pytest.mark.parametrize("loss", [grpo.loss, ppo.policy_loss], ids=["grpo", "ppo"])
def test_value_and_gradient_inside_a_loss(loss) -> None:
    """Ratios train/old 2, 0.5, 1, 1.25, advantages 1, -1, 2, -4, clip 0.2 and 0.3: surrogates 1.3, -0.8, 2, -5."""
    train = (OLD + torch.tensor([LOG(2.0), LOG(0.5), 0.0, LOG(1.25)])).requires_grad_()
    rollout = ROLLOUT.clone().requires_grad_()
    weights, _ = importance_weights(OLD, rollout, [3, 1], Correction(2.0))
    value, metrics = loss(
        train, OLD, torch.tensor([1.0, -1.0, 2.0, -4.0]), torch.zeros(4), sequence_lengths=torch.tensor([3, 3, 3, 1]),
        denominators=Denominators.of([3, 1]), clip_low=0.2, clip_high=0.3, weights=weights,
    )  # fmt: skip
    assert value.item() == pytest.approx(-(0.5 * 1.3 + 2.0 * -0.8 + 1.0 * 2.0 + 1.5 * -5.0) / 4, rel=1e-6)
    value.backward()
    # the first two are clipped; -w r A / 4 for the others
    assert train.grad.tolist() == pytest.approx([0.0, 0.0, -1.0 * 2.0 / 4, 1.5 * 1.25 * 4.0 / 4], rel=1e-5)
    assert rollout.grad is None, "a weight is a constant"
    assert metrics["ratio/max"].value == pytest.approx(2.0), "train/old, not train/rollout"


def test_the_kl_term_is_not_weighted() -> None:
    given = {"sequence_lengths": torch.tensor([4] * 4), "denominators": Denominators.of([4]), "clip_low": 0.2,
             "clip_high": 0.3, "ref_logprobs": OLD - 1.0, "kl_coef": 0.1}  # fmt: skip
    zero = torch.zeros(4)
    plain, _ = grpo.loss(OLD, OLD, zero, zero, **given)
    weighted, _ = grpo.loss(OLD, OLD, zero, zero, weights=torch.tensor(WEIGHTS), **given)
    assert plain.item() == weighted.item() == pytest.approx(0.1 * (math.exp(-1) + 1 - 1), rel=1e-6)


def test_what_is_left_out_keeps_its_kl_and_its_entropy_bonus() -> None:
    """k3 of ref = train - 1 is 1/e; advantages of 1 would be seen."""
    train, entropy = OLD.clone().requires_grad_(), torch.full((4,), 2.0, requires_grad=True)
    value, _ = grpo.loss(
        train, OLD, torch.ones(4), entropy, sequence_lengths=torch.tensor([4] * 4), denominators=Denominators.of([4]),
        clip_low=0.2, clip_high=0.3, ref_logprobs=OLD - 1.0, kl_coef=0.1, entropy_coef=0.01, weights=torch.zeros(4),
    )  # fmt: skip
    assert value.item() == pytest.approx(0.1 / math.e - 0.01 * 2.0, rel=1e-6)
    value.backward()
    assert train.grad.tolist() == pytest.approx([0.1 * (1 - 1 / math.e) / 4] * 4, rel=1e-6)
    assert entropy.grad.tolist() == pytest.approx([-0.01 / 4] * 4)


@pytest.mark.parametrize(("bound", "weight"), [(None, 2.0), (10.0, 0.0)])
def test_a_ratio_that_overflows_is_cut_or_left_out(bound: float | None, weight: float) -> None:
    old, rollout = torch.tensor([-1.0, -2.0]), torch.tensor([-99.0, -2.0])
    assert math.isinf((old - rollout).exp()[0])
    weights, metrics = importance_weights(old, rollout, [2], Correction(2.0, reject_beyond=bound))
    assert weights.tolist() == [weight, 1.0]
    assert metrics["correction/is/max"].value == 2.0


def test_a_log_prob_that_is_no_number_is_not_hidden() -> None:
    """Of a sequence that its first token vetoes."""
    broken = ROLLOUT.clone()
    broken[2] = math.nan
    weights, metrics = importance_weights(OLD, broken, [4], Correction(2.0, 1.1, 0.9))
    assert math.isnan(weights[2]) and weights[[0, 1, 3]].tolist() == [0.0] * 3
    assert math.isnan(metrics["correction/is/mean"].value)


def test_a_correction_that_would_change_agreement_is_refused() -> None:
    for settings in ({"cap": 0.5}, {"cap": math.nan}, {"reject_beyond": 1.0}, {"veto_below": 1.0}, {"veto": 0.5}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            Correction(**settings)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rollout_logprobs has shape \(3,\); expected \(4,\)"):
        importance_weights(OLD, ROLLOUT[:3], [4], Correction(2.0))
