"""Metrics reduce once, exactly, whatever the parts."""

from __future__ import annotations

import math

import pytest
import torch

from rlalign.algorithms.metrics import Metric, max_of, mean_of, merge, merge_updates, min_of, sum_of, values


def test_mean_of_unequal_parts_is_the_global_mean() -> None:
    parts = [
        {"x": mean_of(torch.tensor([1.0, 2.0, 3.0]))},
        {"x": mean_of(torch.tensor([10.0])), "y": sum_of(torch.ones(2))},
    ]
    assert values(merge(parts)) == {"x": 4.0, "y": 2.0}


def test_a_loss_is_a_sum_within_an_update_and_a_mean_over_updates() -> None:
    updates = [
        merge(
            [{"loss": sum_of(torch.tensor([1.0, 2.0])), "x": mean_of(torch.ones(2))}, {"loss": sum_of(torch.ones(1))}]
        ),
        {"loss": sum_of(torch.tensor([2.0])), "x": mean_of(torch.tensor([4.0])), "a": max_of(torch.tensor([5.0]))},
    ]
    assert values(merge_updates(updates)) == {"loss": 3.0, "x": 2.0, "a": 5.0}


def test_extremes_survive_merging_and_empty_parts() -> None:
    merged = merge([{"a": max_of(t), "b": min_of(t)} for t in (torch.tensor([-3.0, -1.0]), torch.empty(0))])
    assert (merged["a"].value, merged["b"].value) == (-1.0, -3.0)
    assert math.isnan(mean_of(torch.empty(0)).value)


@pytest.mark.parametrize("first", [True, False])
def test_a_nan_is_never_dropped(first: bool) -> None:
    parts = [max_of(torch.tensor([math.nan])), max_of(torch.tensor([1.0]))]
    left, right = parts if first else reversed(parts)
    assert math.isnan((left + right).value)


def test_different_reductions_do_not_merge() -> None:
    with pytest.raises(ValueError, match="mean with a max"):
        Metric("mean", 1.0, 1) + Metric("max", 1.0, 1)


def test_a_long_mean_is_summed_in_float64() -> None:
    noisy = torch.full((1 << 20,), 0.1)
    assert mean_of(noisy).value == pytest.approx(float(torch.tensor(0.1)), rel=1e-12)
