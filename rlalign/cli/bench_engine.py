"""``scripts/bench_engine.py``: what exactness costs, in tokens per second of rollout and of training.

Invariant against native on the same weights, prompts and response lengths (end-of-sequence is ignored), so both do the
same number of tokens. Implementations take turns within every round, the first one alternating, because clocks drift
and machines are shared; medians over rounds are reported. The prefix cache is off: rounds repeat the same prompts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rlalign_kernels.plan import cpu_model

from rlalign.actors.process import set_up
from rlalign.cli.errors import run_main
from rlalign.config import AlgorithmConfig, EngineConfig, ModelConfig, Numerics, SamplingParams, TrainerConfig
from rlalign.engine import Engine
from rlalign.modeling import Policy, load_policy, make_tiny_model
from rlalign.records import Prompt, Sample
from rlalign.run.facts import git_commit, versions
from rlalign.tasks.sort import make_sort_tokenizer
from rlalign.trainer import Trainer

IMPLEMENTATIONS: tuple[Numerics, ...] = ("native", "invariant")
BASELINE: Numerics = "native"
_ENGINE = EngineConfig(prefix_cache=False)


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of known lengths: prompt token ids, and tokens to generate for each."""

    prompts: list[list[int]]
    lengths: list[int]

    @property
    def num_generated(self) -> int:
        return sum(self.lengths)

    def params(self) -> list[SamplingParams]:
        return [
            SamplingParams(max_tokens=length, ignore_eos=True, seed=seed) for seed, length in enumerate(self.lengths)
        ]


@dataclass(frozen=True, slots=True)
class Case:
    """Something to time: a call per implementation that handles ``num_tokens``."""

    name: str
    num_tokens: int
    calls: dict[Numerics, Callable[[], None]]


def make_workloads(vocab_size: int, response: int) -> dict[str, Workload]:
    """One request; 32 at once; and 48 whose lengths have the long tail of real rollouts."""
    rng = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(length)]

    tail = [min(3 * response, max(1, round(rng.lognormvariate(0.0, 0.9) * response / 2))) for _ in range(48)]
    return {
        "rollout, 1 request": Workload([prompt(16)], [response]),
        "rollout, 32 requests": Workload([prompt(16) for _ in range(32)], [response] * 32),
        "rollout, mixed lengths": Workload([prompt(rng.randint(4, 96)) for _ in tail], tail),
    }


def make_cases(policies: dict[Numerics, Policy], response: int) -> list[Case]:
    """Every case, on policies with the same weights."""
    engines = {name: Engine(policy, None, _ENGINE) for name, policy in policies.items()}
    workloads = make_workloads(policies[BASELINE].vocab_size, response)
    check_lengths(workloads.values(), min(engine.max_length for engine in engines.values()))
    cases = [
        Case(name, workload.num_generated, {impl: _rollout(engine, workload) for impl, engine in engines.items()})
        for name, workload in workloads.items()
    ]
    samples = make_samples(engines["invariant"], workloads["rollout, mixed lengths"])
    calls = {impl: _training(policy, samples) for impl, policy in policies.items()}
    return [*cases, Case("trainer, forward + backward", sum(s.num_tokens for s in samples), calls)]


def _rollout(engine: Engine, workload: Workload) -> Callable[[], None]:
    def call() -> None:
        engine.generate(workload.prompts, workload.params())

    return call


def check_lengths(workloads: Iterable[Workload], max_length: int) -> None:
    """Refuse responses that the limit would cut: tokens per second would count tokens that were never made."""
    for workload in workloads:
        longest = max(len(prompt) + length for prompt, length in zip(workload.prompts, workload.lengths, strict=True))
        if longest > max_length:
            raise ValueError(
                f"a request of {longest} tokens exceeds the limit of {max_length}: use a smaller --response"
            )


def make_samples(engine: Engine, workload: Workload) -> list[Sample]:
    """The workload's completions as a batch to train on; both implementations train on the same one."""
    params = workload.params()
    groups = engine.generate(workload.prompts, params)
    return [
        Sample(0, Prompt(number, completion.prompt_ids, "", ""), completion, params[number])
        for number, [completion] in enumerate(groups)
    ]


def _training(policy: Policy, samples: Sequence[Sample]) -> Callable[[], None]:
    trainer = Trainer(policy, TrainerConfig(), AlgorithmConfig(), total_steps=1)
    old = [sample.completion.logprobs for sample in samples]
    # Any advantages will do, but zeros would let a backward skip work.
    advantages = [np.full(len(values), 1.0 - 2.0 * (i % 2), dtype=np.float32) for i, values in enumerate(old)]

    def call() -> None:
        trainer.begin_batch()
        trainer.accumulate(samples, advantages, old_logprobs=old)
        trainer.discard()

    return call


def measure(cases: Sequence[Case], rounds: int, device: torch.device) -> dict[tuple[str, Numerics], list[float]]:
    """Milliseconds of every call, after one untimed call of each."""
    for case in cases:
        for call in case.calls.values():
            call()
    times: dict[tuple[str, Numerics], list[float]] = {}
    for number in range(rounds):
        order = IMPLEMENTATIONS if number % 2 == 0 else IMPLEMENTATIONS[::-1]
        for case in cases:
            for impl in order:
                times.setdefault((case.name, impl), []).append(_milliseconds(case.calls[impl], device))
    return times


def _milliseconds(call: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def make_records(
    cases: Sequence[Case], times: dict[tuple[str, Numerics], list[float]]
) -> list[dict[str, str | float | list[float]]]:
    """One record per case and implementation. ratio: its median time over the baseline's, above 1 is slower."""
    records = []
    for case in cases:
        base = statistics.median(times[case.name, BASELINE])
        for impl in IMPLEMENTATIONS:
            rounds = times[case.name, impl]
            ms = statistics.median(rounds)
            records.append(
                {
                    "case": case.name,
                    "impl": impl,
                    "ms": ms,
                    "ms_rounds": rounds,
                    "tokens_per_s": 1e3 * case.num_tokens / ms,
                    "baseline": BASELINE,
                    "ratio": ms / base,
                }
            )
    return records


def batching_gain(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Tokens per second of 32 requests at once over those of one, by implementation."""
    rates = {(record["case"], record["impl"]): record["tokens_per_s"] for record in records}
    return {impl: rates["rollout, 32 requests", impl] / rates["rollout, 1 request", impl] for impl in IMPLEMENTATIONS}


def machine_name(device: torch.device) -> str:
    """The processor's or GPU's name, fit for a folder."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_model()} {os.cpu_count()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def make_table(records: Sequence[dict[str, Any]], gain: dict[str, float]) -> Table:
    caption = ", ".join(f"{impl} {value:.1f}x" for impl, value in gain.items())
    table = Table(title="What exactness costs", caption=f"32 requests at once against one, tokens/s: {caption}")
    table.add_column("case")
    table.add_column("implementation")
    for column in ("ms (median)", "min … max", "tokens/s", "time / native"):
        table.add_column(column, justify="right")
    for record in records:
        spread = f"{min(record['ms_rounds']):.0f} … {max(record['ms_rounds']):.0f}"
        numbers = (f"{record['ms']:.0f}", spread, f"{record['tokens_per_s']:.0f}", f"{record['ratio']:.2f}")
        table.add_row(record["case"], record["impl"], *numbers, end_section=record["impl"] == IMPLEMENTATIONS[-1])
    return table


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench_engine.py", description="Invariant against native, in tokens/s.", allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, help="checkpoint folder (default: the quick start's model, untrained)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--response", type=int, default=48, help="tokens to generate per request")
    parser.add_argument("--output", type=Path, help="JSON file (default: benchmarks/results/<machine>/engine.json)")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure, print the table and write the JSON."""
    for name in ("threads", "rounds", "response"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}={getattr(args, name)}: at least 1")
    set_up(args.threads)
    device = torch.device(args.device)
    started = os.getloadavg()[0]
    cases = make_cases(_load_policies(args), args.response)
    records = make_records(cases, measure(cases, args.rounds, device))
    gain = batching_gain(records)
    Console().print(make_table(records, gain))
    meta = {
        "machine": machine_name(device),
        "device": args.device,
        "model": str(args.model) if args.model else "quick start",
        "dtype": args.dtype,
        "threads": args.threads,
        "rounds": args.rounds,
        "load_before": started,
        "versions": versions(),
        "torch": torch.__version__,
        "commit": git_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "tokens_per_s_32_over_1": gain,
    }
    path = args.output or Path(__file__).resolve().parents[2] / "benchmarks/results" / meta["machine"] / "engine.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"meta": meta, "records": records}, indent=2) + "\n")
    Console().print(f"written to {path}", soft_wrap=True)


def _load_policies(args: argparse.Namespace) -> dict[Numerics, Policy]:
    def load(path: Path) -> dict[Numerics, Policy]:
        options = {"dtype": args.dtype, "device": args.device}
        return {impl: load_policy(path, numerics=impl, **options) for impl in IMPLEMENTATIONS}

    if args.model is not None:
        return load(args.model)
    with tempfile.TemporaryDirectory() as folder:
        make_tiny_model(ModelConfig(), make_sort_tokenizer(max_value=99), folder, seed=0)
        return load(Path(folder))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    args = make_parser().parse_args(argv)
    return run_main(lambda: run(args), traceback=args.traceback or None)
