"""``scripts/bench_kernels.py``: invariant kernels against the libraries' own, interleaved in one run on one GPU.

Implementations take turns within every round, forwards and backwards, because clocks drift; medians over rounds are
reported. Inputs are random. ``ratio`` is time over the baseline's: below 1 is faster than it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from rlalign.cli.errors import run_main
from rlalign.run.facts import git_commit, versions

# Each has its cases in bench_<kernel>.py.
_KERNELS = ("attention", "linear", "logprob", "norm")
# So few that the GPU's queue never fills.
_HOST_CALLS = 50
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Case:
    """One problem and who solves it. flops or num_bytes: the work that it takes at least; the other is 0.

    calls: by implementation. baseline: one of them; if it can't run here, the first that can. graphed: replayed from a
    CUDA graph, where the host's time would hide the kernel's. table: which of a page's tables it belongs to. memory:
    measure what a call takes beside its inputs. computes: by implementation, where they don't all do the same.
    """

    name: str
    baseline: str
    calls: dict[str, Callable[[], object]]
    flops: float = 0.0
    num_bytes: float = 0.0
    graphed: bool = False
    table: str = ""
    memory: bool = False
    computes: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def measure(case: Case, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every round by implementation. One that can't do the case is noted in ``case.refused``."""
    from triton.testing import do_bench

    ready = {}
    for name, call in case.calls.items():
        try:
            ready[name] = _graph(call) if case.graphed else call
            ready[name]()
            torch.cuda.synchronize()
        # whatever a library can't do on this machine is a fact of the table, not an error of the benchmark
        except Exception as error:
            ready.pop(name, None)
            case.refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    times: dict[str, list[float]] = {name: [] for name in ready}
    for index in range(rounds):
        order = list(ready) if index % 2 == 0 else list(ready)[::-1]
        for name in order:
            times[name].append(do_bench(ready[name], warmup=5, rep=25, return_mode="median"))
    return times


def measure_host(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Microseconds until a call returns to the host, by implementation; the GPU has nothing else to do."""
    for call in calls.values():
        for _ in range(20):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(4 * rounds):
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(_HOST_CALLS):
                call()
            times[name].append((time.perf_counter() - start) / _HOST_CALLS * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_memory(call: Callable[[], object]) -> float:
    """MiB that one call takes at most beside what is there already, its results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _graph(call: Callable[[], object]) -> Callable[[], None]:
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):  # where its forward ran is where a backward runs
        call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay


def make_records(
    case: Case, times: dict[str, list[float]], extra_mib: dict[str, float] | None = None
) -> list[dict[str, Any]]:
    """One record per implementation that ran. extra_mib: by implementation, where memory was measured."""
    if not times:
        return []
    baseline = case.baseline if case.baseline in times else next(iter(times))
    base = statistics.median(times[baseline])
    records = []
    for name, rounds in times.items():
        ms = statistics.median(rounds)
        record = {"case": case.name, "impl": name, "ms": ms, "ms_rounds": rounds, "baseline": baseline}
        if case.flops:
            record["tflops"] = case.flops / ms / 1e9
        if case.num_bytes:
            record["tbps"] = case.num_bytes / ms / 1e9
        if name in (extra_mib or {}):
            record["extra_mib"] = extra_mib[name]
        said = {"table": case.table, "computes": case.computes.get(name)}
        records.append(record | {key: text for key, text in said.items() if text} | {"ratio": ms / base})
    return records


def make_table(title: str, records: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=title)
    table.add_column("case")
    table.add_column("implementation")
    for column in ("ms (median)", "TFLOP/s or TB/s", "extra MiB", "time / baseline"):
        table.add_column(column, justify="right")
    previous = None
    for record in records:
        if previous not in (None, record["case"]):
            table.add_section()
        previous = record["case"]
        rate = f"{record['tflops']:.0f} TFLOP/s" if "tflops" in record else f"{record.get('tbps', 0):.2f} TB/s"
        extra = f"{record['extra_mib']:,.0f}" if "extra_mib" in record else ""
        table.add_row(record["case"], record["impl"], f"{record['ms']:.4f}", rate, extra, f"{record['ratio']:.3f}")
    return table


def save_plot(records: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Bars of time over the baseline's, case by case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(record["case"] for record in records))
    impls = list(dict.fromkeys(record["impl"] for record in records))
    ratios = {(record["case"], record["impl"]): record["ratio"] for record in records}
    figure, axes = plt.subplots(figsize=(max(8, 0.9 * len(cases)), 5), layout="constrained")
    width = 0.8 / len(impls)
    for offset, impl in enumerate(impls):
        drawn = [
            (index + offset * width, ratios[case, impl]) for index, case in enumerate(cases) if (case, impl) in ratios
        ]
        axes.bar([x for x, _ in drawn], [min(ratio, 4.0) for _, ratio in drawn], width, label=impl)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks([index + 0.4 for index in range(len(cases))], cases, rotation=45, ha="right", fontsize=8)
    axes.set_ylabel("time / baseline (cut at 4)")
    axes.set_title(title)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def left_out(refused: dict[str, dict[str, str]]) -> list[str]:
    """What could not run, in words: one line per implementation and reason."""
    cases: dict[tuple[str, str], list[str]] = {}
    for case, reasons in refused.items():
        for impl, reason in reasons.items():
            cases.setdefault((impl, reason), []).append(case)
    return [f"left out: {impl} in {', '.join(names)}: {reason}" for (impl, reason), names in cases.items()]


def gpu_meta(commit: str | None) -> dict[str, Any]:
    """GPU, driver, versions, commit, date."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": torch.cuda.get_device_name(0),
        "processors": properties.multi_processor_count,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": versions().get("triton"),
        "versions": versions(),
        "commit": commit or git_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _driver() -> str | None:
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None


def run(args: argparse.Namespace) -> None:
    """Measure one kernel after the other; for each print the table, write JSON and plot."""
    if not torch.cuda.is_available():
        raise ValueError("bench_kernels.py measures GPU kernels, and torch finds no GPU here")
    if args.rounds < 1:
        raise ValueError(f"--rounds={args.rounds}: at least 1")
    if args.output and args.output.suffix == ".json" and len(args.kernels) > 1:
        raise ValueError(f"--output={args.output} names one file, and {len(args.kernels)} kernels are measured")
    for kernel in args.kernels:
        run_one(kernel, args)


def run_one(kernel: str, args: argparse.Namespace) -> None:
    cases = importlib.import_module(f"rlalign.cli.bench_{kernel}")
    console = Console()
    records: list[dict[str, Any]] = []
    refused: dict[str, dict[str, str]] = {}
    for make_case in cases.make_cases(args.only):
        case = make_case()
        times = measure(case, args.rounds)
        extra = {name: measure_memory(case.calls[name]) for name in times} if case.memory else None
        records += make_records(case, times, extra)
        if case.refused:
            refused[case.name] = case.refused
        del case
        torch.compiler.reset()
        torch.cuda.empty_cache()
    host_cases = cases.make_host_cases(args.only) if hasattr(cases, "make_host_cases") else ()
    host = {name: measure_host(calls, args.rounds) for name, calls in host_cases}
    if not records and not host:
        raise ValueError(f"--only={args.only!r} is in no case's name")
    meta = gpu_meta(args.commit) | {"rounds": args.rounds, "refused": refused, "host_us": host}
    meta["versions"] = versions(getattr(cases, "PACKAGES", ()))
    console.print(make_table(f"{kernel} on {meta['gpu']}", records))
    for name, calls in host.items():
        console.print(f"{name}: " + ", ".join(f"{impl} {us:.1f} us" for impl, us in calls.items()))
    for line in left_out(refused):
        console.print(line, soft_wrap=True)
    path = output_path(args.output, kernel, str(meta["gpu"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"meta": meta, "records": records}, indent=2) + "\n")
    if records:
        save_plot(records, f"{kernel}, {meta['gpu']}", path.with_suffix(".png"))
    console.print(f"written to {path}", soft_wrap=True)


def output_path(asked: Path | None, kernel: str, gpu: str) -> Path:
    """``asked`` if it is a JSON file, else <kernel>.json in that folder or in the GPU's own."""
    if asked is not None and asked.suffix == ".json":
        return asked
    folder = asked or _ROOT / "benchmarks/results" / re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return folder / f"{kernel}.json"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench_kernels.py", description="Invariant GPU kernels against libraries.", allow_abbrev=False
    )
    parser.add_argument("kernels", nargs="+", choices=_KERNELS, metavar="kernel", help=", ".join(_KERNELS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="cases whose name contains this text")
    parser.add_argument("--output", type=Path, help="JSON file, or a folder (default: benchmarks/results/<gpu>)")
    parser.add_argument("--commit", help="commit of this tree, where git can't tell it")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    args = make_parser().parse_args(argv)
    return run_main(lambda: run(args), traceback=args.traceback or None)
