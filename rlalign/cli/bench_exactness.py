"""``scripts/bench_exactness.py``: the contract's axes, measured, with exact arithmetic and without.

One workload of sampled responses is produced again and again while one axis of the contract is moved; each time every
token's rollout log-prob is compared, bit for bit, with a packed trainer forward of separately loaded weights, and the
sampled tokens with those of the unmoved run. T8 (CUDA graphs) has no meaning on a CPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rlalign.actors.process import set_up
from rlalign.cli.bench_engine import machine_name
from rlalign.cli.errors import run_main
from rlalign.cli.rescoring import rescore
from rlalign.config import AlgorithmConfig, Dtype, EngineConfig, ModelConfig, Numerics, SamplingParams, TrainerConfig
from rlalign.engine import Engine
from rlalign.modeling import Policy, load_policy, make_tiny_model
from rlalign.records import Completion, Prompt, Sample, derive_seed
from rlalign.run.facts import git_commit, versions
from rlalign.tasks.sort import make_sort_tokenizer
from rlalign.trainer import Trainer
from rlalign.verifier.compare import compare_samples
from rlalign.verifier.metrics import align_metrics

IMPLEMENTATIONS: tuple[Numerics, ...] = ("invariant", "native")
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
_SIDES = ("policy", "policy", "other")
_MODEL = ModelConfig(hidden_size=128, num_layers=4, head_dim=32, intermediate_size=384)
_ENGINE = EngineConfig(prefix_cache=False, num_pages=1024)
_PLAIN = SamplingParams(max_tokens=32, ignore_eos=True)
_MIXED = (
    replace(_PLAIN, temperature=0.6),
    replace(_PLAIN, top_k=5),
    replace(_PLAIN, temperature=1.3, top_p=0.8),
    replace(_PLAIN, min_p=0.05),
    replace(_PLAIN, temperature=0.0),
    replace(_PLAIN, temperature=0.8, top_k=20, top_p=0.9, min_p=0.02),
)

Params = Callable[[int], SamplingParams]
Score = Callable[[Policy, Sequence[Sample]], list[np.ndarray]]


@dataclass(frozen=True, slots=True)
class Axis:
    """One move: engine settings, sampling, scoring, or whatever ``play`` does to the engine before its run."""

    name: str
    moved: str
    engine: EngineConfig = _ENGINE
    params: Params = lambda _: _PLAIN
    score: Score = lambda policy, samples: rescore(policy, samples, micro_batch_tokens=8192)
    play: Callable[[Bench, Axis], list[Completion]] = lambda bench, axis: bench.generate(axis)


@dataclass(frozen=True, slots=True)
class Bench:
    """Both sides with their own load of one checkpoint, and the prompts."""

    rollout: Policy
    train: Policy
    other: Policy
    """Other weights, that T12 starts from."""
    prompts: list[Prompt]

    def generate(self, axis: Axis, *, engine: Engine | None = None, order: int = 1) -> list[Completion]:
        """One completion per prompt, in the prompts' order; submitted in reverse with ``order=-1``."""
        engine = engine or Engine(self.rollout, None, axis.engine)
        each = [replace(axis.params(p.prompt_id), seed=derive_seed(0, p.prompt_id)) for p in self.prompts]
        groups = engine.generate([p.token_ids.tolist() for p in self.prompts[::order]], each[::order])
        return [completion for [completion] in groups][::order]

    def samples(self, axis: Axis, completions: Sequence[Completion]) -> list[Sample]:
        return [Sample(0, p, c, axis.params(p.prompt_id)) for p, c in zip(self.prompts, completions, strict=True)]


def axes() -> list[Axis]:
    """The contract's axes, T1 to T12, as far as they have a meaning in one process on a CPU."""
    return [
        Axis("base", "all requests at once, one prefill each"),
        Axis("T1 batch population", "every request alone", replace(_ENGINE, max_num_seqs=1)),
        Axis("T2 row position", "reverse order", play=lambda b, a: b.generate(a, order=-1)),
        Axis("T3 neighbours' content", "NaN in every free cache slot", play=_among_nans),
        Axis("T4 padding", "trainer's batch left- and right-padded", score=_score_padded),
        Axis("T5 schedule of the prompt", "chunks of 5, mixed with decoding", replace(_ENGINE, prefill_chunk=5)),
        Axis("T6 cache", "pages of 3 tokens", replace(_ENGINE, page_size=3)),
        Axis(
            "T7 reuse: prefix hits", "the same prompts a second time", replace(_ENGINE, prefix_cache=True), play=_twice
        ),
        Axis("T7 reuse: preemption", "a cache for part of the batch", replace(_ENGINE, num_pages=30), play=_preempted),
        Axis("T9 training side", "micro-batches of 200 tokens", score=_score_in_small_batches),
        Axis("T10 placement", "half of the requests on another engine", play=_two_engines),
        Axis("T11 sampling", "six samplings mixed in one batch", params=lambda i: _MIXED[i % len(_MIXED)]),
        Axis("T12 weights", "an engine of other weights, then a sync", play=_after_sync),
    ]


@contextmanager
def _before_forwards(policy: Policy, act: Callable[[Any], None]) -> Iterator[None]:
    """Call ``act(context)`` before every forward of this policy."""

    def hidden(token_ids: Tensor, position_ids: Tensor, context: Any) -> Tensor:
        act(context)
        return type(policy).hidden(policy, token_ids, position_ids, context)

    policy.hidden = hidden  # type: ignore[method-assign]  # on this instance only
    try:
        yield
    finally:
        del policy.hidden  # type: ignore[method-assign]


def _among_nans(bench: Bench, axis: Axis) -> list[Completion]:
    def poison(context: Any) -> None:
        page_size = context.k_caches[0].shape[1]
        free = torch.ones(context.k_caches[0].shape[:2], dtype=torch.bool).view(-1)
        for table, length in zip(context.block_tables, context.kv_lens, strict=True):
            position = torch.arange(int(length))
            free[table[position // page_size].long() * page_size + position % page_size] = False
        for cache in (*context.k_caches, *context.v_caches):
            cache.flatten(0, 1)[free] = torch.nan

    with _before_forwards(bench.rollout, poison):
        return bench.generate(axis)


def _twice(bench: Bench, axis: Axis) -> list[Completion]:
    engine = Engine(bench.rollout, None, axis.engine)
    bench.generate(axis, engine=engine)
    completions = bench.generate(axis, engine=engine)
    if not engine.stats["prefix_hit_tokens"]:
        raise RuntimeError("no prefix was hit: the axis was not moved")
    return completions


def _preempted(bench: Bench, axis: Axis) -> list[Completion]:
    engine = Engine(bench.rollout, None, axis.engine)
    completions = bench.generate(axis, engine=engine)
    if not engine.stats["preemptions"]:
        raise RuntimeError("nothing was preempted: the axis was not moved; use more --prompts")
    return completions


def _two_engines(bench: Bench, axis: Axis) -> list[Completion]:
    halves = [
        replace(bench, rollout=p, prompts=bench.prompts[i::2]) for i, p in enumerate((bench.rollout, bench.train))
    ]
    found = {c.prompt_ids.tobytes(): c for half in halves for c in half.generate(axis)}
    return [found[p.token_ids.tobytes()] for p in bench.prompts]


def _after_sync(bench: Bench, axis: Axis) -> list[Completion]:
    engine = Engine(bench.other, None, axis.engine)
    bench.generate(axis, engine=engine)
    engine.update_weights(bench.train.named_weights(), version=0, sha256=bench.train.weights_hash())
    return bench.generate(axis, engine=engine)


def _score_in_small_batches(policy: Policy, samples: Sequence[Sample]) -> list[np.ndarray]:
    return rescore(policy, samples, micro_batch_tokens=200)


def _score_padded(policy: Policy, samples: Sequence[Sample]) -> list[np.ndarray]:
    """Half of the rows left-padded, half right-padded, with ids that mean something."""
    rows = [np.concatenate([s.completion.prompt_ids, s.completion.token_ids]) for s in samples]
    width = max(map(len, rows)) + 9
    ids, mask = np.full((len(rows), width), 7), np.zeros((len(rows), width), dtype=np.int64)
    places = [slice(width - len(r), width) if i % 2 else slice(0, len(r)) for i, r in enumerate(rows)]
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        ids[i, place], mask[i, place] = row, 1
    trainer = Trainer(policy, TrainerConfig(), AlgorithmConfig(), total_steps=1)
    scores = trainer.logprobs_of_padded(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    lengths = [len(s.completion.token_ids) for s in samples]
    return [scores[i, place][-n:].copy() for i, (place, n) in enumerate(zip(places, lengths, strict=True))]


def measure(bench: Bench, numerics: Numerics, dtype: Dtype) -> list[dict[str, Any]]:
    """One record per axis."""
    records, base = [], []
    for axis in axes():
        completions = axis.play(bench, axis)
        samples = bench.samples(axis, completions)
        metrics = align_metrics(compare_samples(samples, axis.score(bench.train, samples)))
        base = base or completions
        same_sampling = axis.params(0) is _PLAIN
        changed = sum(c.token_ids.tobytes() != b.token_ids.tobytes() for c, b in zip(completions, base, strict=True))
        records.append(
            {
                "case": axis.name,
                "moved": axis.moved,
                "impl": numerics,
                "dtype": dtype,
                "tokens": sum(len(c.token_ids) for c in completions),
                "mismatch_count": int(metrics["align/mismatch_count"]),
                "logp_abs_diff_max": metrics["align/logp_abs_diff/max"],
                "responses": len(completions),
                "responses_changed": changed if same_sampling else None,
            }
        )
    return records


def make_prompts(vocab_size: int, count: int) -> list[Prompt]:
    rng = random.Random(0)
    rows = [[rng.randrange(vocab_size) for _ in range(rng.randint(3, 90))] for _ in range(count)]
    return [Prompt(i, np.array(row, dtype=np.int64), "", "") for i, row in enumerate(rows)]


def make_table(records: Sequence[dict[str, Any]], dtype: Dtype) -> Table:
    table = Table(title=f"Rollout against trainer in {dtype}, one axis of the contract moved at a time")
    for column in ("axis", "moved to"):
        table.add_column(column)
    for impl in IMPLEMENTATIONS:
        for column in (f"{impl}: tokens that differ", "max |Δ|", "responses changed"):
            table.add_column(column, justify="right")
    for pair in by_case(records, dtype).values():
        table.add_row(pair[0]["case"], pair[0]["moved"], *(cell for record in pair for cell in cells(record)))
    return table


def by_case(records: Sequence[dict[str, Any]], dtype: Dtype) -> dict[str, list[dict[str, Any]]]:
    """The records of one dtype by axis, in order; for each axis one per implementation."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        if record["dtype"] == dtype:
            found.setdefault(record["case"], []).append(record)
    return found


def cells(record: dict[str, Any]) -> tuple[str, str, str]:
    """What one implementation has to show on one axis."""
    changed = record["responses_changed"]
    return (
        f"{record['mismatch_count']:,} of {record['tokens']:,}",
        "0" if record["logp_abs_diff_max"] == 0 else f"{record['logp_abs_diff_max']:.1e}",
        "" if changed is None else f"{changed} of {record['responses']}",
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the JSON; exit code 1 if the invariant side showed any difference."""
    set_up(args.threads)
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, seed in (("policy", 0), ("other", 1)):
            make_tiny_model(_MODEL, make_sort_tokenizer(max_value=999), Path(folder) / name, seed=seed)
        for dtype in DTYPES:
            for impl in IMPLEMENTATIONS:
                policies = [load_policy(Path(folder) / name, dtype=dtype, numerics=impl) for name in _SIDES]
                bench = Bench(*policies, make_prompts(policies[0].vocab_size, args.prompts))
                records += measure(bench, impl, dtype)
            Console().print(make_table(records, dtype))
    machine = machine_name(torch.device("cpu"))
    meta = {
        "machine": machine,
        "threads": args.threads,
        "versions": versions(),
        "torch": torch.__version__,
        "commit": git_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    path = args.output or Path(__file__).resolve().parents[2] / "benchmarks/results" / machine / "exactness.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"meta": meta, "records": records}, indent=2) + "\n")
    Console().print(f"written to {path}", soft_wrap=True)
    return int(any(r["mismatch_count"] or r["responses_changed"] for r in records if r["impl"] == "invariant"))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench_exactness.py", description="The contract's axes, measured.", allow_abbrev=False
    )
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/<machine>/exactness.json)")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    args = make_parser().parse_args(argv)
    return run_main(lambda: run(args), traceback=args.traceback or None)
