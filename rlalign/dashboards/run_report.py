"""The report of a run, or of two side by side, from what a run leaves in its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlalign.dashboards.blocks import phase_blocks, picture_blocks, series_blocks
from rlalign.dashboards.jsonl import read_metrics
from rlalign.dashboards.page import Chart, Page, Table
from rlalign.dashboards.panels import STEP, Section
from rlalign.dashboards.snapshot import Snapshot, snapshot_from_dict

_MAX_RUNS = 2
_FACTS = (
    ("recipe", "recipe"),
    ("numerics", "numerics"),
    ("status", "status"),
    ("steps", "steps"),
    ("seed", "seed"),
    ("response tokens compared", "tokens"),
    ("tokens that differ", "mismatch_count"),
    ("max |Δ log-prob|", "logp_abs_diff_max"),
    ("mean reward, first step", "reward_first"),
    ("mean reward, last step", "reward_last"),
    ("held-out accuracy, first", "eval_first"),
    ("held-out accuracy, last", "eval_last"),
    ("final weights, SHA-256", "final_weights_sha256"),
    ("commit", "git_commit"),
)


@dataclass(frozen=True, slots=True)
class RunFiles:
    """What a run wrote. summary: empty while it goes on. snapshots: by step; none from an older version's run."""

    name: str
    metrics: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    snapshots: Mapping[int, Snapshot]


def read_run(folder: Path) -> RunFiles:
    """A run's files. FileNotFoundError if there is no run, ValueError naming a file or line that can't be read."""
    folder = Path(folder)
    metrics, summary = folder / "metrics.jsonl", folder / "summary.json"
    if not metrics.is_file():
        raise FileNotFoundError(f"{folder}: no run is there, metrics.jsonl is missing")
    rows = _rows(metrics)
    if not rows:
        raise ValueError(f"{metrics}: no step is finished yet")
    return RunFiles(
        name=folder.resolve().name,
        metrics=rows,
        summary=json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {},
        snapshots=_snapshots(folder / "pictures.jsonl"),
    )


def run_page(runs: Sequence[RunFiles]) -> Page:
    """One page of one run or of two. ValueError for more, or none."""
    if not 1 <= len(runs) <= _MAX_RUNS:
        raise ValueError(f"a report shows one run or two side by side, not {len(runs)}")
    named = {name: run for name, run in zip(_names(runs), runs, strict=True)}
    rows = {name: run.metrics for name, run in named.items()}
    where: list[Chart | Table] = []
    columns = [picture_blocks(name if len(runs) > 1 else "", run.snapshots) for name, run in named.items()]
    if len(columns) == 1:
        where = columns[0]
    else:  # the same picture of both runs in one line
        titles = list(dict.fromkeys(_kind(block) for column in columns for block in column))
        where = [block for title in titles for column in columns for block in column if _kind(block) == title]
    sections: dict[Section, Sequence[Chart | Table]] = {
        "Agreement": series_blocks(rows, "Agreement"),
        "Where": [*where, *series_blocks(rows, "Where")],
        "Policy": series_blocks(rows, "Policy"),
        "Performance": [*phase_blocks(rows), *series_blocks(rows, "Performance")],
        "Reward": series_blocks(rows, "Reward"),
    }
    return Page(
        title=" and ".join(named),
        verdict=[_verdict(name, run) for name, run in named.items()],
        facts=Table("", ["", *named], [[label, *(_fact(run, key) for run in runs)] for label, key in _FACTS]),
        sections=sections,
    )


def _verdict(name: str, run: RunFiles) -> tuple[str, bool]:
    """One line from all steps in the folder, whether or not the run came to its end."""
    steps = [row for row in run.metrics if "align/mismatch_count" in row]
    if not steps:
        return f"{name}: nothing was compared", False
    differing = int(sum(row["align/mismatch_count"] for row in steps))
    nonfinite = int(sum(row["align/nonfinite_count"] for row in steps))
    if differing == nonfinite == 0:
        return f"{name}: rollout and trainer agree bit for bit in all {len(steps)} steps", True
    bad = [row for row in steps if row["align/mismatch_count"] or row["align/nonfinite_count"]]
    largest = max(row["align/logp_abs_diff/max"] for row in bad)
    return (
        f"{name}: rollout and trainer differ on {differing:,} tokens ({nonfinite:,} non-finite or missing) in "
        f"{len(bad)} of {len(steps)} steps, first in step {bad[0][STEP]}; max |Δ log-prob| {largest:.3g}",
        False,
    )


def _names(runs: Sequence[RunFiles]) -> list[str]:
    names = [run.name for run in runs]
    same = len(set(names)) < len(names)
    return [f"{name} ({number})" for number, name in enumerate(names, start=1)] if same else names


def _kind(block: Chart | Table) -> str:
    return block.title.rpartition(": ")[2]


def _fact(run: RunFiles, key: str) -> str:
    value = run.summary.get(key)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value or "")


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return read_metrics(path)
    except ValueError as error:
        raise ValueError(f"{path}: not a file of metrics: {error}") from error


def _snapshots(path: Path) -> dict[int, Snapshot]:
    found = {}
    for number, row in enumerate(_rows(path), start=1):
        try:
            found[int(row[STEP])] = snapshot_from_dict(row)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"field {error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}, line {number}: {reason}") from error
    return found
