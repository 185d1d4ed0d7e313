"""``rlalign-verify replay``: a step on which rollout and trainer differed, computed once more from what the run kept.

Scores the step's tokens with the trainer's weights of that moment, generates its samples again from their seeds, and
says which side still gives what it gave: what can't be reproduced was a fault of that side, in that process.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlalign.cli.dump_options import check_outputs, count

if TYPE_CHECKING:
    from rlalign.cli.replay import Replay


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add this subcommand; returns its parser."""
    description = (
        __doc__.partition(": ")[2]
        + " Exit codes: 1 the sides differ again, 0 they agree this time, 2 unusable input or "
        "nothing compared."
    )
    parser = subparsers.add_parser("replay", help="compute a step that differed once more", description=description)
    parser.set_defaults(run=run)
    parser.add_argument("file", type=Path, metavar="FILE", help="replay.json, or its folder, of a run's mismatches/")
    parser.add_argument("--model", type=Path, metavar="DIR", help="weights to use in place of the kept ones")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the run's own setting")
    parser.add_argument("--worst", type=count, default=10, metavar="K", help="tokens in the table of the worst")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result as JSON")
    parser.add_argument("--html", type=Path, metavar="OUT", help="also write a page with pictures that opens offline")
    return parser


def run(args: argparse.Namespace) -> int:
    """The whole subcommand; returns the exit code. Raises ValueError for a file that can't be used."""
    from rich.console import Console

    from rlalign.cli.html import write_html
    from rlalign.cli.replay import read_step, replay
    from rlalign.dashboards.jsonl import to_json

    check_outputs(args)
    result = replay(read_step(args.file), model=args.model, device=args.device, worst=args.worst)
    _show(result, Console())
    if args.json is not None:
        text = json.dumps(to_json(result.content()), indent=2, allow_nan=False)
        args.json.write_text(text + "\n", encoding="utf-8")
    if args.html is not None:
        write_html(_page(result), args.html)
    return result.exit_code


def _show(result: Replay, console: Any) -> None:
    from rich.table import Table

    table = Table(title=str(result.path), title_justify="left")
    for name in ("", "tokens", "differ", "max |Δ|"):
        table.add_column(name, justify="left" if not name else "right")
    for name, comparison in result.comparisons():
        table.add_row(
            name, f"{comparison.num_tokens:,}", f"{comparison.mismatch_count:,}", f"{comparison.max_abs_delta:.3g}"
        )
    console.print(table)
    if result.report.worst:
        console.print(result.report.table())
    for line in result.remarks:
        console.print(line, markup=False, soft_wrap=True)
    console.print(result.verdict, markup=False, soft_wrap=True, style="red" if result.exit_code else "green")


def _page(result: Replay) -> Any:
    from rlalign.cli.html import HtmlOutcome
    from rlalign.dashboards.page import Table

    rows = [[name, c.num_tokens, c.mismatch_count, c.max_abs_delta] for name, c in result.comparisons()]
    return HtmlOutcome(
        title=f"replay of {result.path}",
        verdict=result.verdict,
        good=result.exit_code == 0,
        facts={"then": result.then} | ({"remarks": "\n".join(result.remarks)} if result.remarks else {}),
        pictures=result.pictures,
        tables=[("Agreement", Table("then and now", ["", "tokens", "differ", "max |Δ|"], rows))],
    )
