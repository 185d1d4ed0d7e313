"""Expected values are worked out by hand from Δ, or from a formula that shares nothing with the code."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlalign.config import Correction
from rlalign.verifier.compare import Comparison, LogprobPair, compare
from rlalign.verifier.metrics import Provenance, align_metrics


def comparison(rows: list[tuple[list[float], list[float]]], versions: tuple[int, ...] = ()) -> Comparison:
    """rows: (rollout, train) probabilities of each sample."""
    log = [tuple(np.log(np.float64(side)).astype(np.float32) for side in row) for row in rows]
    versions = versions or (0,) * len(rows)
    return compare([LogprobPair(r, t, len(r), weights_version=v) for (r, t), v in zip(log, versions, strict=True)])


@pytest.fixture
def worked() -> dict[str, float]:
    """Ratios 2, 1/2 in the first sample, 1 in the second: Δ = ln 2, -ln 2, 0."""
    return align_metrics(comparison([([0.25, 0.5], [0.5, 0.25]), ([0.5], [0.5])]))


LN2 = math.log(2.0)
WORKED = {
    "mismatch_count": 2.0,
    "nonfinite_count": 0.0,
    "bitwise_match_frac": 1 / 3,
    "logp_diff/mean": 0.0,
    "logp_abs_diff/mean": 2 * LN2 / 3,
    "logp_abs_diff/std": LN2 / math.sqrt(3),  # squares 1/9, 1/9, 4/9 of ln²2, over n - 1
    "logp_abs_diff/p50": LN2,
    "logp_abs_diff/p99": LN2,
    "logp_abs_diff/max": LN2,
    "prob_abs_diff/mean": 0.5 / 3,
    "prob_abs_diff/std": 0.25 / math.sqrt(3),
    "prob_abs_diff/max": 0.25,
    # train (.5 .25 .5), rollout (.25 .5 .5): covariance -1/144, both variances 1/72
    "prob_pearson": -0.5,
    "k1": 0.0,
    "k3": ((2 - LN2 - 1) + (0.5 + LN2 - 1)) / 3,
    "k3_max": 1 - LN2,
    "mult_prob_error": (2 + 2 + 1) / 3,
    "ppl/train": (math.sqrt(8) + 2) / 2,
    "ppl/rollout": (math.sqrt(8) + 2) / 2,
    "ppl/ratio": 1.0,
    "log_ppl_abs_diff": 0.0,
    "chi2/token": (4 + 0.25 + 1) / 3 - 1,
    "chi2/seq": 0.0,
    "ess": 3.5**2 / (3 * (4 + 0.25 + 1)),
    "ratio_raw/min": 0.5,
    "ratio_raw/mean": 3.5 / 3,
    "ratio_raw/max": 2.0,
}


@pytest.mark.parametrize("name", WORKED)
def test_hand_computed(worked: dict[str, float], name: str) -> None:
    assert worked[f"align/{name}"] == pytest.approx(WORKED[name], rel=1e-6, abs=1e-7)


def test_ulp_of_neighbours() -> None:
    rollout = np.float32([-1.0, -1.0, -1.0])
    train = np.array([rollout[0], np.nextafter(rollout[1], np.float32(0)), rollout[2]])
    train[2] = np.float32(-1.0 - 4 * 2**-23)
    values = align_metrics(compare([LogprobPair(rollout, train, 3)]))
    assert values["align/ulp/max"] == 4.0
    assert values["align/ulp/p99"] == pytest.approx(1 + 0.98 * 3)


def test_sequence_metrics_have_their_own_ratio() -> None:
    values = align_metrics(comparison([([0.5, 0.5], [0.25, 0.5])]))
    assert values["align/ppl/ratio"] == pytest.approx(math.sqrt(2), rel=1e-6)
    assert values["align/log_ppl_abs_diff"] == pytest.approx(LN2 / 2, rel=1e-6)
    assert values["align/chi2/seq"] == pytest.approx(0.25 - 1, rel=1e-6)
    assert values["align/k1"] == pytest.approx(LN2 / 2, rel=1e-6)
    assert values["align/logp_diff/mean"] == pytest.approx(-LN2 / 2, rel=1e-6)


def test_small_differences_do_not_cancel() -> None:
    rollout = np.float32([-1.0])
    train = np.nextafter(rollout, np.float32(0))
    d = float(train[0]) - float(rollout[0])
    values = align_metrics(compare([LogprobPair(rollout, train, 1)]))
    assert values["align/chi2/token"] == pytest.approx(2 * d, rel=1e-5)
    assert values["align/k3"] == pytest.approx(d * d / 2, rel=1e-5)


def test_agreement_is_exactly_the_neutral_value_everywhere() -> None:
    values = -np.random.default_rng(1).exponential(size=1000).astype(np.float32)
    result = align_metrics(compare([LogprobPair(values, values.copy(), 1000)]), advantages=[np.ones(1000)])
    ones = ("bitwise_match_frac", "prob_pearson", "mult_prob_error", "ppl/ratio", "ess", "ratio_raw/min",
            "ratio_raw/mean", "ratio_raw/max")  # fmt: skip
    for name, value in result.items():
        if "ppl/train" in name or "ppl/rollout" in name:
            continue
        assert value == (1.0 if name.removeprefix("align/") in ones else 0.0), name


@pytest.mark.parametrize("delta", [0.1, -0.3])
def test_sums_of_equal_numbers_are_as_exact_as_any(delta: float) -> None:
    rollout = np.full(7, -2.0, np.float32)
    found = align_metrics(compare([LogprobPair(rollout, rollout + np.float32(delta), 7)]))
    one = float((rollout + np.float32(delta) - rollout)[0])
    assert found["align/logp_diff/mean"] == math.fsum([one] * 7) / 7
    assert found["align/ratio_raw/mean"] == math.fsum([float(np.exp(one))] * 7) / 7


def test_adv_skew_follows_the_sign_of_the_advantage() -> None:
    two = comparison([([0.25, 0.25], [0.5, 0.5]), ([0.5, 0.5], [0.25, 0.25])])
    up = align_metrics(two, advantages=[np.float32([3.0, 0.1]), np.float32([-1.0, -9.0])])
    assert up["align/adv_skew"] == pytest.approx(1.0)
    down = align_metrics(two, advantages=[np.float32([-3.0, -0.1]), np.float32([1.0, 9.0])])
    assert down["align/adv_skew"] == pytest.approx(-1.0)
    # Δ (+,+,-,-) against signs (+,-,+,-) is uncorrelated
    assert align_metrics(two, advantages=[np.float32([1, -1]), np.float32([1, -1])])["align/adv_skew"] == 0.0


@pytest.mark.parametrize("train", [0.25, 0.5])
@pytest.mark.parametrize("advantages", [[np.ones(2)], [np.ones(2), np.ones(1)], [np.ones(1), np.ones(3)], np.ones(2)])
def test_advantages_must_fit(advantages: list[np.ndarray], train: float) -> None:
    """Also where all agrees, and nothing is to be correlated."""
    two = comparison([([0.5, 0.5], [train, 0.5]), ([0.5, 0.5], [0.5, 0.5])])
    with pytest.raises(ValueError, match="advantages"):
        align_metrics(two, advantages=advantages)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, None])
def test_a_nonfinite_or_missing_token_makes_every_maximum_infinite(bad: float | None) -> None:
    good = np.float32([-1.0, -2.0, -3.0])
    train = good[:2] if bad is None else np.float32([-1.0, -2.0, bad])
    values = align_metrics(compare([LogprobPair(good, train, 3)]))
    assert values["align/nonfinite_count"] == values["align/mismatch_count"] == 1.0
    assert values["align/bitwise_match_frac"] == pytest.approx(2 / 3)
    for name in ("logp_abs_diff/max", "ulp/max", "prob_abs_diff/max", "k3_max", "ratio_raw/max"):
        assert values[f"align/{name}"] == math.inf
    assert values["align/logp_abs_diff/mean"] == 0.0


def test_samples_without_a_finite_token_leave_no_trace_in_the_sequences() -> None:
    none, nan, one = np.float32([]), np.float32([np.nan]), np.log(np.float32([0.5]))
    pairs = [LogprobPair(side, side, len(side)) for side in (none, one, nan, one, none)]
    values = align_metrics(compare(pairs), advantages=[np.ones(len(pair.train)) for pair in pairs])
    assert values["align/ppl/train"] == values["align/ppl/rollout"] == pytest.approx(2.0)
    assert (values["align/ppl/ratio"], values["align/chi2/seq"], values["align/adv_skew"]) == (1.0, 0.0, 0.0)


def test_provenance_is_only_logged_when_known() -> None:
    three = comparison([([0.5], [0.5]), ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])], versions=(4, 6))
    assert not any("version" in name or "policy_age" in name for name in align_metrics(three))
    known = Provenance(trainer_version=7, weights_equal=False, weights_version=6, correction=Correction(1.5))
    values = align_metrics(three, provenance=known)
    assert values["align/policy_age/mean"] == pytest.approx((3 + 1 + 1 + 1) / 4)
    assert values["align/policy_age/max"] == 3.0
    assert values["align/weights_equal"] == 0.0
    assert values["align/weights_version"] == 6.0


@pytest.mark.parametrize(
    ("correction", "share"),
    [
        (Correction(1.5), 1 / 3), (Correction(2.5), 0.0), (None, 0.0), (Correction(2.5, reject_beyond=1.75), 2 / 3),
        (Correction(2.5, veto_below=0.75), 2 / 3), (Correction(2.5, 3.0, 0.25), 0.0),
    ],
)  # fmt: skip
def test_share_of_ratios_that_a_correction_changes(correction: Correction | None, share: float) -> None:
    """Ratios 2 and 1/2 of one sequence, 1 of another."""
    three = comparison([([0.25, 0.5], [0.5, 0.25]), ([0.5], [0.5])])
    values = align_metrics(three, provenance=Provenance(correction=correction))
    assert values["align/ratio_frac_modified"] == pytest.approx(share)
    assert values["align/ratio_raw/max"] == pytest.approx(2.0), "before the correction"


def test_order_of_samples_does_not_change_a_bit() -> None:
    rng = np.random.default_rng(2)
    rows = [rng.uniform(0.01, 1, size=(2, rng.integers(1, 9))).tolist() for _ in range(40)]
    forward = align_metrics(comparison([(r, t) for r, t in rows]))
    backward = align_metrics(comparison([(r, t) for r, t in reversed(rows)]))
    assert forward == backward


def test_extreme_ratios_do_not_break_the_statistics() -> None:
    rollout, train = np.float32([-800.0, -1.0]), np.float32([-1.0, -800.0])
    values = align_metrics(compare([LogprobPair(rollout, train, 2)]))
    assert values["align/ratio_raw/max"] == math.inf
    assert values["align/ess"] == pytest.approx(0.5)
    assert values["align/logp_abs_diff/max"] == pytest.approx(799.0)


def test_no_tokens_gives_nan_not_agreement() -> None:
    values = align_metrics(compare([]), advantages=[])
    assert math.isnan(values["align/bitwise_match_frac"])
    assert math.isnan(values["align/logp_abs_diff/max"])
    assert values["align/mismatch_count"] == 0.0
