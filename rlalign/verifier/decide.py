"""What happens after a comparison: carry on (as it is, or with a corrected loss), warn, or stop the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from rlalign.config import Config
from rlalign.verifier.report import Report

OnMismatch = Literal["log", "warn", "dump", "halt", "correct"]
Action = Literal["pass", "log", "warn", "dump", "halt", "correct"]
_POLICIES = ("log", "warn", "dump", "halt", "correct")


class MismatchHalt(Exception):
    """Rollout and trainer disagree and the run must stop, before the optimizer steps. ``report`` says where."""

    def __init__(self, report: Report) -> None:
        super().__init__(report)
        self.report = report

    def __str__(self) -> str:
        return self.report.verdict


def policy_of(config: Config) -> OnMismatch:
    """``align.on_mismatch`` with ``auto`` resolved: halt under numerics=invariant, log under native."""
    if config.align.on_mismatch == "auto":
        return "halt" if config.halts_on_mismatch else "log"
    return config.align.on_mismatch


def decide(report: Report, on_mismatch: OnMismatch) -> Action:
    """``pass`` if all is equal, else the policy's own action. Nothing compared counts as a disagreement.

    ``correct`` halts where there is no ratio to correct by: a log-prob is missing or not finite, or there is none.
    """
    if on_mismatch not in _POLICIES:
        raise ValueError(f"on_mismatch={on_mismatch!r} is not one of {', '.join(_POLICIES)}")
    if report.equal:
        return "pass"
    if on_mismatch == "correct" and (report.nonfinite_count or not report.num_tokens):
        return "halt"
    return on_mismatch


def enforce(
    report: Report,
    on_mismatch: OnMismatch,
    *,
    warn: Callable[[str], None],
    dump: Callable[[], None] | None = None,
) -> Action:
    """Carry out the decision: ``warn`` and ``dump`` say the verdict, ``halt`` raises MismatchHalt. Returns what it did.

    dump: called for ``dump`` and ``halt`` to keep what was compared; an empty comparison leaves nothing to keep.
    """
    action = decide(report, on_mismatch)
    if dump is not None and action in ("dump", "halt") and report.num_tokens > 0:
        dump()
    if action == "halt":
        raise MismatchHalt(report)
    if action in ("warn", "dump"):
        warn(report.verdict)
    return action
