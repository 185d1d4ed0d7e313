"""What the comparison of a dump shows: a table for people, JSON for programs, a page with pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlalign.cli.errors import EXIT_DIFFERENT, EXIT_EQUAL, EXIT_UNUSABLE, one_line
from rlalign.dashboards.jsonl import to_json
from rlalign.verifier.stream.tally import Outcome
from rlalign.verifier.stream.worst import TokenDifference
from rlalign.verifier.thresholds import Thresholds
from rlalign.verifier.words import are, counted, shown_ulp

if TYPE_CHECKING:
    from rlalign.dashboards.snapshot import Snapshot

Decode = Callable[[Sequence[int]], str]
_SHOWN = (
    "mismatch_count", "nonfinite_count", "bitwise_match_frac", "logp_diff/mean", "logp_abs_diff/mean",
    "logp_abs_diff/p99", "logp_abs_diff/max", "ulp/max", "prob_abs_diff/max", "k3", "ppl/ratio", "ratio_raw/max",
)  # fmt: skip
_NAMED = 10


class LeftOut(NamedTuple):
    """A sequence that was not compared, or not whole. name: what people are shown."""

    id: str
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Everything that a comparison found. sides: what is called rollout and train. scored: whether train is a model's
    forward over the tokens of rollout, a dump; two dumps otherwise.

    unmatched: sequences that make the two sides different whatever their log-probs are, and why. failed: sequences
    that could not be compared, and why. notes: what was assumed. facts: more plain JSON. unread: what ended the reading
    before the end.
    """

    sides: tuple[str, str]
    outcome: Outcome
    thresholds: Thresholds
    facts: dict[str, Any]
    unmatched: Sequence[LeftOut] = ()
    num_unmatched: int = 0
    failed: Sequence[LeftOut] = ()
    num_failed: int = 0
    notes: Sequence[str] = ()
    scored: bool = False
    pictures: Snapshot | None = field(default=None, repr=False)
    unread: ValueError | None = None

    @property
    def exceeded(self) -> list[str]:
        """Why the sides count as different, one phrase each."""
        outcome, found = self.outcome, []
        if outcome.num_tokens:
            found = self.thresholds.exceeded(
                outcome.metrics,
                num_tokens=outcome.num_tokens,
                nonfinite=not_finite(outcome.nonfinite_count, outcome.train_nonfinite_count, scored=self.scored),
            )
        if self.num_unmatched:
            match = "doesn't match" if self.num_unmatched == 1 else "don't match"
            found.append(f"{counted(self.num_unmatched, 'sequence')} {match}")
        return found

    @property
    def exit_code(self) -> int:
        """A difference outweighs a sequence that could not be compared; that in turn keeps the rest from equality.
        Input that can't be read outweighs all."""
        if self.outcome.num_tokens == 0 or self.unread is not None:
            return EXIT_UNUSABLE
        if self.exceeded:
            return EXIT_DIFFERENT
        return EXIT_UNUSABLE if self.num_failed else EXIT_EQUAL

    @property
    def line(self) -> str:
        """The verdict in one line."""
        return self._found if self.unread is None else f"{self._found}; not all was read: {one_line(self.unread)}"

    @property
    def _found(self) -> str:
        outcome, left_out = self.outcome, counted(self.num_failed, "sequence")
        size = f"{counted(outcome.num_tokens, 'token')} of {counted(outcome.num_sequences, 'sequence')}"
        if outcome.num_tokens == 0:
            nothing = "no sequence is on both sides" if self.num_unmatched else "no sequence has a response token"
            failed = f"{left_out} could not be, and no other has a response token"
            return f"nothing was compared: {failed if self.num_failed else nothing}"
        if self.exceeded:
            return f"the sides differ on {size}: {'; '.join(self.exceeded)}{_worst_place(outcome)}"
        left = f"; {left_out} could not be compared" if self.num_failed else ""
        if outcome.equal:
            return f"the sides agree bit for bit on {size}{left}"
        largest = outcome.metrics["align/logp_abs_diff/max"]
        rest = f"tokens whose bits differ: {outcome.mismatch_count:,}, max |Δ| {largest:.3g}"
        return f"the sides agree within the thresholds on {size} ({rest}){left}"


def not_finite(count: int, trains: int, *, scored: bool) -> list[str]:
    """How many log-probs are missing or not finite, and whose they are. trains: of ``count``, those that are finite in
    the rollout. scored: train is a model's forward."""
    found = []
    if rest := count - trains:
        found.append(f"{counted(rest, 'log-prob')}{' of the dump' if scored else ''} {are(rest)} missing or not finite")
    if trains and scored:
        found.append(
            f"{counted(trains, 'log-prob')} of the model {are(trains)} not finite where the dump's {are(trains)} "
            "(-inf: a token beyond what top-k, top-p or min-p leave of the model's own logits)"
        )
    elif trains:
        found.append(f"{counted(trains, 'log-prob')} of train {are(trains)} not finite where rollout's {are(trains)}")
    return found


def show(verdict: Verdict, console: Console, decode: Decode | None = None) -> None:
    """Print table, worst tokens, sequences that don't match or were not compared, notes and, last, the verdict."""
    for side, name in zip(("rollout", "train"), verdict.sides, strict=True):
        console.print(f"{side + ':':<8} {name}", markup=False, soft_wrap=True)
    if verdict.outcome.num_tokens:
        console.print(_summary(verdict))
    if verdict.outcome.worst:
        console.print(_worst_table(verdict, decode))
    for what, named, count in (
        ("doesn't match", verdict.unmatched, verdict.num_unmatched),
        ("was not compared", verdict.failed, verdict.num_failed),
    ):
        for _, name, reason in named[:_NAMED]:
            why = reason.removeprefix(f"{name}: ")
            console.print(f"sequence {name} {what}: {why}", markup=False, soft_wrap=True)
        if count > _NAMED:
            console.print(f"... and {count - _NAMED:,} more", markup=False)
    for note in verdict.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    style = "green" if verdict.exit_code == EXIT_EQUAL else "red"
    console.print(verdict.line, markup=False, soft_wrap=True, style=style)


def write_json(verdict: Verdict, path: Path, decode: Decode | None = None) -> None:
    """All of it as strict JSON; NaN and infinities are strings."""
    outcome = verdict.outcome
    content = {
        "exit_code": verdict.exit_code,
        "equal": verdict.exit_code == EXIT_EQUAL and outcome.equal,
        "verdict": verdict.line,
        "exceeded": verdict.exceeded,
        "sides": list(verdict.sides),
        "num_sequences": outcome.num_sequences,
        "num_tokens": outcome.num_tokens,
        "num_missing": outcome.missing_count,
        "metrics": outcome.metrics,
        "worst_tokens": [token.record() | {"context": context(token, decode)} for token in outcome.worst],
        "num_unmatched": verdict.num_unmatched,
        "unmatched": [{"id": one.id, "reason": one.reason} for one in verdict.unmatched],
        "num_failed": verdict.num_failed,
        "failed": [{"id": one.id, "error": one.reason} for one in verdict.failed],
        "notes": list(verdict.notes),
        **verdict.facts,
    }
    path.write_text(json.dumps(to_json(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_page(verdict: Verdict, path: Path, decode: Decode | None = None) -> None:
    """The page for ``--html``."""
    from rlalign.cli.html import HtmlOutcome, write_html
    from rlalign.dashboards.page import Table as PageTable

    pictures = verdict.pictures
    if pictures is not None:
        pictures = replace(pictures, worst=tuple(_picture_record(token, decode) for token in verdict.outcome.worst))
    named = [
        (title, rows)
        for title, rows in (("sequences that don't match", verdict.unmatched), ("not compared", verdict.failed))
        if rows
    ]
    page = HtmlOutcome(
        title=" against ".join(verdict.sides),
        verdict=verdict.line,
        good=verdict.exit_code == EXIT_EQUAL,
        facts={"rollout": verdict.sides[0], "train": verdict.sides[1], **_counts(verdict), **verdict.facts},
        metrics=verdict.outcome.metrics if verdict.outcome.num_tokens else {},
        pictures=pictures,
        tables=[
            ("Agreement", PageTable(title, ["sequence", "why"], [list(row[1:]) for row in rows]))
            for title, rows in named
        ],
    )
    write_html(page, path)


def context(token: TokenDifference, decode: Decode | None) -> str:
    """The token between brackets, with a few tokens on either side; newlines made visible."""
    parts = (token.before, (token.token_id,), token.after)
    text = decode or (lambda ids: f" {' '.join(map(str, ids))} ")
    before, middle, after = (text(list(part)) if part else "" for part in parts)
    return f"{before}⟦{middle}⟧{after}".replace("\n", "⏎")


def _summary(verdict: Verdict) -> Table:
    table = Table()
    table.add_column("rollout against train")
    table.add_column("", justify="right")
    for name, value in _counts(verdict).items():
        table.add_row(name, value)
    for name in _SHOWN:
        table.add_row(name, f"{verdict.outcome.metrics[f'align/{name}']:.9g}")
    seconds = verdict.facts.get("seconds", {})
    table.add_row("seconds", ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items()))
    return table


def _counts(verdict: Verdict) -> dict[str, str]:
    outcome = verdict.outcome
    values = {"sequences": f"{outcome.num_sequences:,}", "response tokens": f"{outcome.num_tokens:,}"}
    if outcome.missing_count:
        values["of them missing a log-prob"] = f"{outcome.missing_count:,}"
    if verdict.num_unmatched:
        values["sequences that don't match"] = f"{verdict.num_unmatched:,}"
    return values


def _worst_table(verdict: Verdict, decode: Decode | None) -> Table:
    worst = verdict.outcome.worst
    title = f"Worst {len(worst)} of {counted(verdict.outcome.mismatch_count, 'differing token')}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("sequence", overflow="fold", max_width=24)
    table.add_column("pos", justify="right", no_wrap=True)
    table.add_column("token in context", overflow="fold", ratio=1)
    for name in ("rollout\ntrain", "Δ\nULP"):
        table.add_column(name, justify="right", no_wrap=True)
    for token in worst:
        version = "" if token.weights_version is None else f", weights {token.weights_version}"
        details = f"of {token.sequence_length}{version}, {token.finish_reason or 'end unknown'}"
        table.add_row(
            escape(_short(token)),
            str(token.position),
            f"{escape(context(token, decode))}\n[dim]{escape(details)}[/dim]",
            # float32 needs nine digits to be told apart from its neighbours
            f"{token.rollout:.9g}\n{token.train:.9g}",
            f"{token.delta:+.2e}\n{shown_ulp(token.ulp)}" if token.kind == "differs" else token.kind,
        )
    return table


def _worst_place(outcome: Outcome) -> str:
    if not outcome.worst:
        return ""
    token = outcome.worst[0]
    what = f"Δ {token.delta:+.3g} ({token.ulp:,} ULP)" if token.kind == "differs" else token.kind
    place = "" if token.name == token.source else f" ({token.source})"
    return f"; worst: sequence {token.name} position {token.position}, token {token.token_id}{place}: {what}"


def _short(token: TokenDifference) -> str:
    """The sequence's name in a narrow column: of a place, the file's name without its folders."""
    return Path(token.name).name if token.name == token.source else token.name


def _picture_record(token: TokenDifference, decode: Decode | None) -> dict[str, Any]:
    """With the names that every other table of worst tokens has."""
    record = {"kind": token.kind, "key": _short(token), "position": token.position, "token_id": token.token_id}
    record["context"] = context(token, decode)
    record |= {name: getattr(token, name) for name in ("rollout", "train", "delta", "ulp", "sequence_length")}
    # what no dump says of a token's batch, and what this one doesn't say, is blank
    return record | {"batch_size": None, "weights_version": token.weights_version, "finish_reason": token.finish_reason}
