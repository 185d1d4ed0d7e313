"""Truncated importance weights, worked out by hand, alone and inside both losses."""

from __future__ import annotations

import math

import pytest
import torch

from rlalign.algorithms import grpo, ppo
from rlalign.algorithms.aggregation import Denominators
from rlalign.algorithms.corrections import truncated_weights

LOG = math.log
# rho = 1/2, 4, 1, 1.5 with a cap of 2: weights 1/2, 2, 1, 1.5
OLD = torch.tensor([-3.0, -1.0, -2.0, -4.0])
ROLLOUT = OLD - torch.tensor([LOG(0.5), LOG(4.0), 0.0, LOG(1.5)])
WEIGHTS = [0.5, 2.0, 1.0, 1.5]


def test_weights_and_their_metrics() -> None:
    weights, metrics = truncated_weights(OLD, ROLLOUT, cap=2.0)
    assert weights.tolist() == pytest.approx(WEIGHTS)
    assert weights[1] == 2.0 and weights[2] == 1.0, "the cap, and agreement, are exact"
    assert {name: metric.value for name, metric in metrics.items()} == pytest.approx(
        {"correction/is/mean": 5.0 / 4, "correction/is/max": 2.0, "correction/is/truncated_frac": 0.25}
    )


@pytest.mark.parametrize("loss", [grpo.loss, ppo.policy_loss], ids=["grpo", "ppo"])
def test_value_and_gradient_inside_a_loss(loss) -> None:
    """Ratios train/old 2, 0.5, 1, 1.25, advantages 1, -1, 2, -4, clip 0.2 and 0.3: surrogates 1.3, -0.8, 2, -5."""
    train = (OLD + torch.tensor([LOG(2.0), LOG(0.5), 0.0, LOG(1.25)])).requires_grad_()
    rollout = ROLLOUT.clone().requires_grad_()
    weights, _ = truncated_weights(OLD, rollout, cap=2.0)
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


def test_a_log_prob_that_is_no_number_is_not_hidden() -> None:
    broken = ROLLOUT.clone()
    broken[0] = math.nan
    weights, metrics = truncated_weights(OLD, broken, cap=2.0)
    assert math.isnan(weights[0]) and math.isnan(metrics["correction/is/mean"].value)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cap=0\.5: .* use cap >= 1"):
        truncated_weights(OLD, ROLLOUT, cap=0.5)
    with pytest.raises(ValueError, match=r"rollout_logprobs has shape \(3,\); expected \(4,\)"):
        truncated_weights(OLD, ROLLOUT[:3], cap=2.0)
