"""``rlalign-verify dump``: log-probs that any engine reported, against the trainer's forward of a model.

The model sees token ids and sampling parameters only. Sampling parameters come from the dump; options replace them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

from rlalign.cli.dump_options import add_output, add_reader, check_outputs, positive, seconds
from rlalign.config import Numerics, ScoringDtype, TrainerConfig


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add this subcommand; returns its parser."""
    parser = subparsers.add_parser(
        "dump", help="any engine's log-probs against a model's forward", description=__doc__.partition(": ")[2]
    )
    parser.set_defaults(run=run)
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help="dump, or folder of dump files")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="Hugging Face checkpoint folder")
    parser.add_argument("--limit", type=positive, metavar="N", help="take the first N sequences")
    add_output(parser)
    _add_arithmetic(parser)
    group = parser.add_argument_group("sampling (default: what the dump says, else temperature 1)")
    group.add_argument("--temperature", type=float, metavar="T", help="0: greedy, scored at temperature 1")
    group.add_argument("--top-k", type=int, metavar="K", help="0: off")
    group.add_argument("--top-p", type=float, metavar="P", help="1: off")
    group.add_argument("--min-p", type=float, metavar="P", help="0: off")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--processed", action="store_true", default=None, help="log-probs are after these transforms")
    which.add_argument("--raw", action="store_false", dest="processed", default=None, help="log-probs are before them")
    group = parser.add_argument_group("reading")
    add_reader(group)
    group.add_argument("--prompt", action="store_true", help="log-probs of the prompt instead of the response")
    group = parser.add_argument_group("following dumps that are being written, until Ctrl-C")
    group.add_argument("--watch", type=Path, metavar="DIR", help="folder of .jsonl and .parquet files; no FILE then")
    group.add_argument("--watch-seconds", type=seconds, metavar="S", help="stop after so long")
    group.add_argument("--poll-seconds", type=seconds, metavar="S", help="between two looks (default: 1)")
    return parser


def _add_arithmetic(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("arithmetic of the trainer's forward")
    group.add_argument("--numerics", choices=get_args(Numerics), default="invariant")
    group.add_argument("--dtype", choices=get_args(ScoringDtype), help="default: the checkpoint's")
    group.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    group.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's own)")
    group.add_argument(
        "--micro-batch-tokens",
        type=positive,
        default=TrainerConfig().micro_batch_tokens,
        metavar="N",
        help="rows of one forward",
    )


def run(args: argparse.Namespace) -> int:
    """The whole subcommand; returns the exit code. Raises ValueError for input that can't be used."""
    from rich.console import Console

    from rlalign.cli.dump_output import show, write_json, write_page
    from rlalign.cli.dump_session import Session

    if (args.file is None) == (args.watch is None):
        raise ValueError("dump takes either FILE or --watch DIR")
    for name in ("watch_seconds", "poll_seconds"):
        if args.watch is None and getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} belongs to --watch DIR")
    if args.watch is not None and args.limit is not None:
        raise ValueError("--limit can't be used with --watch, which takes all")
    check_outputs(args)
    session, console = Session(args), Console()
    verdict = session.file() if args.watch is None else session.watch(console)
    decode = session.decode
    show(verdict, console, decode)
    if args.json is not None:
        write_json(verdict, args.json, decode)
    if args.html is not None:
        write_page(verdict, args.html, decode)
    if verdict.unread is not None:
        raise verdict.unread
    return verdict.exit_code
