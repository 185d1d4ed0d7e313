"""Which numbers of a step are worth a message to whoever watches the run, and how often.

An alert has a kind, and each kind is sent once, then again only after ``align.alert.wait_seconds``: a mismatch that
lasts says nothing new at every step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rlalign.config import AlertConfig, Numerics

Level = Literal["INFO", "WARN", "ERROR"]
# setting of ``AlertConfig``: the metric that it bounds
_BOUNDED = {
    "max_abs": "align/logp_abs_diff/max",
    "mean_abs": "align/logp_abs_diff/mean",
    "k3": "align/k3",
    "mult_prob_error": "align/mult_prob_error",
    "kl": "align/full_vocab/kl/mean",
}


@dataclass(frozen=True, slots=True)
class Alert:
    """kind: what it is about, for the wait. title: under 64 characters, as wandb wants it."""

    kind: str
    title: str
    text: str
    level: Level


def alerts_of(
    metrics: Mapping[str, float], config: AlertConfig, numerics: Numerics, *, step: int, verdict: str, halted: bool
) -> list[Alert]:
    """What a step's metrics call for, the gravest first. verdict: of the step's comparison, part of every text."""
    found: list[Alert] = []

    def add(kind: str, title: str, what: str, level: Level) -> None:
        found.append(Alert(kind, title, f"step {step}: {what}. {verdict}", level))

    if halted:
        add(
            "halt", "rlalign: the run has stopped", "rollout and trainer differ and align.on_mismatch stops it", "ERROR"
        )
    if count := metrics.get("align/nonfinite_count"):
        add("nonfinite", "rlalign: log-probs missing or not finite", f"{count:,.0f} of them", "ERROR")
    if metrics.get("align/weights_equal") == 0.0:
        add("weights", "rlalign: the engines hold other weights", "their hash is not the trainer's", "ERROR")
    # with one plan on both sides a single bit is news; ordinary operators always differ
    one_bit = numerics == "invariant" and config.max_abs is None and not halted  # a stop says it already
    if one_bit and metrics.get("align/mismatch_count"):
        add(
            "mismatch", "rlalign: rollout and trainer differ", f"{metrics['align/mismatch_count']:,.0f} tokens", "ERROR"
        )
    for name, metric in _BOUNDED.items():
        bound, value = getattr(config, name), metrics.get(metric)
        # not(<=): a NaN is within no bound
        if bound is not None and value is not None and not value <= bound:
            add(name, f"rlalign: {metric} is high", f"{metric} {value:.6g} > {bound:g}", "WARN")
    return found


class AlertGate:
    """Lets each kind through once, and again after ``wait_seconds``. clock: seconds, from wherever."""

    def __init__(self, wait_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._wait, self._clock = wait_seconds, clock
        self._sent: dict[str, float] = {}

    def passing(self, alerts: Sequence[Alert]) -> list[Alert]:
        """Those that are to be sent now; they count as sent."""
        now = self._clock()
        due = [one for one in alerts if now - self._sent.get(one.kind, -float("inf")) >= self._wait]
        self._sent |= {one.kind: now for one in due}
        return due
