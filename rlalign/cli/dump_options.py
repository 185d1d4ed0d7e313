"""Options that the subcommands on dumps share, and what they mean."""

from __future__ import annotations

import argparse
from pathlib import Path

from rlalign.verifier.dumps import FORMATS
from rlalign.verifier.thresholds import Thresholds

_THRESHOLDS = ("max_abs", "mean_abs", "mismatch_frac", "k3")


def add_output(parser: argparse.ArgumentParser) -> None:
    """--json, --html, --worst and the thresholds."""
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result as JSON")
    parser.add_argument("--html", type=Path, metavar="OUT", help="also write a page with pictures that opens offline")
    parser.add_argument("--worst", type=count, default=10, metavar="K", help="tokens in the table of the worst")
    add_thresholds(parser)


def add_reader(group: argparse._ArgumentGroup) -> None:
    """--format, --logprobs and --pad-token-id: how one dump is read."""
    group.add_argument("--format", choices=FORMATS, help="default: by content")
    group.add_argument("--logprobs", metavar="FIELD", help="field of the log-probs, such as old_log_probs")
    group.add_argument("--pad-token-id", type=int, metavar="ID", help="of padded batches without attention masks")


def add_thresholds(parser: argparse.ArgumentParser) -> None:
    """How much difference is accepted."""
    group = parser.add_argument_group("thresholds, beyond which the exit code is 1 (default: --max-abs 0)")
    group.add_argument("--max-abs", type=float, metavar="X", help="largest |Δ|; 0: every bit must be equal")
    group.add_argument("--mean-abs", type=float, metavar="X", help="mean |Δ|")
    group.add_argument("--mismatch-frac", type=float, metavar="X", help="share of tokens whose bits differ")
    group.add_argument("--k3", type=float, metavar="X", help="mean of e^Δ - Δ - 1, an estimate of KL")


def thresholds(args: argparse.Namespace) -> Thresholds:
    """The thresholds of a command line. Raises ValueError for one that is no bound."""
    return Thresholds(**{name: getattr(args, name) for name in _THRESHOLDS})


def check_outputs(args: argparse.Namespace, *more: str) -> None:
    """Raises FileNotFoundError or ValueError if a result could not be written, or would replace another one or what it
    is made from, before any work is done. more: options that name outputs of this subcommand alone."""
    paths = {name: value.resolve() for name, value in vars(args).items() if isinstance(value, Path)}
    for option in ("json", "png", "html", *more):
        if option not in paths:
            continue
        check_file(getattr(args, option), f"--{option}")
        if same := [name for name, path in paths.items() if name != option and path == paths[option]]:
            raise ValueError(f"--{option}: {getattr(args, option)} is also what {same[0]!r} names")
    if args.html is not None:
        from rlalign.cli.html import check_html

        check_html(args.html)


def check_file(path: Path, option: str) -> None:
    """Raises FileNotFoundError or ValueError naming ``option`` if no file can be written there."""
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{option}: no such folder: {path.absolute().parent}")
    if path.is_dir():
        raise ValueError(f"{option}: {path} is a folder, not a file")


def positive(text: str) -> int:
    """An argument that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def count(text: str) -> int:
    """An argument that counts something of which there may be none."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is less than 0")
    return value


def seconds(text: str) -> float:
    """An argument that is a time span."""
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{value} is less than 0")
    return value
