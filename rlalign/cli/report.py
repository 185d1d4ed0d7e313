"""``scripts/report.py``: one HTML file of a run, or of two side by side, from what a run leaves in its folder."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rlalign.cli.errors import EXIT_EQUAL, run_main
from rlalign.cli.parser import Parser


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog="report.py",
        description="One HTML file of a run, or of two side by side, with everything that it needs inside.",
        epilog="Exit codes: 0 written, 2 unusable input, 3 internal error.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="one run's folder, or two")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: report.html in the first run's folder")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report; ``argv`` None takes the process's own. Returns the exit code."""

    def run() -> int:
        args = make_parser().parse_args(argv)
        path = report(args.runs, args.output)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
        return EXIT_EQUAL

    return run_main(run, traceback="--traceback" in argv if argv is not None else None)


def report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write the report of one run's folder or of two; returns its path. FileNotFoundError, ValueError: unusable."""
    from rlalign.cli.html import check_html
    from rlalign.dashboards.page import render
    from rlalign.dashboards.run_report import read_run, run_page

    path = output or runs[0] / "report.html"
    if output is not None or runs[0].is_dir():  # else it is the run that is not there
        check_html(path, option="--output")
    page = run_page([read_run(folder) for folder in runs])
    # a browser may hold the last one open: the new one takes its place at once, whole
    part = path.with_name(f"{path.name}.part")
    part.write_text(render(page), encoding="utf-8")
    os.replace(part, path)
    return path


if __name__ == "__main__":
    sys.exit(main())
