"""Streaming statistics against the whole, exactly; matching by id in any order, with and without room in memory."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from rlalign.verifier.compare import LogprobPair, compare
from rlalign.verifier.dumps import MISSING, DumpSequence
from rlalign.verifier.metrics import align_metrics
from rlalign.verifier.stream import tally as tally_module
from rlalign.verifier.stream.join import join_by_id, join_by_order
from rlalign.verifier.stream.pieces import Sides, of_dumps, of_scores
from rlalign.verifier.stream.sums import ExactSum, Quantiles, standard_deviation
from rlalign.verifier.stream.tally import Outcome, Tally
from rlalign.verifier.thresholds import Thresholds

INF = float("inf")


def sequence(name: str, logprobs: list[float] | np.ndarray, token_ids: list[int] | None = None) -> DumpSequence:
    values = np.asarray(logprobs, np.float32)
    ids = np.arange(len(values)) if token_ids is None else np.array(token_ids)
    return DumpSequence(name, np.array([1, 2]), ids.astype(np.int64), values, source=f"{name}:1")


def counted(*sides: Sides, worst: int = 10) -> Outcome:
    tally = Tally(worst=worst)
    for one in sides:
        tally.add(one)
    return tally.outcome()


def scored(rollout: list[float], train: list[float], name: str = "a") -> Sides:
    return of_scores(sequence(name, rollout), np.float32(train))


def random_sides(count: int = 60, seed: int = 0, noise: float = 0.05) -> list[Sides]:
    random = np.random.default_rng(seed)
    sides = []
    for i in range(count):
        rollout = -random.exponential(size=int(random.integers(0, 80))).astype(np.float32)
        train = (rollout + noise * random.normal(size=len(rollout)) * (random.random(len(rollout)) < 0.7)).astype(
            np.float32
        )
        one = of_scores(sequence(f"s{i}", rollout), train)
        sides.append(replace(one, keep=random.random(len(rollout)) < 0.8) if i % 3 == 0 else one)
    return sides


def whole(sides: list[Sides]) -> dict[str, float]:
    return align_metrics(compare([LogprobPair(s.rollout, s.train, len(s.rollout), s.keep) for s in sides]))


@pytest.mark.parametrize("noise", [0.0, 1e-6, 0.05, 3.0])
def test_the_metrics_are_those_of_the_whole(noise: float) -> None:
    sides = random_sides(noise=noise)
    streamed, expected = counted(*sides).metrics, whole(sides)
    assert streamed.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith(("std", "pearson", "ess")):
            assert streamed[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name
        else:
            assert streamed[name] == value, name


def test_nonfinite_and_absurd_numbers_give_what_the_whole_gives() -> None:
    sides = [scored([-1.0, -9999.0, np.nan, -2.0], [-1.0, -0.5, -1.0, -INF]), scored([-800.0], [-1.0], "b")]
    streamed, expected = counted(*sides).metrics, whole(sides)
    for name, value in expected.items():
        assert streamed[name] == pytest.approx(value, rel=1e-9, nan_ok=True), name
    assert streamed["align/logp_abs_diff/max"] == INF
    assert math.isnan(counted().metrics["align/k3"])


@pytest.mark.parametrize("piece_tokens", [1, 37, 1 << 16])
def test_neither_order_nor_pieces_change_a_bit(monkeypatch: pytest.MonkeyPatch, piece_tokens: int) -> None:
    sides = random_sides(seed=3)
    sides[7].rollout[3:5] = MISSING, -INF
    expected = counted(*sides)
    monkeypatch.setattr(tally_module, "_PIECE_TOKENS", piece_tokens)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(sides))
        shuffled = counted(*(sides[i] for i in order))
        assert repr(shuffled) == repr(expected)  # repr: NaN is not itself


def test_a_single_ulp_is_seen_and_named() -> None:
    values = -np.random.default_rng(0).exponential(size=50).astype(np.float32)
    other = values.copy()
    other[31] = np.nextafter(other[31], np.float32(0))
    outcome = counted(of_scores(sequence("x", values), other))
    (token,) = outcome.worst
    assert (outcome.mismatch_count, token.position, token.ulp, token.kind) == (1, 31, 1, "differs")
    assert (token.before, token.after) == (tuple(range(25, 31)), tuple(range(32, 38)))


def test_worst_first_and_ties_by_name() -> None:
    sides = [
        scored([-1.0, MISSING, np.nan], [-1.5, -1.0, -1.0], "b"), scored([-1.0, -1.0], [-1.5, -3.0], "a")
    ]  # fmt: skip
    kinds = [(token.kind, token.id, token.position) for token in counted(*sides).worst]
    assert kinds == [
        ("missing", "b", 1), ("nonfinite", "b", 2), ("differs", "a", 1), ("differs", "a", 0), ("differs", "b", 0)
    ]  # fmt: skip
    assert len(counted(*sides, worst=2).worst) == 2


@pytest.mark.parametrize("decades", [0, 8, 60])
@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e240])
def test_sums_are_exact(scale: float, decades: int) -> None:
    random = np.random.default_rng(0)
    values = random.normal(size=2000) * scale * 10.0 ** random.integers(-decades, decades + 1, 2000)
    values[::100] = 0.0
    total = ExactSum()
    for part in np.array_split(values, 7):
        total.add(part)
    assert total.exact == sum(map(Fraction, values.tolist()))
    assert total.value == math.fsum(values.tolist())


def test_sums_of_infinities() -> None:
    total = ExactSum()
    total.add(np.array([1.0, INF]))
    assert (total.value, total.exact) == (INF, None)
    total.add(np.array([-INF]))
    assert math.isnan(total.value)
    huge = ExactSum()
    huge.add(np.full(4, 1e308))
    assert huge.value == INF


def test_deviation_without_cancellation() -> None:
    first, squares = ExactSum(), ExactSum()
    values = (1.0 + np.arange(1000) * 2.0**-24).astype(np.float32).astype(np.float64)
    first.add(values)
    squares.add(values**2)
    assert standard_deviation(first, squares) == pytest.approx(np.std(values - 1.0, ddof=1), rel=1e-12)


def test_quantiles_of_many_are_within_their_bound() -> None:
    random = np.random.default_rng(0)
    values = np.abs(random.normal(size=1_200_000)).astype(np.float32).astype(np.float64)
    values[:100_000] = 0.0
    forward, backward = Quantiles(), Quantiles()
    for part in np.array_split(values, 5):
        forward.add(part)
    for part in np.array_split(values[::-1], 11):
        backward.add(part)
    for level in (1, 50, 99):
        exact = float(np.percentile(values, level))
        assert exact * (1 - 2**-14) <= forward.read(level) <= exact
        assert forward.read(level) == backward.read(level)
    whole_numbers = Quantiles()
    whole_numbers.add(np.arange(1_200_000.0) % 1000)
    assert whole_numbers.read(99) == np.percentile(np.arange(1_200_000.0) % 1000, 99)


def test_two_dumps_are_compared_as_far_as_their_tokens_agree() -> None:
    a = sequence("a", [-1.0, -2.0, -3.0], [5, 6, 7])
    same, reason = of_dumps(a, sequence("a", [-1.0, -2.0, -3.5], [5, 6, 7]))
    assert (same.compared, reason) == (3, None)
    other, reason = of_dumps(a, sequence("a", [-1.0, -2.0, -3.0], [5, 9, 7]))
    assert (other.compared, reason) == (1, "different token ids from position 1 on (6, 9)")
    longer, reason = of_dumps(a, sequence("a", [-1.0, -2.0, -3.0, -4.0], [5, 6, 7, 8]))
    assert (longer.compared, reason) == (3, "different lengths (3 and 4 tokens)")
    assert (counted(longer).missing_count, counted(longer).num_tokens) == (1, 4)
    assert counted(longer).worst == ()
    moved, reason = of_dumps(a, replace(a, prompt_token_ids=np.array([1, 3])))
    assert (moved.compared, reason) == (0, "different prompts (2 and 2 tokens, first difference at 1)")
    masks = [np.array([True, False, False]), np.array([False, False, True])]
    both, _ = of_dumps(replace(a, mask=masks[0]), replace(a, mask=masks[1]))
    assert both.keep.tolist() == [True, False, True]


def names(pairs: object) -> list[tuple[str, str]]:
    return sorted((p.rollout.id if p.rollout else "-", p.train.id if p.train else "-") for p in pairs)


@pytest.mark.parametrize("waiting_tokens", [0, 500, 10**9])
def test_join_by_id_whatever_the_order_and_the_room(waiting_tokens: int) -> None:
    random = np.random.default_rng(0)
    every = [sequence(f"n{i}", random.normal(size=5)) for i in range(200)]
    left = [every[i] for i in random.permutation(190)]
    right = [every[i] for i in random.permutation(200) if i >= 5]
    pairs = list(join_by_id(iter(left), iter(right), waiting_tokens=waiting_tokens))
    expected = [(f"n{i}" if i < 190 else "-", f"n{i}" if i >= 5 else "-") for i in range(200)]
    assert names(pairs) == sorted(expected)
    assert all(p.rollout.logprobs.tobytes() == p.train.logprobs.tobytes() for p in pairs if p.rollout and p.train)


def test_an_id_that_comes_twice_is_named_with_both_places() -> None:
    a = sequence("a", [-1.0])
    with pytest.raises(ValueError, match="again:7: a second sequence of the id 'a', which a:1 has too"):
        list(join_by_id(iter([a, replace(a, source="again:7")]), iter([])))


def test_join_by_order_keeps_the_longer_sides_rest() -> None:
    pairs = join_by_order(iter([sequence("a", []), sequence("b", [])]), iter([sequence("x", [])]))
    assert names(pairs) == [("a", "x"), ("b", "-")]


def test_thresholds() -> None:
    outcome = counted(scored([-1.0, -2.0], [-1.0, -2.5]))
    exceeded = {
        "nothing asked": Thresholds(), "bits": Thresholds(max_abs=0), "max": Thresholds(max_abs=0.4),
        "mean": Thresholds(mean_abs=0.2), "share": Thresholds(mismatch_frac=0.4), "k3": Thresholds(k3=0.01),
    }  # fmt: skip
    for name, bounds in exceeded.items():
        assert len(bounds.exceeded(outcome.metrics, num_tokens=2)) == 1, name
    wide = Thresholds(max_abs=0.5, mean_abs=0.25, mismatch_frac=0.5, k3=1)
    assert wide.exceeded(outcome.metrics, num_tokens=2) == []
    assert Thresholds(mean_abs=0.3).exceeded(outcome.metrics, num_tokens=2) == []
    bad = counted(scored([MISSING], [-1.0]))
    assert wide.exceeded(bad.metrics, num_tokens=1)[0] == "1 log-prob is missing or not finite"
    signed = counted(scored([0.0], [-0.0]))
    assert Thresholds().exceeded(signed.metrics, num_tokens=1) == ["1 of 1 tokens differ in their bits"]
    with pytest.raises(ValueError, match="--max-abs nan"):
        Thresholds(max_abs=math.nan)
