"""What an attribution shows: a table for people, JSON for programs, a page for both."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from rlalign.dashboards.jsonl import to_json
from rlalign.verifier.attribution import Attribution, Effect, Step, rounding_line
from rlalign.verifier.dumps import DumpSequence
from rlalign.verifier.residue import Finding
from rlalign.verifier.words import counted

if TYPE_CHECKING:
    from rlalign.dashboards.page import Chart
    from rlalign.dashboards.page import Table as PageTable

_NOTABLE = 0.01
# of sequences, places and reasons; causes in a line; characters of a reason
_NAMED, _CAUSES, _REASON = 5, 12, 120
# how reasons begin that say: this dump, or this model, is the same with and without
_NO_EFFECT = ("changes no", "no sequence of the dump", "the log-probs are taken", "raw log-probs don't depend")

_NEXT = (
    "what is left: docs/disagree.md lists what scoring can't imitate (6. Nothing fits); of a checkpoint with what the "
    "engine held, rlalign-verify bisect --b model=DIR names the first layer that differs"
)


def show(
    outcome: Attribution, facts: dict[str, Any], sequences: Sequence[DumpSequence], console: Console, worst: int
) -> None:
    """Print the causes that were tried, those that were kept with what removes them, what is left and, last, the
    verdict."""
    title = f"{facts['dump']} against {facts['model']} ({facts['numerics']}, {facts['dtype']})"
    if outcome.effects:
        console.print(_alone(outcome, title, worst))
    if outcome.steps:
        console.print(_kept(outcome))
    for line in _lines(outcome, facts, sequences):
        console.print(line, markup=False, soft_wrap=True)
    good = facts["exit_code"] == 0
    if facts["exceeded"]:
        console.print(f"the difference as a whole: {'; '.join(facts['exceeded'])}", markup=False, soft_wrap=True)
    if not good and outcome.rest.mismatches and not outcome.explained:
        console.print(_NEXT, soft_wrap=True)
    within = "within the thresholds: " if good and not outcome.equal else ""
    style = f"bold {'green' if good else 'red'}"
    console.print(f"\n{within}{outcome.verdict}", markup=False, highlight=False, soft_wrap=True, style=style)


def write_json(outcome: Attribution, facts: dict[str, Any], sequences: Sequence[DumpSequence], path: Path) -> None:
    """All of it as strict JSON; NaN and infinities are strings."""
    text = json.dumps(to_json(record(outcome, facts, sequences)), indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def record(outcome: Attribution, facts: dict[str, Any], sequences: Sequence[DumpSequence]) -> dict[str, Any]:
    """The outcome as plain values."""
    return {
        "equal": outcome.equal,
        "explained": outcome.explained,
        "verdict": outcome.verdict,
        **facts,
        "metrics": dict(outcome.metrics),
        "base": asdict(outcome.base),
        "rest": asdict(outcome.rest),
        "causes": [_step(step, sequences) for step in outcome.steps],
        "nearest": None if outcome.nearest is None else _step(outcome.nearest, sequences),
        "alone": [_effect(effect) for effect in outcome.effects],
        "rounding": None if outcome.rounding is None else asdict(outcome.rounding),
        "broken": [_found(finding, sequences) for finding in outcome.broken],
        "findings": [_found(finding, sequences) for finding in outcome.findings],
    }  # fmt: skip


def write_page(outcome: Attribution, facts: dict[str, Any], sequences: Sequence[DumpSequence], path: Path) -> None:
    """The page with the causes in the section "Where", and the pictures before and after them."""
    from rlalign.cli.html import HtmlOutcome, write_html
    from rlalign.dashboards.page import Table as PageTable

    kept = [
        [step.cause.name, step.cause.what, f"{step.before.mean_abs:.4g}", f"{step.after.mean_abs:.4g}",
         f"{step.after.mismatches:,}", step.cause.remedy]
        for step in outcome.steps
    ]  # fmt: skip
    tried = [
        [e.cause.name, e.cause.what, _removes(e), f"{e.after.mean_abs:.4g}", f"{e.after.mismatches:,}",
         f"{e.moves:.4g}"]
        for e in _tried(outcome)
    ]  # fmt: skip
    skipped = [[e.cause.name, e.cause.what, e.skipped] for e in outcome.effects if e.skipped is not None]
    left = [[f.name, f.what, f"{f.tokens:,}", _places(f, sequences)] for f in (*outcome.broken, *outcome.findings)]
    failed = [[one["id"], one["error"]] for one in facts["failed"]]
    tables = [
        PageTable("not compared", ["sequence", "why"], failed),
        PageTable("causes", ["cause", "what", "mean |Δ| before", "after", "differing after", "what removes it"], kept),
        PageTable("left", ["finding", "what", "tokens", "where"], left),
        PageTable("every cause alone", ["cause", "what", "removes", "mean |Δ|", "differing", "moves by"], tried),
        PageTable("not tried, or without effect here", ["cause", "what", "why"], skipped),
    ]
    page = HtmlOutcome(
        title=f"Attribution of {facts['dump']}",
        verdict=outcome.verdict,
        good=facts["exit_code"] == 0,
        facts={
            name: ", ".join(value) if isinstance(value, list) else value
            for name, value in facts.items()
            if value and name != "failed"
        },
        metrics=outcome.metrics if outcome.num_tokens else {},
        charts=[("Agreement", block) for block in _pictures(outcome)],
        tables=[("Where", table) for table in tables if table.rows],
    )
    write_html(page, path)


def _pictures(outcome: Attribution) -> Iterator[Chart | PageTable]:
    from rlalign.dashboards.blocks import picture_blocks
    from rlalign.dashboards.pictures import PictureData
    from rlalign.dashboards.snapshot import take_snapshot

    for name, one in zip(("as the dump says", "with all causes"), outcome.compared, strict=False):
        if one.num_tokens:
            data = PictureData(one.rollout, one.train, one.delta, one.nonfinite, (), position=one.position)
            yield from picture_blocks(name, {0: take_snapshot(data)})


def _alone(outcome: Attribution, title: str, worst: int) -> Table:
    table = Table(title=f"{title}\nEach cause alone", title_justify="left")
    table.add_column("cause", overflow="fold")
    for name in ("removes", "mean |Δ|", "differing", "moves by"):
        table.add_column(name, justify="right")
    base = outcome.base
    table.add_row("as the dump says", "", f"{base.mean_abs:.4g}", f"{base.mismatches:,} of {base.tokens:,}", "")
    for effect in _tried(outcome)[:worst]:
        if effect.removes <= 0:  # nor do those that follow; the page and --json have them
            break
        after = effect.after
        table.add_row(
            effect.cause.name,
            _removes(effect),
            f"{after.mean_abs:.4g}",
            f"{after.mismatches:,} of {after.tokens:,}",
            f"{effect.moves:.3g}",
        )
    return table


def _kept(outcome: Attribution) -> Table:
    table = Table(title="Together, the largest first", title_justify="left")
    table.add_column("cause", overflow="fold")
    for name in ("mean |Δ|", "differing"):
        table.add_column(name, justify="right")
    table.add_column("what removes it", overflow="fold", ratio=1)
    for step in outcome.steps:
        numbers = f"{step.before.mean_abs:.3g} → {step.after.mean_abs:.3g}"
        differing = f"{step.before.mismatches:,} → {step.after.mismatches:,}"
        table.add_row(step.cause.name, numbers, differing, step.cause.remedy)
    return table


def _lines(outcome: Attribution, facts: dict[str, Any], sequences: Sequence[DumpSequence]) -> Iterator[str]:
    failed = facts["failed"]
    for one in failed[:_NAMED]:
        yield f"sequence {one['id']} was not compared: {one['error']}"
    if len(failed) > _NAMED:
        yield f"... and {len(failed) - _NAMED:,} more were not"
    yield from _not_tried(outcome)
    for effect in _tried(outcome):
        if effect.same_as is not None and effect.removes > _NOTABLE:
            yield f"{effect.cause.name} gives the very same log-probs as {effect.same_as}: can't be told apart here"
    yield from _re_encoding(facts)
    for finding in (*outcome.broken, *outcome.findings):
        yield f"{finding.name}: {counted(finding.tokens, 'token')}, {_places(finding, sequences)}"
    if outcome.rounding is not None:
        yield f"rounding: {rounding_line(outcome.rest, outcome.rounding)}"
    for note in facts["notes"]:
        yield f"note: {note}"


def _re_encoding(facts: dict[str, Any]) -> Iterator[str]:
    trips = facts["round_trips"] or {}
    parts = (("prompt", trips.get("prompts_that_do_not", 0)), ("response", trips.get("responses_that_do_not", 0)))
    found = [counted(count, part) for part, count in parts if count]
    if found:
        yield (
            f"{' and '.join(found)} of {counted(facts['sequences'], 'sequence')} would become other tokens if decoded "
            "and encoded again: hand token ids on, not text"
        )


def _not_tried(outcome: Attribution) -> Iterator[str]:
    """A line a reason, the first few; --json has every cause's own."""
    idle: list[str] = []
    reasons: dict[str, list[str]] = {}
    for effect in outcome.effects:
        if effect.skipped is not None:
            same = effect.skipped.startswith(_NO_EFFECT)
            (idle if same else reasons.setdefault(effect.skipped, [])).append(effect.cause.name)
    if idle:
        yield f"no effect here: {_few(idle, _CAUSES)}"
    shown = list(reasons.items())[:_NAMED]
    for reason, names in shown:
        yield f"not tried: {_few(names, _CAUSES)}: {textwrap.shorten(reason, _REASON, placeholder=' … (--json)')}"
    if len(reasons) > len(shown):
        yield f"not tried: {sum(map(len, list(reasons.values())[_NAMED:])):,} more (--json says why)"


def _few(names: Sequence[str], most: int) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _removes(effect: Effect) -> str:
    # a cause that isn't there makes everything worse, and how much so says nothing
    return f"{effect.removes:.1%}" if effect.removes > -1 else "none"


def _tried(outcome: Attribution) -> list[Effect]:
    """Causes that were tried, those that remove most first."""
    return sorted((e for e in outcome.effects if e.skipped is None), key=lambda e: -e.removes)


def _effect(effect: Effect) -> dict[str, Any]:
    cause = {name: getattr(effect.cause, name) for name in ("name", "kind", "what", "remedy")}
    if effect.skipped is not None:
        return cause | {"skipped": effect.skipped}
    return cause | {
        "removes": effect.removes,
        "before": asdict(effect.before),
        "after": asdict(effect.after),
        "moves": effect.moves,
        "same_as": effect.same_as,
    }


def _step(step: Step, sequences: Sequence[DumpSequence]) -> dict[str, Any]:
    return {
        **{name: getattr(step.cause, name) for name in ("name", "kind", "what", "remedy")},
        "before": asdict(step.before),
        "after": asdict(step.after),
        "sequences": None if step.sequences is None else [_named(sequences, place) for place in step.sequences],
    }


def _found(finding: Finding, sequences: Sequence[DumpSequence]) -> dict[str, Any]:
    where = [{**_named(sequences, place), "position": position} for place, position in finding.where[:_NAMED]]
    return {"name": finding.name, "what": finding.what, "tokens": finding.tokens, "where": where}


def _places(finding: Finding, sequences: Sequence[DumpSequence]) -> str:
    """The first few of the sequences that it is of, or of the ranges of its tokens, and how much there is beside."""
    if finding.name == "sequence":
        places = dict.fromkeys(place for place, _ in finding.where)
        return _few([sequences[place].source or str(place) for place in places], _NAMED)
    ranges = _ranges(finding.where)[:_NAMED]
    named = [
        f"{sequences[place].source or place} position" + (f" {first}" if first == last else f"s {first}-{last}")
        for place, first, last in ranges
    ]
    more = finding.tokens - sum(last - first + 1 for _, first, last in ranges)
    return ", ".join(named) + (f" and {more:,} more" if more else "")


def _ranges(where: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(place, first position, last position) of tokens in a row."""
    found: list[tuple[int, int, int]] = []
    for place, position in where:
        if found and found[-1][::2] == (place, position - 1):
            found[-1] = (place, found[-1][1], position)
        else:
            found.append((place, position, position))
    return found


def _named(sequences: Sequence[DumpSequence], place: int) -> dict[str, Any]:
    return {"place": place, "id": sequences[place].id, "source": sequences[place].source}
