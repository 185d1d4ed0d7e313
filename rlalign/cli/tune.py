"""``scripts/tune.py``: the fastest schedules of this GPU for a model's shapes, as a table that a run can be given.

Candidates of the operators' schedule spaces are timed in turns in one run; a winner must give the default schedule's
bits in float32 before it is written. No schedule can change a bit, so a table changes speed only. It is read where
``RLALIGN_TUNED`` names it, or ``doctor.py --tuned``; never by itself.
Exit codes: 0 table written, 1 written, but a candidate had other bits, 2 unusable input or no GPU, 3 internal error.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlalign.cli.errors import EXIT_DIFFERENT, EXIT_EQUAL, run_main
from rlalign.cli.parser import Parser

if TYPE_CHECKING:
    import torch

    from rlalign.cli.tune_problems import Problem
    from rlalign.cli.tune_search import Found, Measure

_ROWS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
# A decode's rows: more of them draw in parts.
_MOST_DRAWN = 512
_DTYPES = ("bfloat16", "float16", "float32")
_OPERATORS = ("linear", "logprob", "sample")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="tune.py", description="The fastest schedules of this GPU for a model's shapes.")
    parser.add_argument("--model", type=Path, metavar="PATH", help="a checkpoint folder or config.json")
    parser.add_argument(
        "--shapes", nargs="+", type=_pair, default=[], metavar="NxK", help="linear layers, as 6144x2048"
    )
    parser.add_argument("--head", type=_pair, metavar="VxH", help="the output layer, as 151936x2048")
    parser.add_argument("--operators", nargs="+", choices=_OPERATORS, default=list(_OPERATORS), metavar="NAME",
                        help=f"{', '.join(_OPERATORS)} (default: all)")  # fmt: skip
    parser.add_argument("--rows", type=_rows, default=_ROWS, metavar="M,M", help="last row count of each bucket")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7, help="of the best few (default: 7)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the table (default: in the user's cache folder)")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    parser.epilog = (
        "Exit codes: 0 written, 1 written, but a candidate had other bits, 2 unusable input, 3 internal error."
    )
    return parser


def _pair(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NxK")
    return int(found[1]), int(found[2])


def _rows(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form M,M") from None


def run(args: argparse.Namespace) -> int:
    """The whole command; returns the exit code. Raises ValueError for input that can't be used."""
    # imported when needed: --help should not wait for torch
    import torch

    from rlalign.cli.bench_kernels import gpu_meta, measure
    from rlalign.cli.tune_problems import buckets

    if not torch.cuda.is_available():
        raise ValueError("tune.py measures GPU kernels, and torch finds no GPU here")
    if args.rounds < 1:
        raise ValueError(f"--rounds={args.rounds}: at least 1")
    buckets(args.rows)
    device = torch.device("cuda", torch.cuda.current_device())
    path = args.output or default_path(torch.cuda.get_device_name(device))
    path.parent.mkdir(parents=True, exist_ok=True)
    return tune(args, device, measure, path, gpu_meta(None))


def tune(args: argparse.Namespace, device: torch.device, measure: Measure, path: Path, meta: dict[str, Any]) -> int:
    """Search, write the table to ``path``, read it back and show it; returns the exit code."""
    import torch
    from rlalign_kernels import tuned
    from rlalign_kernels.gpu import architecture

    from rlalign.cli.tune_problems import buckets
    from rlalign.cli.tune_search import search

    console = Console()
    content: dict[str, Any] = {
        "format": tuned.FORMAT, "for": tuned.plan_fields(architecture(device)), "machine": meta,
        "linear": [], "head": [], "measured": [],
    }  # fmt: skip
    results: list[Found] = []
    with console.status("") as status:
        for kind, problem in _problems(args, device):
            ends = [n for n in args.rows if kind != "sample" or n <= _MOST_DRAWN]
            for bucket in buckets(ends) if ends else ():
                status.update(f"{problem.name}, {bucket.first} to {bucket.last} rows")
                found = search(problem, bucket, measure, args.rounds)
                results.append(found)
                content["measured"].append(_record(found))
                if found.tile is not None:
                    entry = tuned.to_json(problem.entry(bucket, found.tile))
                    content["linear" if kind == "linear" else "head"].append(entry)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    path.write_text(json.dumps(content, indent=2) + "\n")
    tuned.read(path, architecture(device))
    console.print(_table(results))
    refused = [line for found in results for line in found.refused]
    for line in refused:
        console.print(f"refused, its bits differ: {line}", style="red", markup=False, soft_wrap=True)
    console.print(f"written to {path}; use it with {tuned.VARIABLE}={path}", markup=False, soft_wrap=True)
    return EXIT_DIFFERENT if refused else EXIT_EQUAL


def _problems(args: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Problem]]:
    """One after the other: together they might not fit."""
    import torch

    from rlalign.cli.tune_problems import HeadProblem, LinearProblem

    linear, head = list(args.shapes), args.head
    if args.model is not None:
        from rlalign.cli.model_shapes import model_shapes

        shapes = model_shapes(args.model)
        linear, head = [*shapes.linear, *linear], head or shapes.head
    if not linear and head is None:
        raise ValueError("nothing to tune: give --model PATH, --shapes NxK or --head VxH")
    common = getattr(torch, args.dtype), device, args.rows[-1]
    for shape in dict.fromkeys(linear) if "linear" in args.operators else ():
        yield "linear", LinearProblem(*shape, *common)
    for kind in ("logprob", "sample"):
        if head is not None and kind in args.operators:
            yield kind, HeadProblem(*head, *common, kind == "sample")


def _record(found: Found) -> dict[str, Any]:
    return {
        "problem": found.problem,
        "rows": [found.bucket.first, found.bucket.last],
        "candidates": found.num_candidates,
        "schedule": None if found.tile is None else str(found.tile),
        "ratio": found.ratio,
        "ms": found.ms,
        "default_ms": found.default_ms,
        "refused": list(found.refused),
    }


def _table(results: Sequence[Found]) -> Table:
    table = Table(title="Schedules found", title_justify="left")
    for column in ("problem", "rows", "time / default's", "schedule"):
        table.add_column(column, justify="right" if "time" in column else "left")
    previous = None
    for found in results:
        if previous not in (None, found.problem):
            table.add_section()
        name, previous = ("" if found.problem == previous else found.problem), found.problem
        tile = "the default stays" if found.tile is None else escape(_changes(found.default, found.tile))
        table.add_row(name, f"{found.bucket.first}-{found.bucket.last}", f"{found.ratio:.2f}", tile)
    return table


def _changes(default: object, tile: object) -> str:
    """What ``tile`` has that the default has not."""
    alike = type(default) is type(tile)
    changed = {name: value for name, value in vars(tile).items() if not alike or getattr(default, name) != value}
    said = ", ".join(f"{name} {value}" for name, value in changed.items())
    return said if alike else f"{type(tile).__name__}: {said}"


def default_path(gpu: str) -> Path:
    """In the user's cache folder, by GPU."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "rlalign" / "schedules" / f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    wanted = "--traceback" in argv if argv is not None else None
    return run_main(lambda: run(make_parser().parse_args(argv)), traceback=wanted or None)
