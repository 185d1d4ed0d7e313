"""``scripts/bench_compare.py``: two dumps that differ by noise on every token, compared by a process of its own.

Memory is the peak of the largest process and, as text is parsed by two more, an upper bound of all of them together.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from rlalign.cli.errors import EXIT_DIFFERENT, EXIT_EQUAL, run_main
from rlalign.cli.parser import Parser
from rlalign.config import SamplingParams
from rlalign.verifier.dumps import DumpSequence, write_dump

_LENGTH, _PROMPT, _VOCAB = 500, 20, 150_000
_NOISE = 0.02
# format, whether the second file has another order
_CASES = (("parquet", False), ("parquet", True), ("jsonl", False), ("jsonl", True))


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(prog="bench_compare.py", description=__doc__.partition(": ")[2])
    parser.add_argument("--tokens", type=int, default=10_000_000, metavar="N", help="per dump (default: 10 million)")
    parser.add_argument("--format", choices=("parquet", "jsonl"), help="only this one")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="for the files, about 120 bytes per token in all")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the rows as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every case; returns the exit code."""
    return run_main(lambda: _run(make_parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> int:
    rows = []
    print("format   order     seconds  CPU s  peak MiB  all, at most")
    for suffix, shuffled in (case for case in _CASES if args.format in (None, case[0])):
        with tempfile.TemporaryDirectory(dir=args.dir, prefix="bench-compare-") as folder:
            row = _measure(Path(folder), suffix, max(1, args.tokens // _LENGTH), shuffled=shuffled)
        rows.append(row)
        order = "shuffled" if shuffled else "same"
        print(f"{suffix:8} {order:9} {row['seconds']:7.1f} {row['cpu_seconds']:6.1f} {row['peak_mib']:9.0f} "
              f"{row['peak_mib'] * row['processes']:13.0f}")  # fmt: skip
    if args.output is not None:
        args.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return EXIT_EQUAL


def _measure(folder: Path, suffix: str, count: int, *, shuffled: bool) -> dict[str, float | str | bool]:
    files = [folder / f"{name}.{suffix}" for name in ("a", "b")]
    order = np.random.default_rng(0).permutation(count) if shuffled else np.arange(count)
    write_dump(files[0], _sequences(np.arange(count), noise=0.0))
    write_dump(files[1], _sequences(order, noise=_NOISE))
    command = [sys.executable, "-m", "rlalign.cli.verify", "compare", *map(str, files)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(part or os.getcwd() for part in sys.path)}
    start = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        # wait4 tells what this one process, and those that it waited for, used
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    elapsed = time.perf_counter() - start
    if process.returncode != EXIT_DIFFERENT:
        raise RuntimeError(f"compare ended with {process.returncode}, expected {EXIT_DIFFERENT}")
    return {
        "format": suffix,
        "shuffled": shuffled,
        "tokens": count * _LENGTH,
        "seconds": round(elapsed, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mib": round(usage.ru_maxrss / 1024, 1),
        "processes": 1 if suffix == "parquet" else 3,
    }


def _sequences(order: np.ndarray, *, noise: float) -> Iterator[DumpSequence]:
    for index in order.tolist():
        random = np.random.default_rng(index)
        logprobs = -random.exponential(size=_LENGTH).astype(np.float32)
        ids, prompt = random.integers(0, _VOCAB, _LENGTH), random.integers(0, _VOCAB, _PROMPT)
        logprobs += np.float32(noise) * random.normal(size=_LENGTH).astype(np.float32)
        yield DumpSequence(f"request-{index}", prompt, ids, logprobs, sampling=SamplingParams(), finish_reason="stop")
