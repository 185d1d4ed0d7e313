"""Advantages against numbers worked out by hand."""

from __future__ import annotations

import math
import random

import pytest
import torch

from rlalign.algorithms.advantages import gae, group_normalized


def test_group_centred_and_scaled_by_population_std() -> None:
    # Prompt 7: rewards 0, 0, 1, 1 → mean 0.5, std 0.5. Prompt 3: 1, 3 → mean 2, std 1.
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.0, 3.0, 1.0])
    ids = [7, 3, 7, 7, 3, 7]
    got = group_normalized(rewards, ids, eps=0.0)
    assert got.tolist() == [-1.0, -1.0, 1.0, -1.0, 1.0, 1.0]


def test_group_centred_only() -> None:
    got = group_normalized(torch.tensor([0.0, 3.0, 0.0]), [1, 1, 1], normalize_std=False)
    assert got.tolist() == [-1.0, 2.0, -1.0]


def test_eps_enters_the_denominator() -> None:
    got = group_normalized(torch.tensor([0.0, 1.0]), [1, 1], eps=0.5)
    assert got.tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("reward", [0.1, 1.0 / 3.0, -7.3])
def test_equal_rewards_give_exactly_zero(reward: float) -> None:
    got = group_normalized(torch.full((7,), reward, dtype=torch.float64), [0] * 7, eps=0.0)
    assert torch.equal(got, torch.zeros(7))


def test_order_of_samples_changes_no_bit() -> None:
    generator = random.Random(0)
    rewards = [generator.gauss(0.0, 10.0 ** generator.randint(-6, 6)) for _ in range(60)]
    ids = [generator.randrange(4) for _ in range(60)]
    expected = group_normalized(torch.tensor(rewards, dtype=torch.float64), ids)
    shuffle = generator.sample(range(60), 60)
    shuffled = group_normalized(
        torch.tensor([rewards[i] for i in shuffle], dtype=torch.float64), [ids[i] for i in shuffle]
    )
    assert torch.equal(shuffled.view(torch.int32), expected[shuffle].view(torch.int32))


def test_group_of_one_and_non_finite_rewards_are_refused() -> None:
    with pytest.raises(ValueError, match="prompt 5 has 1 sample"):
        group_normalized(torch.tensor([1.0, 2.0, 0.0]), [4, 4, 5])
    with pytest.raises(ValueError, match=r"prompt 4: rewards .* not all finite"):
        group_normalized(torch.tensor([1.0, math.nan]), [4, 4])
    with pytest.raises(ValueError, match="prompt_ids 1 entries"):
        group_normalized(torch.tensor([1.0, 2.0]), [4])


def test_gae_by_hand() -> None:
    # gamma 0.5, lambda 0.5: d2 = 4 - 2 = 2; d1 = 1 + 0.5*2 - 3 = -1; d0 = 0 + 0.5*3 - 1 = 0.5
    # A2 = 2; A1 = -1 + 0.25*2 = -0.5; A0 = 0.5 + 0.25*(-0.5) = 0.375
    advantages, returns = gae(torch.tensor([0.0, 1.0, 4.0]), torch.tensor([1.0, 3.0, 2.0]), gamma=0.5, gae_lambda=0.5)
    assert advantages.tolist() == [0.375, -0.5, 2.0]
    assert returns.tolist() == [1.375, 2.5, 4.0]


def test_gae_limits_are_monte_carlo_and_one_step() -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(9), torch.randn(9)
    _, returns = gae(rewards, values, gamma=1.0, gae_lambda=1.0)
    assert torch.allclose(returns, rewards.flip(0).cumsum(0).flip(0), atol=1e-6)
    advantages, _ = gae(rewards, values, gamma=0.9, gae_lambda=0.0)
    assert torch.allclose(advantages, rewards + 0.9 * torch.cat([values[1:], torch.zeros(1)]) - values, atol=1e-6)


def test_gae_refuses_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="expected both"):
        gae(torch.zeros(3), torch.zeros(2), gamma=1.0, gae_lambda=1.0)
