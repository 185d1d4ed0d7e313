"""How much disagreement is accepted. By default none: every bit must be equal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlalign.verifier.words import are, counted


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Upper bounds; None: not asked for. max_abs=0 demands equal bits, +0 and -0 told apart.

    With no bound at all, max_abs is 0. Raises ValueError for a bound that is negative or NaN, or a share above 1.
    """

    max_abs: float | None = None
    mean_abs: float | None = None
    mismatch_frac: float | None = None
    k3: float | None = None

    def __post_init__(self) -> None:
        for name in Thresholds.__slots__:
            if (bound := getattr(self, name)) is not None and not bound >= 0:
                raise ValueError(f"--{name.replace('_', '-')} {bound}: a threshold is a number >= 0")
        # a share that no dump exceeds would accept every one, most likely because a percentage was meant
        if self.mismatch_frac is not None and self.mismatch_frac > 1:
            raise ValueError(f"--mismatch-frac {self.mismatch_frac}: a share is at most 1")

    @property
    def bitwise(self) -> bool:
        """True if one differing bit is too much."""
        bounds = (self.max_abs, self.mean_abs, self.mismatch_frac, self.k3)
        return self.max_abs == 0 or all(bound is None for bound in bounds)

    def exceeded(
        self, metrics: Mapping[str, float], *, num_tokens: int, nonfinite: Sequence[str] | None = None
    ) -> list[str]:
        """What is beyond a bound, one phrase each. metrics: ``align/*`` over ``num_tokens`` > 0 tokens.

        A log-prob that is missing or not finite is beyond any bound. nonfinite: what to say of them, where it is known
        whose they are.
        """
        count, bad = metrics["align/mismatch_count"], metrics["align/nonfinite_count"]
        if nonfinite is None:
            nonfinite = [f"{counted(int(bad), 'log-prob')} {are(bad)} missing or not finite"] if bad else []
        found = list(nonfinite)
        if self.bitwise and count:
            found.append(f"{count:,.0f} of {num_tokens:,} tokens differ in their bits")
        values = {
            "max_abs": ("max |Δ|", metrics["align/logp_abs_diff/max"]),
            "mean_abs": ("mean |Δ|", metrics["align/logp_abs_diff/mean"]),
            "mismatch_frac": ("share of differing tokens", count / num_tokens),
            "k3": ("k3", metrics["align/k3"]),
        }
        for name, (what, value) in values.items():
            bound = None if name == "max_abs" and self.bitwise else getattr(self, name)
            # not(<=): a statistic of nothing is NaN, and within no bound
            if bound is not None and not value <= bound:
                found.append(f"{what} {value:.6g} > {bound:g}")
        return found
