"""A run's sums over all steps, which every checkpoint keeps, and what the closing table says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from rlalign.verifier.report import Report


@dataclass
class Totals:
    """Sums over all steps, earlier parts of a resumed run included."""

    steps: int = 0
    tokens: int = 0
    mismatch_count: int = 0
    logp_abs_diff_max: float = 0.0
    reward_first: float | None = None
    reward_last: float | None = None
    eval_first: float | None = None
    eval_last: float | None = None
    eval_best: float | None = None
    last_eval_step: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def count(self, report: Report) -> None:
        """Add what a step compared."""
        self.tokens += report.num_tokens
        self.mismatch_count += report.mismatch_count
        self.logp_abs_diff_max = max(self.logp_abs_diff_max, report.max_abs_delta)

    def add_step(self, reward: float, seconds: Mapping[str, float]) -> None:
        """Add a finished step's mean reward and the seconds of its phases."""
        self.reward_last = reward
        if self.reward_first is None:
            self.reward_first = reward
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value

    def add_evaluation(self, accuracy: float) -> bool:
        """Add a held-out accuracy of the weights as they are; returns whether it is the best so far."""
        self.eval_last, self.last_eval_step = accuracy, self.steps
        if self.eval_first is None:
            self.eval_first = accuracy
        best = self.eval_best is None or accuracy > self.eval_best
        if best:
            self.eval_best = accuracy
        return best

    def rows(self) -> list[tuple[str, str]]:
        """Of the closing table."""
        seconds = "  ".join(f"{name} {value:.1f}" for name, value in self.seconds.items())
        return [
            ("held-out accuracy", f"{self.eval_first:.3f} before, {self.eval_last:.3f} after"),
            ("mean reward", f"{self.reward_first:.3f} first step, {self.reward_last:.3f} last step"),
            ("response tokens", f"{self.tokens:,} in {self.steps} steps"),
            ("tokens that differ", f"{self.mismatch_count:,}"),
            ("max |Δ log-prob|", f"{self.logp_abs_diff_max:.3g}"),
            ("seconds", seconds),
        ]


def totals_of(values: Mapping[str, Any]) -> Totals:
    """A checkpoint's. ValueError for a field that is missing too: its sum would begin anew without a word."""
    if others := values.keys() ^ {one.name for one in fields(Totals)}:
        named = ", ".join(f"{'unknown' if name in values else 'missing'} field {name!r}" for name in sorted(others))
        raise ValueError(f"the checkpoint's totals are of another version of rlalign: {named}")
    return Totals(**values)
