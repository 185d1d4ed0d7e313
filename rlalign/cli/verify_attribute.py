"""``rlalign-verify attribute``: why a dump's log-probs differ from a model's, by scoring it in other ways.

Every cause that is known (docs/disagree.md lists them) is tried alone and then on top of those that were kept. What no
cause explains is said, beside what rounding alone gives.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from rich.console import Console

from rlalign.cli.dump_options import add_reader, add_thresholds, check_outputs, count, positive, thresholds
from rlalign.config import Numerics, ScoringDtype
from rlalign.verifier.dumps import DumpSequence, ReadOptions, detect_format, read_dump
from rlalign.verifier.dumps.distribution import Distribution
from rlalign.verifier.dumps.ids import Ids
from rlalign.verifier.dumps.signs import Signs
from rlalign.verifier.score import OPERATORS, ScoreSettings, UnsupportedSetting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlalign.cli.dump_scoring import Failed
    from rlalign.cli.policies import Policies
    from rlalign.verifier.attribution import Attribution
    from rlalign.verifier.thresholds import Thresholds

_SECONDS = 10.0


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add this subcommand; returns its parser."""
    parser = subparsers.add_parser(
        "attribute", help="why a dump's log-probs differ, cause by cause", description=__doc__.partition(": ")[2]
    )
    parser.set_defaults(run=run)
    parser.add_argument("--dump", type=Path, required=True, metavar="FILE", help="dump of any engine")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="Hugging Face checkpoint folder")
    parser.add_argument(
        "--previous-model",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="an older checkpoint, or one with another config.json; repeatable, the latest first",
    )
    parser.add_argument("--limit", type=positive, default=16, metavar="N", help="first N sequences (default: 16)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result as JSON")
    parser.add_argument("--html", type=Path, metavar="OUT", help="also write a page that opens offline")
    parser.add_argument("--worst", type=count, default=12, metavar="K", help="causes in the table (default: 12)")
    add_thresholds(parser)
    group = parser.add_argument_group("arithmetic of scoring")
    group.add_argument("--numerics", choices=get_args(Numerics), default="invariant")
    group.add_argument("--dtype", choices=get_args(ScoringDtype), help="default: the checkpoint's")
    group.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    group.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's own)")
    group.add_argument(
        "--no-decode", action="store_true", help="leave out token-by-token scoring, a forward per response token"
    )
    group = parser.add_argument_group("what the dump holds (default: what it says)")
    add_reader(group)
    group.add_argument("--temperature", type=float, metavar="T", help="that the tokens were sampled at")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--min-p", type=float, metavar="P")
    which = group.add_mutually_exclusive_group()
    which.add_argument("--processed", action="store_true", default=None, help="log-probs are after these transforms")
    which.add_argument("--raw", action="store_false", dest="processed", default=None, help="log-probs are before them")
    return parser


def run(args: argparse.Namespace) -> int:
    """The whole subcommand; returns the exit code. Raises ValueError for input that can't be used."""
    from rlalign.cli.attribute_output import show, write_json, write_page

    bounds = thresholds(args)
    check_outputs(args)
    base, sequences, notes = _sequences(args)
    outcome, facts, sequences = _attribute(args, base, sequences)
    exceeded = _exceeded(outcome, bounds) if outcome.num_tokens else []
    facts |= {"notes": notes, "exceeded": exceeded, "exit_code": exit_code(outcome, exceeded, facts["failed"])}
    show(outcome, facts, sequences, Console(), args.worst)
    if args.json is not None:
        write_json(outcome, facts, sequences, args.json)
    if args.html is not None:
        write_page(outcome, facts, sequences, args.html)
    return facts["exit_code"]


def _exceeded(outcome: Attribution, bounds: Thresholds) -> list[str]:
    from rlalign.cli.dump_output import not_finite

    count = int(outcome.metrics["align/nonfinite_count"])
    own = sum(finding.tokens for finding in outcome.broken if finding.name in ("missing", "nan", "-inf"))
    nonfinite = not_finite(count, count - own, scored=True)
    return bounds.exceeded(outcome.metrics, num_tokens=outcome.num_tokens, nonfinite=nonfinite)


def exit_code(outcome: Attribution, exceeded: Sequence[str], failed: Sequence[Failed] = ()) -> int:
    """0 equal or within the thresholds, 1 different, 2 nothing compared, or all is equal but not all was compared.
    exceeded: what the difference as a whole, before any cause is taken away, is beyond."""
    from rlalign.cli.errors import EXIT_DIFFERENT, EXIT_EQUAL, EXIT_UNUSABLE

    if outcome.broken:
        return EXIT_DIFFERENT
    if outcome.base.tokens == 0:
        return EXIT_UNUSABLE
    if exceeded:
        return EXIT_DIFFERENT
    return EXIT_UNUSABLE if failed else EXIT_EQUAL


def _sequences(args: argparse.Namespace) -> tuple[list[ScoreSettings], list[DumpSequence], list[str]]:
    """The first sequences, with what the command line says of them; before them how each is scored to begin with, and
    behind them what was assumed."""
    format = detect_format(args.dump, args.format)
    distribution = Distribution.of(vars(args), format)
    options = ReadOptions(args.logprobs, args.pad_token_id)
    decided, ids, signs = [], Ids(within_files=True), Signs()
    for sequence in islice(read_dump(args.dump, format=format.name, options=options), args.limit):
        ids.add(sequence)
        signs.add(sequence)
        decided.append(distribution.decided(sequence, _plain(args)))
    notes = distribution.notes + ([signs.note] if signs.note else [])
    return [settings for _, settings in decided], [sequence for sequence, _ in decided], notes


def _plain(args: argparse.Namespace) -> ScoreSettings:
    return ScoreSettings(native=OPERATORS if args.numerics == "native" else ())


def _attribute(
    args: argparse.Namespace, base: Sequence[ScoreSettings], sequences: Sequence[DumpSequence]
) -> tuple[Attribution, dict[str, Any], list[DumpSequence]]:
    """The outcome, what else is said of it, and the sequences that it is of: those that the model can take."""
    import torch

    from rlalign.cli.dump_scoring import can_take
    from rlalign.cli.policies import Policies, check_architectures, checkpoint_dtype, config_fields
    from rlalign.cli.scoring import PolicyScorer
    from rlalign.modeling import load_tokenizer
    from rlalign.verifier.attribute import attribute
    from rlalign.verifier.config_causes import config_changes

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    dtype = args.dtype or checkpoint_dtype(args.model)
    models = [args.model, *args.previous_model]
    for previous in args.previous_model:
        check_architectures(previous, args.model, "--previous-model takes older checkpoints of the same architecture")
    try:
        tokenizer = load_tokenizer(args.model, extra_ids=True)
    except FileNotFoundError:
        tokenizer = None
    policies = Policies(models, dtype, args.device)
    _check_previous(policies, _plain(args))
    with policies.using(_plain(args)) as policy:
        places, failed = can_take(sequences, policy)
    base, sequences = [base[place] for place in places], [sequences[place] for place in places]
    scorer = PolicyScorer(policies, tokenizer)
    configs = [config_fields(folder) for folder in models]
    generation = args.model / "generation_config.json"
    with _progress(Console(stderr=True)) as progress:
        outcome = attribute(
            sequences,
            scorer,
            base=base,
            dtype=dtype,
            num_previous=len(args.previous_model),
            config_changes=config_changes(configs[0], configs[1:]),
            generation=config_fields(args.model, generation.name) if generation.is_file() else None,
            decode=not args.no_decode,
            progress=progress,
        )
    facts = {
        "dump": str(args.dump),
        "model": str(args.model),
        "previous_models": [str(folder) for folder in args.previous_model],
        "numerics": args.numerics,
        "dtype": dtype,
        "sequences": len(sequences),
        "failed": failed,
        "round_trips": None if tokenizer is None else _round_trips(sequences, tokenizer),
    }
    return outcome, facts, sequences


def _round_trips(sequences: Sequence[DumpSequence], tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """How many prompts and responses decoding and encoding does not give back."""
    from rlalign.cli.contents import round_trips

    found = np.array([round_trips(sequence, tokenizer) for sequence in sequences], np.bool_).reshape(-1, 2)
    return {"prompts_that_do_not": int((~found[:, 0]).sum()), "responses_that_do_not": int((~found[:, 1]).sum())}


def _check_previous(policies: Policies, settings: ScoreSettings) -> None:
    """Load each once: one that can't be is an error before hours of scoring, and not one more cause to skip."""
    for weights in range(len(policies.models) - 1, 0, -1):
        try:
            with policies.using(replace(settings, weights=weights)):
                pass
        except UnsupportedSetting:  # what scoring can't imitate is listed by name
            pass


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str], None]]:
    """What to tell which stage begins: a status line, or in a log a line now and then."""
    if console.is_terminal:
        with console.status("scoring") as status:
            yield lambda what: status.update(_stage(what))
        return
    last = time.monotonic()

    def tell(what: str) -> None:
        nonlocal last
        if time.monotonic() - last >= _SECONDS:
            console.print(_stage(what), markup=False, highlight=False, soft_wrap=True)
            last = time.monotonic()

    yield tell


def _stage(what: str) -> str:
    """By far the longest stages come with how to do without them."""
    leave_out = " (a forward per response token; --no-decode leaves it out)" if what.startswith("decode") else ""
    return f"scoring: {what}{leave_out}"
