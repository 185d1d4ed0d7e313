"""``rlalign-verify preflight``: what in two configurations will make log-probs differ, before a GPU is rented.

Reads rlalign's own settings, and plain YAML of verl's, TRL's or vLLM's arguments. Nothing is loaded or run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlalign.cli.dump_options import check_outputs
from rlalign.cli.near import did_you_mean
from rlalign.verifier.words import counted

if TYPE_CHECKING:
    from rlalign.verifier.preflight import Finding, Side

_FORMATS = ("rlalign", "verl", "trl", "vllm")
_COLORS = {"wrong": "bold red", "differs": "yellow", "note": "dim"}
_NAMED_KEYS = 12


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add this subcommand; returns its parser."""
    description = __doc__.partition(": ")[2] + " Exit codes: 0 no finding, 1 findings, 2 unusable input."
    parser = subparsers.add_parser("preflight", help="read two configurations and list what will differ",
                                   description=description)  # fmt: skip
    parser.set_defaults(run=run)
    parser.add_argument("config", nargs="?", type=Path, metavar="FILE", help="one file that describes both sides")
    parser.add_argument("--rollout", type=Path, metavar="FILE", help="YAML of the rollout engine's settings")
    parser.add_argument("--train", type=Path, metavar="FILE", help="YAML of the trainer's settings")
    for side in ("rollout", "train"):
        parser.add_argument(f"--{side}-format", choices=_FORMATS, help="default: told by content")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the findings as JSON")
    parser.add_argument("--html", type=Path, metavar="OUT", help="also write them as a page that opens offline")
    return parser


def run(args: argparse.Namespace) -> int:
    """The whole subcommand; returns the exit code. Raises ValueError for files that can't be used."""
    from rich.console import Console

    from rlalign.cli.errors import EXIT_DIFFERENT, EXIT_EQUAL
    from rlalign.cli.html import write_html
    from rlalign.verifier.preflight import check

    check_outputs(args)
    rollout, train, unused = _sides(args)
    findings = check(rollout, train)
    code = EXIT_DIFFERENT if findings else EXIT_EQUAL
    _show(findings, rollout, train, unused, Console())
    if args.json is not None:
        content = _content(findings, rollout, train, unused) | {"exit_code": code}
        args.json.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    if args.html is not None:
        write_html(_page(findings, rollout, train, unused), args.html)
    return code


def _sides(args: argparse.Namespace) -> tuple[Side, Side, str | None]:
    """(rollout, train, what of the files was not used)."""
    from rlalign.verifier.preflight import read_sides, with_requests

    if args.config is not None:
        if args.rollout or args.train:
            raise ValueError("preflight takes one FILE that describes both sides, or --rollout and --train")
        if args.rollout_format != args.train_format and args.rollout_format and args.train_format:
            raise ValueError("one FILE has one format: --rollout-format and --train-format differ")
        sides = read_sides(args.config, format=args.rollout_format or args.train_format)
        if "train" not in sides:
            raise ValueError(f"{args.config}: only an engine's settings: give the trainer's too, --rollout and --train")
        return sides["rollout"], sides["train"], None
    if args.rollout is None or args.train is None:
        raise ValueError("preflight needs one FILE that describes both sides, or --rollout FILE and --train FILE")
    ours = read_sides(args.rollout, format=args.rollout_format)
    theirs = read_sides(args.train, format=args.train_format)
    if "train" not in theirs:
        raise ValueError(f"{args.train}: read as an engine's settings; --train needs a trainer's (rlalign, verl, trl)")
    # a trainer's file often describes an engine too: whoever names another file for it means that one
    rollout, unused = with_requests(ours["rollout"], theirs["rollout"]), None
    if args.rollout != args.train:
        unused = f"the rollout that {args.train} describes too is not looked at"
        if rollout is not ours["rollout"]:
            unused += ", but for the sampling parameters, which go with each request"
    return rollout, theirs["train"], unused


def _show(findings: list[Finding], rollout: Side, train: Side, unused: str | None, console: Any) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"rollout {rollout.name}, train {train.name}", title_justify="left", box=box.SIMPLE_HEAD)
    for name, ratio in (("", None), ("setting\nrollout / train", 2), ("why, and what to set", 3)):
        table.add_column(name, ratio=ratio, overflow="fold")
    for one in findings:
        values = Text.assemble((one.setting, "bold"), f"\n{one.rollout} / {one.train}")
        words = Text.assemble(one.why, "\n", (f"→ {one.remedy}", "bold"))
        table.add_row(Text(one.severity, style=_COLORS[one.severity]), values, words)
    if findings:
        console.print(table)
    for line in _remarks(rollout, train, unused):
        console.print(line, markup=False, soft_wrap=True, style="dim")
    console.print(_verdict(findings), soft_wrap=True, style="red" if findings else "green")


def _remarks(rollout: Side, train: Side, unused: str | None) -> list[str]:
    """What was not compared, and why; nothing of a file is left out without a word."""
    from rlalign.verifier.preflight import not_stated

    lines = []
    if silent := not_stated(rollout, train):
        lines.append("not compared, as one side doesn't say: " + ", ".join(f"{n} ({who})" for n, who in silent))
    for side in dict.fromkeys((rollout.name, train.name)):
        one = rollout if side == rollout.name else train
        keys = [f"{key}{_meant(key, one.known)}" for key in one.not_judged]
        if keys:
            more = f" and {len(keys) - _NAMED_KEYS} more (--json lists all)" if len(keys) > _NAMED_KEYS else ""
            lines.append(f"not judged in {side}: {', '.join(keys[:_NAMED_KEYS])}{more}")
    return [*lines, *([unused] if unused else [])]


def _meant(key: str, known: Sequence[str]) -> str:
    """`` (did you mean NAME?)`` for a key that is near another of the same object, which the file doesn't have."""
    group, _, name = key.rpartition(".")
    beside = [one.rpartition(".")[2] for one in known if one.rpartition(".")[0] == group]
    hint = did_you_mean(name.replace("-", "_"), beside)
    return f" ({hint.removeprefix('; ')})" if hint else ""


def _verdict(findings: list[Finding]) -> str:
    if not findings:
        return "nothing found that would make log-probs differ"
    counts = {severity: sum(one.severity == severity for one in findings) for severity in _COLORS}
    parts = ", ".join(f"{count} {severity}" for severity, count in counts.items() if count)
    return (
        f"{counted(len(findings), 'finding')}: {parts} (wrong: other numbers; differs: other bits; note: worth knowing)"
    )


def _content(findings: list[Finding], rollout: Side, train: Side, unused: str | None) -> dict[str, Any]:
    from rlalign.verifier.preflight import not_stated

    return {
        "verdict": _verdict(findings),
        "rollout": rollout.name,
        "train": train.name,
        "findings": [asdict(one) for one in findings],
        "not_stated": [{"setting": name, "by": who} for name, who in not_stated(rollout, train)],
        "not_judged": {side.name: list(side.not_judged) for side in (rollout, train)},
        "harmless": {side.name: list(side.harmless) for side in (rollout, train)},
        "unused": unused,
    }


def _page(findings: list[Finding], rollout: Side, train: Side, unused: str | None) -> Any:
    from rlalign.cli.html import HtmlOutcome
    from rlalign.dashboards.page import Table

    columns = ("severity", "setting", "rollout", "train", "why", "what to set")
    rows = [[one.severity, one.setting, one.rollout, one.train, one.why, one.remedy] for one in findings]
    rest = [
        [side, key] for side, keys in _content(findings, rollout, train, unused)["not_judged"].items() for key in keys
    ]
    tables = [Table("findings", columns, rows), Table("not judged", ("file", "key"), rest)]
    return HtmlOutcome(
        title="preflight",
        verdict=_verdict(findings),
        good=not findings,
        facts={"rollout": rollout.name, "train": train.name, "remarks": "\n".join(_remarks(rollout, train, unused))},
        tables=[("Agreement", table) for table in tables if table.rows],
    )
