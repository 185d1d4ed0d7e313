"""``scripts/readme_tables.py``: write the tables of README.md and docs/ from the JSON that the benchmarks wrote.

A table stands between ``<!-- table KIND FILE -->`` and ``<!-- /table -->``; FILE is relative to the repository's root.
``FILE:NAME``: only the records whose "table" is NAME, where a file has several.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlalign.cli.errors import run_main

ROOT = Path(__file__).resolve().parents[2]
_MARKED = re.compile(r"(<!-- table (\w+) ([^\s:]+)(?::(\w+))? -->\n).*?(<!-- /table -->)", re.DOTALL)


def pages(root: Path = ROOT) -> list[Path]:
    """Where tables may stand."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def rendered(text: str, root: Path = ROOT) -> str:
    """``text`` with every marked table made anew. Raises ValueError for a kind or name of a table that is not known."""

    def table(match: re.Match[str]) -> str:
        start, kind, file, name, end = match.groups()
        if kind not in _TABLES:
            raise ValueError(f"README: table of unknown kind {kind!r}; known are {', '.join(_TABLES)}")
        data = json.loads((root / file).read_text(encoding="utf-8"))
        if name is not None:
            known = dict.fromkeys(record.get("table") for record in data["records"])
            if name not in known:
                raise ValueError(f"README: {file} has no table {name!r}; its tables are {', '.join(map(str, known))}")
            data["records"] = [record for record in data["records"] if record.get("table") == name]
        return start + _TABLES[kind](data) + end

    return _MARKED.sub(table, text)


def _exactness(data: dict[str, Any]) -> str:
    rows = [
        "| axis | moved to | rlalign: tokens that differ | ordinary operators, float32 | ordinary operators, bfloat16 |"
    ]
    rows.append("|---|---|---|---|---|")
    records = data["records"]
    for case in dict.fromkeys(record["case"] for record in records):
        mine = [record for record in records if record["case"] == case]
        exact = [record for record in mine if record["impl"] == "invariant"]
        differing, total = (sum(record[key] for record in exact) for key in ("mismatch_count", "tokens"))
        native = {record["dtype"]: record for record in mine if record["impl"] == "native"}
        others = (_difference(native[dtype]) for dtype in ("float32", "bfloat16"))
        rows.append("| " + " | ".join([case, mine[0]["moved"], f"**{differing}** of {total:,}", *others]) + " |")
    return "\n".join(rows) + "\n" + _source(data["meta"])


def _difference(record: dict[str, Any]) -> str:
    share = 100 * record["mismatch_count"] / record["tokens"]
    return f"{share:.0f}%, max {record['logp_abs_diff_max']:.0e}"


def _speed(data: dict[str, Any]) -> str:
    rows = ["| case | ordinary operators, tokens/s | rlalign, tokens/s | time, ratio |", "|---|---|---|---|"]
    rates: dict[str, dict[str, dict[str, Any]]] = {}
    for record in data["records"]:
        rates.setdefault(record["case"], {})[record["impl"]] = record
    for case, by_impl in rates.items():
        numbers = (f"{by_impl[impl]['tokens_per_s']:,.0f}" for impl in ("native", "invariant"))
        rows.append(f"| {case} | {' | '.join(numbers)} | {by_impl['invariant']['ratio']:.2f} |")
    return "\n".join(rows) + "\n" + _source(data["meta"])


def _kernels(data: dict[str, Any]) -> str:
    """Every implementation's rate, case by case, and ours over the baseline's time."""
    return _side_by_side(data, _rate)


def _times(data: dict[str, Any]) -> str:
    """The same with milliseconds, and what a call takes beside its inputs where that was measured."""
    return _side_by_side(data, _time)


def _side_by_side(data: dict[str, Any], cell: Callable[[dict[str, Any] | None], str]) -> str:
    records = data["records"]
    impls = [impl for impl in dict.fromkeys(record["impl"] for record in records) if impl != "rlalign"]
    rows = [f"| case | {' | '.join(impls)} | rlalign | time, ratio |", "|---" * (len(impls) + 3) + "|"]
    for case in dict.fromkeys(record["case"] for record in records):
        mine = {record["impl"]: record for record in records if record["case"] == case}
        ours = mine["rlalign"]
        against = "" if ours["baseline"] == impls[0] else f" ({ours['baseline']})"
        cells = [*(cell(mine.get(impl)) for impl in impls), cell(ours)]
        rows.append("| " + " | ".join([case, *cells, f"{ours['ratio']:.2f}{against}"]) + " |")
    others = ", or over that of the library named beside it" if any(row.endswith(") |") for row in rows) else ""
    text = "\n".join(rows) + f"\n\nRatio: our time over {impls[0]}'s{others}."
    for case, times in data["meta"].get("host_us", {}).items():
        text += f" {case[0].upper()}{case[1:]}: " + ", ".join(f"{impl} {us:.0f} µs" for impl, us in times.items()) + "."
    return text + _measured_on(data["meta"])


def _grid(data: dict[str, Any]) -> str:
    """Time over the baseline's, a row per problem and implementation, a column per number of rows: what a case's name
    has behind its last comma."""
    places = {record["case"]: tuple(record["case"].rsplit(", ", 1)) for record in data["records"]}
    columns = list(dict.fromkeys(column for _, column in places.values()))
    ratios: dict[tuple[str, str], dict[str, float]] = {}
    for record in data["records"]:
        if record["impl"] != record["baseline"]:
            problem, column = places[record["case"]]
            ratios.setdefault((problem, record["impl"]), {})[column] = record["ratio"]
    rows = [f"| case | implementation | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for (problem, impl), found in ratios.items():
        cells = (f"{found[column]:.2f}" if column in found else "–" for column in columns)
        rows.append(f"| {problem} | {impl} | {' | '.join(cells)} |")
    baselines = ", ".join(dict.fromkeys(record["baseline"] for record in data["records"]))
    return "\n".join(rows) + f"\n\nTime over that of {baselines}." + _measured_on(data["meta"])


def _measured_on(meta: dict[str, Any]) -> str:
    return (
        f"\n\n{meta['gpu']}, driver {meta['driver']}, torch {meta['torch']}, triton {meta['triton']}, "
        f"{meta['date'][:10]}, commit {meta['commit'][:9]}.\n"
    )


def _rate(record: dict[str, Any] | None) -> str:
    if record is None:
        return "–"
    return f"{record['tflops']:.0f} TFLOP/s" if "tflops" in record else f"{record['tbps']:.2f} TB/s"


def _time(record: dict[str, Any] | None) -> str:
    if record is None:
        return "–"
    return f"{record['ms']:.2f} ms" + (f", {record['extra_mib']:,.0f} MiB" if "extra_mib" in record else "")


def _source(meta: dict[str, Any]) -> str:
    threads = f"{meta['threads']} thread" + "s" * (meta["threads"] != 1)
    return f"\n{meta['machine']}, {threads}, torch {meta['torch']}, {meta['date'][:10]}, commit {meta['commit'][:9]}.\n"


_TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "exactness": _exactness, "speed": _speed, "kernels": _kernels, "times": _times, "grid": _grid,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: with ``--check`` 1 if a page is not what the JSON says."""
    parser = argparse.ArgumentParser(
        prog="readme_tables.py", description="Tables of README and docs from JSON.", allow_abbrev=False
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is out of date")
    args = parser.parse_args(argv)

    def run() -> int:
        stale = 0
        for page in pages():
            before = page.read_text(encoding="utf-8")
            after = rendered(before)
            if not args.check and after != before:
                page.write_text(after, encoding="utf-8")
            stale |= before != after
        return int(args.check and stale)

    return run_main(run)
