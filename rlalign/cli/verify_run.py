"""``rlalign-verify run``: generate with the engine, rescore with the trainer's forward, compare the bits.

Both sides load the checkpoint on their own. The rescoring sees token ids and sampling parameters only; it packs whole
sequences where the engine decoded token by token from a paged cache.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from rich.console import Console

from rlalign.cli.dump_options import add_thresholds, check_outputs, count, positive, thresholds
from rlalign.config import Dtype, EngineConfig, Numerics, SamplingParams, TrainerConfig
from rlalign.records import Completion, Prompt, Sample, derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlalign.cli.verify_output import Outcome
    from rlalign.modeling import Policy
    from rlalign.tasks.rows import Row


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add this subcommand; returns its parser."""
    numerics = get_args(Numerics)
    parser = subparsers.add_parser("run", help="generate, rescore and compare", description=__doc__.partition(": ")[2])
    parser.set_defaults(run=run)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="Hugging Face checkpoint folder")
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSONL or parquet with prompt, prompt_token_ids or question; or text, one prompt a line",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="take the first N prompts")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result as JSON")
    parser.add_argument("--html", type=Path, metavar="OUT", help="also write a page with pictures that opens offline")
    parser.add_argument("--dump", type=Path, metavar="OUT", help="also write the samples as .jsonl or .parquet")
    parser.add_argument("--worst", type=count, default=10, metavar="K", help="tokens in the table of the worst")
    add_thresholds(parser)

    group = parser.add_argument_group("arithmetic")
    group.add_argument("--numerics", choices=numerics, default="invariant", help="both sides (default: invariant)")
    group.add_argument("--rollout", choices=numerics, help="the engine's side only")
    group.add_argument("--train", choices=numerics, help="the trainer's side only")
    group.add_argument("--dtype", choices=get_args(Dtype), default="float32")
    group.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    group.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's own)")

    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 is greedy (default: 1)")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="0: off")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1: off")
    group.add_argument("--min-p", type=float, default=0.0, metavar="P", help="0: off")
    group.add_argument(
        "--max-tokens", type=int, default=64, metavar="N", help="most tokens of a response (default: 64)"
    )
    group.add_argument("--n", type=int, default=1, metavar="N", help="samples per prompt (default: 1)")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--ignore-eos", action="store_true", help="always generate --max-tokens")

    group = parser.add_argument_group("schedule, which may not change a bit")
    group.add_argument(
        "--engine",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a field of EngineConfig, such as page_size=4 or prefill_chunk=7; repeatable",
    )
    group.add_argument(
        "--micro-batch-tokens",
        type=int,
        default=TrainerConfig().micro_batch_tokens,
        metavar="N",
        help="rows of one rescoring forward",
    )
    return parser  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """The whole subcommand; returns the exit code. Raises ValueError for input that can't be used."""
    # imported when needed: --help should not wait for torch and transformers
    from rlalign.cli.html import write_html
    from rlalign.cli.verify_output import show, to_html, write_json
    from rlalign.cli.verify_prompts import read_prompt_rows
    from rlalign.verifier.dumps.native import check_dump_path

    # everything that can be wrong is looked at before the first weight is loaded
    params, engine = _sampling(args), _engine_config(args.engine)
    trainer = TrainerConfig(micro_batch_tokens=args.micro_batch_tokens)
    bounds = thresholds(args)
    rows = read_prompt_rows(args.prompts, limit=args.limit)
    check_outputs(args, "dump")
    if args.dump is not None:
        check_dump_path(args.dump)
    outcome = replace(_verify(args, rows, params, engine, trainer.micro_batch_tokens), thresholds=bounds)
    show(outcome, Console())
    if args.json is not None:
        write_json(outcome, args.json)
    if args.html is not None:
        write_html(to_html(outcome), args.html)
    return outcome.exit_code


def _verify(
    args: argparse.Namespace, rows: Sequence[Row], params: SamplingParams, engine: EngineConfig, micro_batch_tokens: int
) -> Outcome:
    from rlalign.cli.rescoring import rescore
    from rlalign.cli.verify_output import Outcome
    from rlalign.cli.verify_prompts import encode_rows, needs_tokenizer
    from rlalign.engine import Engine
    from rlalign.run.pictures import picture_data
    from rlalign.verifier.compare import compare_samples
    from rlalign.verifier.metrics import align_metrics
    from rlalign.verifier.report import build_report

    seconds: dict[str, float] = {}
    with _timed(seconds, "load"):
        rollout, train = _load(args, args.rollout), _load(args, args.train)
        tokenizer = _tokenizer(args.model, required=needs_tokenizer(rows))
        prompts = encode_rows(rows, tokenizer)
    with _timed(seconds, "rollout"):
        completions = _generate(Engine(rollout, tokenizer, engine), prompts, params)
    # a request that the engine refused has no tokens, and its prompt may not fit the trainer either
    served = [(prompt, completion) for prompt, completion in completions if completion.finish_reason != "error"]
    samples = [Sample(0, prompt, completion, params) for prompt, completion in served]
    if args.dump is not None:
        _dump(args.dump, samples)
    with _timed(seconds, "rescore"):
        logprobs = rescore(train, samples, micro_batch_tokens=micro_batch_tokens)
    comparison = compare_samples(samples, logprobs)
    decode = None if tokenizer is None else tokenizer.decode
    report = build_report(comparison, samples, worst_tokens=args.worst, decode=decode)
    return Outcome(
        report=report,
        metrics=align_metrics(comparison),
        completions=tuple(completion for _, completion in completions),
        facts=_facts(args, rollout, train, seconds),
        pictures=picture_data(comparison, report, samples, decode=decode),
    )


def _dump(path: Path, samples: Sequence[Sample]) -> None:
    """The samples in our dump schema, each named by its prompt's line and its number."""
    from rlalign.verifier.dumps import DumpSequence, write_dump

    write_dump(
        path,
        (
            DumpSequence(
                id=f"{sample.prompt.prompt_id}/{sample.completion.sample_index}",
                prompt_token_ids=sample.completion.prompt_ids,
                token_ids=sample.completion.token_ids,
                logprobs=sample.completion.logprobs,
                sampling=sample.sampling,
                processed=True,
                weights_version=sample.completion.weights_version,
                finish_reason=sample.completion.finish_reason,
                text=sample.completion.text,
            )
            for sample in samples
        ),
    )


def _load(args: argparse.Namespace, numerics: Numerics | None) -> Policy:
    import torch
    from transformers.utils import logging as transformers_logging

    from rlalign.modeling import load_policy

    transformers_logging.disable_progress_bar()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return load_policy(
        args.model, dtype=args.dtype, numerics=numerics or args.numerics, device=args.device, without_dropout=True
    )


def _tokenizer(model: Path, *, required: bool) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer; without one, None if all prompts are ids (contexts are then shown as ids).

    Raises ValueError for one that is there but can't be used, whatever the prompts are.
    """
    from rlalign.modeling import load_tokenizer

    try:
        return load_tokenizer(model)
    except FileNotFoundError:
        if required:
            raise
        return None


def _generate(engine: Any, prompts: Sequence[Prompt], params: SamplingParams) -> list[tuple[Prompt, Completion]]:
    """Every completion with its prompt. A prompt's seed depends on its line, so that --limit changes no sample."""
    seed = params.seed or 0
    each = [replace(params, seed=derive_seed(seed, prompt.prompt_id)) for prompt in prompts]
    groups = engine.generate([prompt.token_ids.tolist() for prompt in prompts], each)
    # requests are renamed from their place in the batch to their line in the file
    return [
        (prompt, replace(completion, request_id=str(prompt.prompt_id)))
        for prompt, group in zip(prompts, groups, strict=True)
        for completion in group
    ]


def _sampling(args: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        max_tokens=args.max_tokens,
        n=args.n,
        seed=args.seed,
        ignore_eos=args.ignore_eos,
    )


def _engine_config(settings: Sequence[str]) -> EngineConfig:
    """EngineConfig of ``KEY=VALUE`` strings; pydantic checks and converts the values."""
    pairs = [setting.partition("=") for setting in settings]
    if bad := [setting for setting, (_, equals, _) in zip(settings, pairs, strict=True) if not equals]:
        raise ValueError(f"--engine {bad[0]!r} is not of the form KEY=VALUE")
    known = [field.name for field in fields(EngineConfig)]
    if unknown := [key for key, _, _ in pairs if key not in known]:
        raise ValueError(f"--engine {unknown[0]}: no such setting; there are {', '.join(known)}")
    return EngineConfig(**{key: value for key, _, value in pairs})


def _facts(args: argparse.Namespace, rollout: Policy, train: Policy, seconds: dict[str, float]) -> dict[str, Any]:
    from rlalign_kernels import fingerprint

    prints = {name: fingerprint(p.backend, p.device) for name, p in (("rollout", rollout), ("train", train))}
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return {
        "model": str(args.model),
        "rollout": args.rollout or args.numerics,
        "train": args.train or args.numerics,
        "weights_sha256": {"rollout": rollout.weights_hash(), "train": train.weights_hash()},
        "fingerprint": {name: dict(value.fields) | {"sha256": value.sha256} for name, value in prints.items()},
        "fingerprint_difference": prints["rollout"].difference(prints["train"]),
        "settings": {name: value for name, value in settings.items() if name not in ("run", "command")},
        "seconds": seconds,
    }


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 3)
