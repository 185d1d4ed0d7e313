"""Learning-rate schedule and minibatch split, by hand."""

from __future__ import annotations

import pytest

from rlalign.algorithms.minibatches import split_minibatches
from rlalign.algorithms.schedules import learning_rate


def test_warmup_then_constant() -> None:
    got = [learning_rate(step, base=1.0, total_steps=10, warmup_steps=4) for step in range(6)]
    assert got == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_starts_at_base_halves_in_the_middle_and_ends_at_its_floor() -> None:
    def rate(step: int) -> float:
        return learning_rate(step, base=2.0, total_steps=13, warmup_steps=2, schedule="cosine", min_lr_ratio=0.1)

    assert rate(1) == 2.0
    assert rate(2) == 2.0
    assert rate(7) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rate(12) == pytest.approx(0.2)
    assert rate(100) == pytest.approx(0.2)


def test_bad_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="schedule='linear'"):
        learning_rate(0, base=1.0, total_steps=1, schedule="linear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step=-1"):
        learning_rate(-1, base=1.0, total_steps=1)


@pytest.mark.parametrize(("samples", "parts"), [(10, 3), (8, 8), (7, 1)])
def test_minibatches_partition_the_batch(samples: int, parts: int) -> None:
    split = split_minibatches(samples, parts, seed=3)
    assert sorted(index for part in split for index in part) == list(range(samples))
    sizes = [len(part) for part in split]
    assert max(sizes) - min(sizes) <= 1
    assert split == split_minibatches(samples, parts, seed=3)


def test_minibatches_are_shuffled_by_seed() -> None:
    assert split_minibatches(32, 2, seed=0) != split_minibatches(32, 2, seed=1)
    assert split_minibatches(32, 1, seed=5) == [list(range(32))]
    with pytest.raises(ValueError, match="minibatches=3 of 2 samples"):
        split_minibatches(2, 3, seed=0)
