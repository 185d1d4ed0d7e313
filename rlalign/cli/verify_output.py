"""What a verification shows: a table for people, JSON for programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlalign.cli.errors import EXIT_DIFFERENT, EXIT_EQUAL, EXIT_UNUSABLE
from rlalign.cli.html import HtmlOutcome
from rlalign.dashboards.jsonl import to_json
from rlalign.dashboards.page import Table as PageTable
from rlalign.dashboards.pictures import PictureData
from rlalign.records import Completion
from rlalign.verifier.report import Report, record
from rlalign.verifier.thresholds import Thresholds
from rlalign.verifier.words import counted

_SHOWN = (
    "mismatch_count", "nonfinite_count", "bitwise_match_frac", "logp_abs_diff/mean", "logp_abs_diff/p99",
    "logp_abs_diff/max", "ulp/max", "prob_abs_diff/max", "k3", "ppl/ratio", "ratio_raw/max",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything one ``run`` found. facts: model, settings, fingerprints, seconds; plain JSON."""

    report: Report
    metrics: dict[str, float]
    completions: tuple[Completion, ...]
    facts: dict[str, Any]
    pictures: PictureData | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)

    @property
    def failed(self) -> tuple[Completion, ...]:
        """Requests that the engine could not serve, once each however many samples they asked for."""
        return tuple({c.request_id: c for c in self.completions if c.finish_reason == "error"}.values())

    @property
    def exceeded(self) -> list[str]:
        """What is beyond a threshold, one phrase each."""
        tokens = self.report.num_tokens
        return self.thresholds.exceeded(self.metrics, num_tokens=tokens) if tokens else []

    @property
    def exit_code(self) -> int:
        """A difference outweighs a prompt that could not be served; that in turn keeps the rest from being "equal"."""
        if self.exceeded:
            return EXIT_DIFFERENT
        return EXIT_UNUSABLE if self.failed or self.report.num_tokens == 0 else EXIT_EQUAL

    @property
    def line(self) -> str:
        """The verdict in one line: what was found, and why that is too much or not."""
        parts = [self.report.verdict]
        if self.report.num_tokens and not self.report.equal and not self.thresholds.bitwise:
            if self.exceeded:
                parts.append(f"beyond the thresholds: {'; '.join(self.exceeded)}")
            else:  # first, for what follows would read as a failure
                parts = [f"within the thresholds: {self.report.verdict}"]
        if self.failed:
            parts.append(f"{counted(len(self.failed), 'prompt')} could not be served")
        return "; ".join(parts)


def show(outcome: Outcome, console: Console) -> None:
    """Print table, worst tokens, failed requests and, last, the verdict; of nothing compared there is no table."""
    report = outcome.report
    if report.num_tokens:
        console.print(_summary(outcome))
    if report.worst:
        console.print(report.table())
    for completion in outcome.failed:
        console.print(f"line {completion.request_id}: not compared: {completion.error}", markup=False, soft_wrap=True)
    console.print(outcome.line, markup=False, soft_wrap=True, style="green" if outcome.exit_code == 0 else "red")


def write_json(outcome: Outcome, path: Path) -> None:
    """All of it as strict JSON; NaN and infinities are strings."""
    content = {
        "exit_code": outcome.exit_code,
        "equal": outcome.report.equal,
        "verdict": outcome.line,
        "exceeded": outcome.exceeded,
        "num_tokens": outcome.report.num_tokens,
        "num_samples": outcome.report.num_samples,
        "metrics": outcome.metrics,
        "worst_tokens": [record(token) for token in outcome.report.worst],
        "failed": [{"line": int(c.request_id), "error": c.error} for c in outcome.failed],
        **outcome.facts,
    }
    path.write_text(json.dumps(to_json(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def to_html(outcome: Outcome) -> HtmlOutcome:
    """The same for ``--html``. What was not compared is named there too."""
    facts, seconds = outcome.facts, outcome.facts["seconds"]
    shown = {
        "model": facts["model"],
        "rollout": facts["rollout"],
        "train": facts["train"],
        "samples": f"{outcome.report.num_samples:,}",
        "response tokens": f"{outcome.report.num_tokens:,}",
        "finished by": _finished(outcome),
        "weights of the rollout, SHA-256": facts["weights_sha256"]["rollout"],
        "weights of the trainer, SHA-256": facts["weights_sha256"]["train"],
        "plans differ in": facts["fingerprint_difference"] or "nothing",
        "settings": " ".join(f"{name}={value}" for name, value in facts["settings"].items() if value is not None),
        "seconds": _seconds(seconds),
    }
    failed = [[completion.request_id, completion.error] for completion in outcome.failed]
    return HtmlOutcome(
        title=f"{facts['model']}: rollout {facts['rollout']}, train {facts['train']}",
        verdict=outcome.line,
        good=outcome.exit_code == EXIT_EQUAL,
        facts=shown,
        metrics=outcome.metrics if outcome.report.num_tokens else {},
        pictures=outcome.pictures if outcome.report.num_tokens else None,
        tables=[("Agreement", PageTable("not compared", ["line", "why"], failed))] if failed else (),
    )


def _summary(outcome: Outcome) -> Table:
    facts, seconds = outcome.facts, outcome.facts["seconds"]
    table = Table(title=f"{facts['model']}: rollout {facts['rollout']}, train {facts['train']}", title_justify="left")
    table.add_column("rollout against train")
    table.add_column("", justify="right")
    table.add_row("samples", f"{outcome.report.num_samples:,}")
    table.add_row("response tokens", f"{outcome.report.num_tokens:,}")
    table.add_row("finished by", _finished(outcome))
    for name in _SHOWN:
        table.add_row(name, f"{outcome.metrics[f'align/{name}']:.9g}")
    table.add_row("seconds", _seconds(seconds))
    return table


def _finished(outcome: Outcome) -> str:
    finished = Counter(completion.finish_reason for completion in outcome.completions)
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(finished.items()))


def _seconds(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items())
