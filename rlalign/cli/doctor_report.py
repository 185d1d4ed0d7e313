"""What the doctor found: records for programs, tables for people."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rlalign_kernels.conformance import Verdict

from rlalign.cli.errors import EXIT_DIFFERENT, EXIT_EQUAL, EXIT_UNUSABLE

_SHOWN_VERSIONS = ("python", "torch", "triton", "transformers")
_MARKS = {True: "[green]holds[/]", False: "[red]does not[/]", None: "[yellow]not there[/]"}
_SHA_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Operator:
    """All verdicts on one operator, of every shape."""

    name: str
    verdicts: tuple[Verdict, ...]

    @property
    def holds(self) -> bool | None:
        """False if any claim does not hold, None if nothing was looked at."""
        found = [verdict.holds for verdict in self.verdicts]
        return False if False in found else True if True in found else None

    @property
    def seconds(self) -> float:
        return sum(verdict.seconds for verdict in self.verdicts)

    def line(self) -> str:
        """What was looked at and in how many cases; where that does not hold, in how many, and the first of them."""
        claims: dict[str, Verdict] = {}
        for verdict in self.verdicts:
            seen = claims.get(verdict.claim)
            claims[verdict.claim] = verdict if seen is None else _both(seen, verdict)
        bad = [verdict for verdict in claims.values() if verdict.holds is False]
        if bad:
            return f"{', '.join(f'{v.claim} {v.num_differing}/{v.num_cases}' for v in bad)}: {bad[0].found}"
        if self.holds is None:
            return self.verdicts[0].found
        return ", ".join(f"{v.claim} {v.num_cases if v.holds else 'not there'}" for v in claims.values())


def _both(a: Verdict, b: Verdict) -> Verdict:
    """Two shapes of one claim."""
    return replace(
        a,
        holds=False if False in (a.holds, b.holds) else a.holds or b.holds,
        num_cases=a.num_cases + b.num_cases,
        num_differing=a.num_differing + b.num_differing,
        found=a.found or b.found,
    )


@dataclass(frozen=True, slots=True)
class Outcome:
    """Everything one run found. facts: machine, versions, fingerprints, settings, schedules; plain JSON."""

    operators: tuple[Operator, ...]
    facts: Mapping[str, Any]

    @property
    def broken(self) -> list[str]:
        return [operator.name for operator in self.operators if operator.holds is False]

    @property
    def exit_code(self) -> int:
        if self.broken:
            return EXIT_DIFFERENT
        return EXIT_EQUAL if any(operator.holds for operator in self.operators) else EXIT_UNUSABLE

    @property
    def verdict(self) -> str:
        backend, seen = self.facts["backend"], [operator for operator in self.operators if operator.holds is not None]
        if not seen:
            return f"Nothing could be checked: backend {backend} has none of these operators here"
        if self.broken:
            return f"Bits do not hold here with backend {backend}: {', '.join(self.broken)}"
        return f"All {len(seen)} operators keep their bits here with backend {backend}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        operators = [
            {"operator": one.name, "holds": one.holds, "claims": [asdict(verdict) for verdict in one.verdicts]}
            for one in self.operators
        ]
        head = {"exit_code": self.exit_code, "holds": self.exit_code == EXIT_EQUAL, "verdict": self.verdict}
        return head | dict(self.facts) | {"operators": operators}


def grouped(verdicts: Sequence[Verdict]) -> tuple[Operator, ...]:
    """By operator, in order of first appearance."""
    names = list(dict.fromkeys(verdict.operator for verdict in verdicts))
    ordered = sorted(verdicts, key=lambda verdict: names.index(verdict.operator))
    return tuple(Operator(name, tuple(found)) for name, found in groupby(ordered, key=lambda v: v.operator))


def show(outcome: Outcome, console: Console) -> None:
    """Machine, schedules, one line per operator, and last the verdict."""
    console.print(_machine(outcome.facts))
    if outcome.facts["schedules"]:
        console.print(_schedules(outcome.facts))
    console.print(_operators(outcome))
    style = "green" if outcome.exit_code == EXIT_EQUAL else "red"
    console.print(outcome.verdict, style=style, markup=False, soft_wrap=True)


def _machine(facts: Mapping[str, Any]) -> Table:
    table = Table(title="Machine", title_justify="left", show_header=False)
    for name, value in facts["machine"].items():
        table.add_row(name, escape(str(value)))
    versions = facts["versions"]
    table.add_row("versions", ", ".join(f"{name} {versions[name]}" for name in _SHOWN_VERSIONS if name in versions))
    for backend, found in facts["fingerprints"].items():
        table.add_row(f"fingerprint, {backend}", found["sha256"][:_SHA_DIGITS])
    return table


def _schedules(facts: Mapping[str, Any]) -> Table:
    table = Table(title="Schedules, which change no bit", title_justify="left")
    if facts["backend"] == "reference":
        table.add_column("measured here")
        table.add_column("products")
        for kind, line in _measured(facts["schedules"]):
            table.add_row(kind, line)
        return table
    for column in ("operator", "rows or part", "schedule"):
        table.add_column(column)
    for name, schedules in facts["schedules"].items():
        for index, (part, tile) in enumerate(schedules.items()):
            table.add_row(name if index == 0 else "", part, escape(_short(str(tile))))
    return table


def _short(tile: str) -> str:
    """Without what is off."""
    return re.sub(r", \w+=(False|0)\b", "", tile).replace("block_", "").replace("num_", "")


def _measured(schedules: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The reference's verdicts in a few lines; --json has them all."""
    lines = []
    for key, found in schedules.items():
        kind, *shape = key.split(",")
        if kind == "gemm":
            rows = found["rows"]
            text = f"tiles of {found['base']} rows; the same bits with {', '.join(rows[:4])}"
            lines.append((f"product {shape[0]} x {shape[1]}", f"{text}, … ({len(rows)} in all)" if rows[4:] else text))
    batched = sum(key.startswith("bmm,") for key in schedules)
    functions = [key.split(",")[1] for key, found in schedules.items() if key.startswith("elementwise,") and found]
    if batched:
        lines.append(("attention", f"{batched} batched products measured"))
    if functions:
        lines.append(("unblocked", ", ".join(functions)))
    return lines


def _operators(outcome: Outcome) -> Table:
    facts = outcome.facts
    where = f"{facts['backend']}, {facts['dtype']}, {facts['device']}"
    table = Table(title=f"Do bits hold here? {where}; shapes of {facts['shapes_of']}", title_justify="left")
    table.add_column("operator")
    table.add_column("bits")
    table.add_column("cases looked at; or how many differ, and the first", overflow="fold")
    table.add_column("seconds", justify="right")
    for operator in outcome.operators:
        table.add_row(operator.name, _MARKS[operator.holds], escape(operator.line()), f"{operator.seconds:.1f}")
    return table
