"""``rlalign-verify``: do a rollout engine and a trainer agree, bit for bit, on this model?

Exit codes: 0 equal, 1 different (or a log-prob is non-finite or missing), 2 unusable input or nothing compared,
3 internal error. Each subcommand is a module with ``add_parser(subparsers)`` and the function it sets as default.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import pairwise

from rlalign import __version__
from rlalign.cli import (
    verify_attribute,
    verify_bisect,
    verify_compare,
    verify_dump,
    verify_preflight,
    verify_replay,
    verify_run,
)
from rlalign.cli.errors import run_main
from rlalign.cli.parser import Parser

_COMMANDS = (verify_run, verify_dump, verify_compare, verify_attribute, verify_bisect, verify_preflight, verify_replay)


def make_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = Parser(prog="rlalign-verify", description=__doc__.split("\n\n")[0].partition(": ")[2])
    parser.add_argument("--version", action="version", version=f"rlalign {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        added = command.add_parser(subparsers)
        added.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    parser.epilog = "Exit codes: 0 equal, 1 different, 2 unusable input or nothing compared, 3 internal error."
    return parser


def _right_form(words: Sequence[str]) -> str:
    """What to add to an error, where a dump is named as another command takes it; else nothing."""
    command, *rest = words or [""]
    named = any(word == "--dump" or word.startswith("--dump=") for word in rest)
    if command in ("dump", "compare") and named:
        files = {"dump": "FILE --model DIR", "compare": "A B"}[command]
        return f"; {command} takes dumps without --dump: rlalign-verify {command} {files}"
    # what follows an option may be its value
    free = any(not word.startswith("-") and not before.startswith("-") for before, word in pairwise(words))
    if command in ("attribute", "bisect") and free and not named and "--prompts" not in rest:
        return f"; {command} takes a dump by name: rlalign-verify {command} --dump FILE --model DIR"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; ``argv`` None takes the process's own. Returns the exit code."""

    def run() -> int:
        words = sys.argv[1:] if argv is None else list(argv)
        try:
            args = make_parser().parse_args(words)
        except ValueError as error:
            raise ValueError(f"{error}{_right_form(words)}") from error
        return args.run(args)

    return run_main(run, traceback="--traceback" in argv if argv is not None else None)


if __name__ == "__main__":
    sys.exit(main())
