"""``scripts/make_workspace.py``: save a view of a wandb project whose sections read from top to bottom."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rlalign.cli.errors import EXIT_EQUAL, run_main
from rlalign.cli.parser import Parser


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog="make_workspace.py",
        description="Save a view of a wandb project: Agreement, Where, Policy, Performance, Reward.",
        epilog="Exit codes: 0 saved (or shown), 2 unusable input, 3 internal error.",
    )
    parser.add_argument("--entity", required=True, help="wandb user or team")
    parser.add_argument("--project", default="rlalign")
    parser.add_argument("--name", default="rlalign", help="of the view (default: rlalign)")
    parser.add_argument("--dry-run", action="store_true", help="show its sections and charts; ask no server")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Save the view; ``argv`` None takes the process's own. Returns the exit code."""

    def run() -> int:
        from rlalign.dashboards.workspace import make_workspace

        args = make_parser().parse_args(argv)
        workspace = make_workspace(args.entity, args.project, name=args.name)
        if args.dry_run:
            for section in workspace.sections:
                print(f"{section.name}: {len(section.panels)} charts")
        else:
            print(workspace.save().url)
        return EXIT_EQUAL

    return run_main(run, traceback="--traceback" in argv if argv is not None else None)


if __name__ == "__main__":
    sys.exit(main())
