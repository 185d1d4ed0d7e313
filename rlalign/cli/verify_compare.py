"""``rlalign-verify compare``: two dumps against each other, by id; needs neither a model nor torch.

Files are streamed and may be larger than memory. The first dump is called rollout, the second train: Δ is the second's
log-prob minus the first's.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlalign.cli.dump_options import add_output, check_outputs, thresholds
from rlalign.verifier.dumps import FORMATS, ReadOptions, detect_format

if TYPE_CHECKING:
    from rlalign.cli.dump_output import Verdict

_NAMED = 1000


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add this subcommand; returns its parser."""
    parser = subparsers.add_parser(
        "compare", help="one dump against another, no model", description=__doc__.partition(": ")[2]
    )
    parser.set_defaults(run=run)
    parser.add_argument("rollout", type=Path, metavar="A", help="dump, or folder of dump files")
    parser.add_argument("train", type=Path, metavar="B", help="dump, or folder of dump files; may be A again")
    parser.add_argument("--by-order", action="store_true", help="the n-th sequence with the n-th, whatever their ids")
    add_output(parser)
    group = parser.add_argument_group("reading (default: by content)")
    group.add_argument("--format", choices=FORMATS, help="of both dumps")
    for side, name in (("a", "A"), ("b", "B")):
        group.add_argument(f"--format-{side}", choices=FORMATS, help=f"of {name}")
        group.add_argument(
            f"--logprobs-{side}", metavar="FIELD", help=f"field of {name}'s log-probs, such as old_log_probs"
        )
        group.add_argument(f"--prompt-{side}", action="store_true", help=f"log-probs of the prompt in {name}")
    group.add_argument("--pad-token-id", type=int, metavar="ID", help="of padded batches without attention masks")
    return parser


def run(args: argparse.Namespace) -> int:
    """The whole subcommand; returns the exit code. Raises ValueError for input that can't be used."""
    from rich.console import Console

    from rlalign.cli.dump_output import show, write_json, write_page

    check_outputs(args)
    verdict = _compare(args)
    show(verdict, Console())
    if args.json is not None:
        write_json(verdict, args.json)
    if args.html is not None:
        write_page(verdict, args.html)
    return verdict.exit_code


def _compare(args: argparse.Namespace) -> Verdict:
    from rlalign.cli.dump_output import LeftOut, Verdict
    from rlalign.verifier.dumps.ahead import read_ahead
    from rlalign.verifier.dumps.signs import Zeros
    from rlalign.verifier.stream.join import join_by_id, join_by_order
    from rlalign.verifier.stream.pieces import of_dumps
    from rlalign.verifier.stream.tally import Tally

    bounds, start = thresholds(args), time.perf_counter()
    formats = [detect_format(getattr(args, side), getattr(args, f"format_{name}") or args.format).name
               for side, name in (("rollout", "a"), ("train", "b"))]  # fmt: skip
    readers = [
        read_ahead(
            getattr(args, side),
            format=format,
            options=ReadOptions(
                logprobs=getattr(args, f"logprobs_{name}"),
                pad_token_id=args.pad_token_id,
                prompt=getattr(args, f"prompt_{name}"),
            ),
        )
        for format, side, name in zip(formats, ("rollout", "train"), ("a", "b"), strict=True)
    ]
    pictures = _pictures(args)
    tally = Tally(worst=args.worst, watch=None if pictures is None else pictures.add)
    unmatched: list[LeftOut] = []
    num_unmatched = 0
    zeros = Zeros("rollout", "train's"), Zeros("train", "rollout's")
    for pair in (join_by_order if args.by_order else join_by_id)(*readers):
        reason: str | None
        if pair.rollout is None or pair.train is None:
            reason = f"only in {args.rollout if pair.train is None else args.train} ({pair.either.source})"
        else:
            sides, reason = of_dumps(pair.rollout, pair.train)
            tally.add(sides)
            both, keep = (sides.rollout[: sides.compared], sides.train[: sides.compared]), sides.keep
            for each, one, other in zip(zeros, both, both[::-1], strict=True):
                each.add(one, other, None if keep is None else keep[: sides.compared])
        if reason is not None:
            num_unmatched += 1
            # kept small, and the same ones whatever the order
            unmatched.append(LeftOut(pair.either.id, pair.either.name, reason))
            if len(unmatched) > 2 * _NAMED:
                unmatched = sorted(unmatched)[:_NAMED]
    return Verdict(
        sides=(str(args.rollout), str(args.train)),
        outcome=tally.outcome(),
        thresholds=bounds,
        facts={"formats": formats, "seconds": {"compare": round(time.perf_counter() - start, 3)}},
        unmatched=sorted(unmatched)[:_NAMED],
        num_unmatched=num_unmatched,
        notes=[each.note for each in zeros if each.note],
        pictures=None if pictures is None else pictures.snapshot,
    )


def _pictures(args: argparse.Namespace) -> Any:
    if args.html is None:
        return None
    from rlalign.cli.dump_pictures import Pictures

    return Pictures()
