"""``rlalign-verify bisect``: the first module and operator whose output differs between two settings of one model.

Both sides see the same tokens. Every module's output is compared bit by bit, in the order in which the model computes
them, so that what is named made the difference and did not merely pass it on. The exit code is 0 if every output is
equal; with thresholds other than equal bits, if the log-probs at the end are within them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from rich.console import Console

from rlalign.cli.dump_options import add_reader, add_thresholds, check_outputs, count, positive, thresholds
from rlalign.cli.errors import EXIT_DIFFERENT, EXIT_EQUAL, EXIT_UNUSABLE
from rlalign.cli.verify_settings import HELP, NamedSetting, parse_setting
from rlalign.config import ScoringDtype
from rlalign.verifier.bisect import Recording
from rlalign.verifier.compare import LogprobPair, compare
from rlalign.verifier.dumps.record import DumpSequence
from rlalign.verifier.metrics import align_metrics
from rlalign.verifier.score import UnsupportedSetting
from rlalign.verifier.thresholds import Thresholds

if TYPE_CHECKING:
    from rlalign.cli.dump_scoring import Failed
    from rlalign.cli.policies import Policies
    from rlalign.modeling import Policy
    from rlalign.modeling.feeds import Feed
    from rlalign.verifier.bisect import Bisection

_MAX_ROWS = 8192
_Pair = tuple[Recording, Recording]


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add this subcommand; returns its parser."""
    parser = subparsers.add_parser(
        "bisect", help="first module whose output differs between two settings", description=__doc__.partition(": ")[2]
    )
    parser.set_defaults(run=run)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="Hugging Face checkpoint folder")
    tokens = parser.add_mutually_exclusive_group(required=True)
    tokens.add_argument("--prompts", type=Path, metavar="FILE", help="prompts, as rlalign-verify run takes them")
    tokens.add_argument("--dump", type=Path, metavar="FILE", help="dump of any engine: prompts and responses")
    add_reader(parser.add_argument_group("how the dump is read"))
    parser.add_argument("--a", default="invariant", metavar="SETTING", help=f"one side (default: invariant): {HELP}")
    parser.add_argument("--b", default="native", metavar="SETTING", help="the other side (default: native)")
    parser.add_argument("--limit", type=positive, default=8, metavar="N", help="first N sequences (default: 8)")
    parser.add_argument("--dtype", choices=get_args(ScoringDtype), help="of both sides (default: the checkpoint's)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's own)")
    parser.add_argument(
        "--memory-mb", type=positive, default=1024, metavar="N", help="host memory for recordings (default: 1024)"
    )
    parser.add_argument("--worst", type=count, default=10, metavar="K", help="also show the first K sites that differ")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write everything as JSON, the heat map included")
    parser.add_argument("--html", type=Path, metavar="OUT", help="also write a page with the heat map, opens offline")
    parser.add_argument("--png", type=Path, metavar="OUT", help="also draw the heat map, layer by token")
    add_thresholds(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """The whole subcommand; returns the exit code. Raises ValueError for input that can't be used."""
    from rlalign.cli.bisect_output import show, write_json, write_page, write_png

    a, b = parse_setting("--a", args.a), parse_setting("--b", args.b)
    bounds = thresholds(args)
    check_outputs(args)
    sequences = _sequences(args)
    outcome, skipped, logprobs, failed = bisect_settings(args.model, sequences, a, b, args)
    metrics = align_metrics(compare([logprobs]))
    facts = {
        "model": str(args.model),
        "tokens_of": str(args.dump or args.prompts),
        "a": a.text,
        "b": b.text,
        "settings_a": a.settings.describe(),
        "settings_b": b.settings.describe(),
        "failed": failed,
        "not_recorded": skipped,
        "without_effect": _without_effect(outcome, a, b),
        "logprobs": metrics,
        "exceeded": bounds.exceeded(metrics, num_tokens=logprobs.num_tokens) if logprobs.num_tokens else [],
    }
    facts["exit_code"] = exit_code(outcome, bounds, facts["exceeded"], failed)
    show(outcome, facts, args.worst, Console())
    for write, path in ((write_json, args.json), (write_page, args.html), (write_png, args.png)):
        if path is not None:
            write(outcome, facts, path)
    return facts["exit_code"]


def bisect_settings(
    model: Path, sequences: Sequence[DumpSequence], a: NamedSetting, b: NamedSetting, args: argparse.Namespace
) -> tuple[Bisection, list[str], LogprobPair, list[Failed]]:
    """What differs, the outputs that could not be compared, the log-probs of both sides (a as rollout), and the
    sequences that one of the two models can't take."""
    import torch

    from rlalign.cli.dump_scoring import can_take
    from rlalign.cli.forwards import check_feeds
    from rlalign.cli.heads import head_logprobs
    from rlalign.cli.policies import Policies, check_architectures, checkpoint_dtype
    from rlalign.cli.recording import Side, recorded_pairs, survey, tokens_of
    from rlalign.verifier.bisect import Tokens, bisect

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    dtype = args.dtype or checkpoint_dtype(model)
    check_architectures(a.model or model, b.model or model, "bisect compares two settings of one architecture")
    sides = []
    # each side has policies of its own: switching operators of one must not reach the other
    stores = [Policies([named.model or model], dtype, args.device) for named in (a, b)]
    with ExitStack() as stack:
        policy_a = _enter(stack, stores[0], "--a", a)
        policy_b = _enter(stack, stores[1], "--b", b)
        places, failed = can_take(sequences, policy_a, policy_b)
        places = [place for place in places if len(sequences[place].token_ids)]
        names = tuple(sequence.name for sequence in sequences)
        sequences = [sequences[place] for place in places]
        if not sequences:
            return bisect((), Tokens(*[np.zeros(0, np.int64)] * 3)), [], _pair(np.zeros((2, 0), np.float32)), failed
        for policy, named in ((policy_a, a), (policy_b, b)):
            feeds = [_feed(sequence, named, sequences) for sequence in sequences]
            check_feeds(policy, feeds)
            sides.append(Side(policy, feeds, named.settings))
        tokens = tokens_of(sides[0].feeds)
        # by their place in the file, whatever was left out
        tokens = replace(tokens, sequence=np.array(places)[tokens.sequence], names=names)
        targets = np.concatenate([_all_ids(sequence)[1:] for sequence in sequences])
        pairs = recorded_pairs(*sides, targets, head_logprobs, max_bytes=args.memory_mb * 2**20, max_rows=_MAX_ROWS)
        last: list[_Pair] = []
        outcome = bisect(_keeping_last(pairs, last), tokens)
        logprobs = _pair([side.values[:, 0] for side in last[0]])
        return outcome, list(survey(sides[0].policy).skipped), logprobs, failed


def _enter(stack: ExitStack, store: Policies, option: str, named: NamedSetting) -> Policy:
    """The policy of one side, its operators switched until ``stack`` closes. A refusal says which side it is of."""
    try:
        return stack.enter_context(store.using(named.settings))
    except UnsupportedSetting as error:
        raise UnsupportedSetting(f"{option} {named.text}: {error}") from error


def _pair(sides: Sequence[np.ndarray]) -> LogprobPair:
    rollout, train = sides
    return LogprobPair(rollout, train, len(rollout))


def _keeping_last(pairs: Iterator[_Pair], last: list[_Pair]) -> Iterator[_Pair]:
    """The pairs as they come; the newest one, of the log-probs in the end, stays in ``last``."""
    for pair in pairs:
        last[:] = [pair]
        yield pair


def _feed(sequence: DumpSequence, named: NamedSetting, sequences: Sequence[DumpSequence]) -> Feed:
    from rlalign.cli.forwards import make_feed

    longest = max(len(each.prompt_token_ids) for each in sequences)
    prompt, response = sequence.prompt_token_ids, sequence.token_ids
    return make_feed(sequence, prompt, response, named.settings, longest_prompt=longest, pad_id=0)


def _all_ids(sequence: DumpSequence) -> np.ndarray:
    return np.concatenate([sequence.prompt_token_ids, sequence.token_ids])


def _sequences(args: argparse.Namespace) -> list[DumpSequence]:
    """The first sequences of the dump, or the first prompts."""
    if args.dump is not None:
        from rlalign.verifier.dumps import ReadOptions, read_dump

        options = ReadOptions(args.logprobs, args.pad_token_id)
        dumped = read_dump(args.dump, format=args.format, options=options)
        read = [_with_response(sequence) for sequence in islice(dumped, args.limit)]
    else:
        given = [name for name in ("format", "logprobs", "pad_token_id") if getattr(args, name) is not None]
        if given:
            raise ValueError(f"--{given[0].replace('_', '-')} says how a --dump is read; --prompts has none")
        read = [_with_response(sequence) for sequence in _prompts(args)]
    if not any(len(sequence.token_ids) for sequence in read):
        raise ValueError(f"{args.dump or args.prompts}: no sequence of at least two tokens")
    return read


def _prompts(args: argparse.Namespace) -> Iterator[DumpSequence]:
    from rlalign.cli.verify_prompts import encode_rows, needs_tokenizer, read_prompt_rows
    from rlalign.modeling import load_tokenizer

    rows = read_prompt_rows(args.prompts, limit=args.limit)
    tokenizer = load_tokenizer(args.model) if needs_tokenizer(rows) else None
    none = np.zeros(0, np.int64)
    for prompt in encode_rows(rows, tokenizer):
        name = str(prompt.prompt_id)
        source = f"{args.prompts}:{name}"
        yield DumpSequence(name, prompt.token_ids, none, np.zeros(0, np.float32), source=source, numbered=True)


def _with_response(sequence: DumpSequence) -> DumpSequence:
    """The sequence; of a mere prompt, the tokens after the first count as response."""
    if len(sequence.token_ids):
        return sequence
    prompt, response = np.split(sequence.prompt_token_ids, [1])
    return replace(
        sequence, prompt_token_ids=prompt, token_ids=response, logprobs=np.zeros(len(response), np.float32), mask=None
    )


def _without_effect(outcome: Bisection, a: NamedSetting, b: NamedSetting) -> list[str]:
    """Fields of config.json that one side has in another way, where all outputs are equal."""
    fields = {f"config.{name}={value}" for name, value in {*a.settings.config} ^ {*b.settings.config}}
    return sorted(fields) if outcome.equal else []


def exit_code(outcome: Bisection, bounds: Thresholds, exceeded: Sequence[str], failed: Sequence[Failed] = ()) -> int:
    """0 equal or within the thresholds, 1 different, 2 nothing compared, or all is equal but not all was compared.
    exceeded: what the log-probs are beyond."""
    if not outcome.sites:
        return EXIT_UNUSABLE
    if exceeded or (bounds.bitwise and not outcome.equal):
        return EXIT_DIFFERENT
    return EXIT_UNUSABLE if failed else EXIT_EQUAL
