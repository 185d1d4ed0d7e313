"""What calls for an alert, and how often one is sent."""

from __future__ import annotations

import math

import pytest

from rlalign.config import AlertConfig
from rlalign.dashboards.alerts import Alert, AlertGate, alerts_of

QUIET = {
    "align/mismatch_count": 0.0, "align/nonfinite_count": 0.0, "align/weights_equal": 1.0, "align/k3": 0.0,
    "align/logp_abs_diff/max": 0.0, "align/logp_abs_diff/mean": 0.0, "align/mult_prob_error": 1.0,
}  # fmt: skip
ALL = AlertConfig(max_abs=0.5, mean_abs=0.1, k3=0.01, mult_prob_error=1.2, kl=0.02)


def kinds(numerics: str = "native", config: AlertConfig = ALL, *, halted: bool = False, **changed: float) -> list[str]:
    metrics = QUIET | {name.replace("__", "/"): value for name, value in changed.items()}
    found = alerts_of(metrics, config, numerics, step=3, verdict="they differ", halted=halted)
    assert all(len(one.title) < 64 and one.text.startswith("step 3: ") for one in found)
    assert all(one.text.endswith(". they differ") for one in found)
    return [one.kind for one in found]


@pytest.mark.parametrize(
    ("name", "high", "kind"),
    [
        ("align__logp_abs_diff__max", 0.5, "max_abs"),
        ("align__logp_abs_diff__mean", 0.1, "mean_abs"),
        ("align__k3", 0.01, "k3"),
        ("align__mult_prob_error", 1.2, "mult_prob_error"),
        ("align__full_vocab__kl__mean", 0.02, "kl"),
    ],
)
def test_thresholds(name: str, high: float, kind: str) -> None:
    assert kinds(**{name: high}) == []
    assert kinds(**{name: high * 1.01}) == kinds(**{name: math.nan}) == [kind]
    assert kinds(config=AlertConfig(mult_prob_error=None), **{name: high * 99}) == []


def test_what_is_always_one() -> None:
    assert kinds(align__nonfinite_count=2.0) == ["nonfinite"]
    assert kinds(align__weights_equal=0.0) == ["weights"]
    assert kinds(halted=True, align__nonfinite_count=1.0) == ["halt", "nonfinite"]


def test_one_differing_bit_is_one_under_a_common_plan_only() -> None:
    assert kinds("invariant", AlertConfig(), align__mismatch_count=1.0) == ["mismatch"]
    assert kinds("native", AlertConfig(), align__mismatch_count=1.0) == []
    assert kinds("invariant", AlertConfig(), halted=True, align__mismatch_count=1.0) == ["halt"]
    assert kinds("invariant", ALL, align__mismatch_count=1.0) == [], "the bound that was asked for counts"


def test_a_kind_is_sent_once_and_again_after_the_wait() -> None:
    now = [0.0]
    gate = AlertGate(10.0, lambda: now[0])
    a, b = (Alert(kind, kind, "", "WARN") for kind in "ab")
    sent = []
    for now[0], given in ((0.0, [a]), (5.0, [a, b]), (9.9, [a]), (10.0, [a, b]), (15.0, [b]), (16.0, [a])):
        sent.append("".join(one.kind for one in gate.passing(given)))
    assert sent == ["a", "b", "", "a", "b", ""]
