"""Charts and tables of the report, from snapshots and series: what is shown, and the words beside it.

Legend: run names come first in every mapping, so that two runs stand side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlalign.dashboards.charts import (
    histogram_figure,
    layer_figure,
    position_figure,
    scatter_figure,
    series_figure,
    stacked_figure,
    trace_figure,
)
from rlalign.dashboards.page import Chart, Table
from rlalign.dashboards.panels import PANELS, STEP, Section, panel_of
from rlalign.dashboards.pictures import table_rows
from rlalign.dashboards.sink import WORST_COLUMNS
from rlalign.dashboards.snapshot import LayerRow, Snapshot

Rows = Sequence[Mapping[str, Any]]
Series = dict[tuple[str, str], list[tuple[int, float]]]

_PHASES = "perf/seconds/"
_MAX_CHOICES = 12


def picture_blocks(name: str, snapshots: Mapping[int, Snapshot], *, width: str = "half") -> list[Chart | Table]:
    """The pictures of one run, or of one comparison (its only step is 0). name: put before the titles, may be empty."""
    before = f"{name}: " if name else ""
    blocks: list[Chart | Table] = []

    def add(title: str, figures: dict[str, Any], note: str, wide: str = width) -> None:
        if figures:
            blocks.append(Chart(f"{before}{title}", figures, note, wide))  # type: ignore[arg-type]

    chosen = _chosen(snapshots)
    positions = {step: one.positions for step, one in snapshots.items() if one.positions is not None}
    layers = {step: one.layers for step, one in snapshots.items() if one.layers is not None}
    pointed = {step: one for step, one in chosen.items() if one.points is not None}
    traced = {step: one for step, one in chosen.items() if one.trace is not None}
    add(
        "|Δ| of every token",
        {_step(s): histogram_figure(chosen[s].histogram) for s in chosen},
        "Exactly 0 has a bin of its own on the left; missing and non-finite log-probs one on the right.",
    )
    add(
        "probability by trainer and rollout",
        {_step(s): scatter_figure(one.points) for s, one in pointed.items()},
        "On the diagonal when all is well. Largest differences first, then an even choice of the rest.",
    )
    add(
        "where in the response",
        {"all": position_figure(positions)} if positions else {},
        "Largest |Δ| by position and step. Green: all equal. A dark row is one wrong position, a dark column one step.",
    )
    if layers:
        blocks.append(layer_chart(layers, before))
    add(
        "along the worst sequence",
        {_step(s): trace_figure(one.trace) for s, one in traced.items()},
        "Both log-probs, token by token, and their difference below.",
        "full",
    )
    if worst := worst_table(f"{before}worst tokens", chosen):
        blocks.append(worst)
    return blocks


def layer_chart(rows: Mapping[int | str, LayerRow], before: str = "") -> Chart:
    """How far each layer's output differs; one column per step, or per whatever the rows are named after."""
    note = "From the bisection. The first layer, from the input on, that isn't green is where the difference begins."
    return Chart(f"{before}which layer", {"": layer_figure(rows)}, note)


def worst_table(title: str, snapshots: Mapping[int, Snapshot], limit: int = 50) -> Table | None:
    """The worst tokens of all given steps, as each step ranked them; None if no token differs."""
    worst = [record for one in snapshots.values() for record in one.worst]
    # missing and non-finite ones first, as in every other list of ours
    order = sorted(range(len(worst)), key=lambda i: (worst[i]["kind"] == "differs", -abs(_size(worst[i]))))
    rows = table_rows([worst[i] for i in order[:limit]], WORST_COLUMNS)
    note = "key: step/prompt/sample of a run, the id of a dump's sequence. The token stands between ⟦ and ⟧."
    return Table(title, WORST_COLUMNS, rows, note) if rows else None


def series_blocks(runs: Mapping[str, Rows], section: Section) -> list[Chart]:
    """Every metric of the section that a run logged, in the order of the panels; statistics of one thing share a chart.

    runs: name to lines of ``metrics.jsonl``.
    """
    blocks: list[Chart] = []
    for panel in PANELS:
        if panel.section != section:
            continue
        series = {key: points for key, points in _series(runs).items() if panel_of(key[1]) is panel}
        families: dict[str, Series] = {}
        for key, points in series.items():
            if not key[1].startswith(_PHASES):
                families.setdefault(_family(key[1]), {})[key] = points
        for family, members in families.items():
            metrics = {metric for _, metric in members}
            # without a legend of statistics the heading must say which one it is
            title = family if len(metrics) > 1 else metrics.pop()
            # a panel's title says something only about a chart that is all of it
            note = panel.title if len(families) == 1 and panel.title != family else ""
            blocks.append(Chart(title, {"": series_figure(members)}, note, "third"))
    return blocks


def phase_blocks(runs: Mapping[str, Rows]) -> list[Chart]:
    """Seconds of each phase, stacked, one chart per run."""
    blocks = []
    for run, rows in runs.items():
        series = {
            key[1].removeprefix(_PHASES): p for key, p in _series({run: rows}).items() if key[1].startswith(_PHASES)
        }
        if series:
            title = f"{run}: seconds per phase" if len(runs) > 1 else "seconds per phase"
            blocks.append(Chart(title, {"": stacked_figure(series, "s")}, "", "half" if len(runs) > 1 else "full"))
    return blocks


_STATISTICS = ("mean", "std", "min", "max", "p50", "p99", "train", "rollout")


def _family(metric: str) -> str:
    """``align/ulp`` for ``align/ulp/max``: values of one scale; anything else is on its own."""
    head, _, last = metric.rpartition("/")
    return head if head and last in _STATISTICS else metric


def _series(runs: Mapping[str, Rows]) -> Series:
    found: Series = {}
    for run, rows in runs.items():
        for row in rows:
            for metric, value in row.items():
                # a flag is 0 or 1; texts have no place on an axis
                if metric != STEP and isinstance(value, int | float):
                    found.setdefault((run, metric), []).append((int(row[STEP]), float(value)))
    return found


def _chosen(snapshots: Mapping[int, Snapshot]) -> dict[int, Snapshot]:
    """Steps with full pictures, the last one first; some of them, evenly, where there are many."""
    full = [step for step, one in snapshots.items() if one.points is not None] or list(snapshots)[-1:]
    if len(full) > _MAX_CHOICES:
        full = [full[i] for i in np.linspace(0, len(full) - 1, _MAX_CHOICES).round().astype(int)]
    return {step: snapshots[step] for step in sorted(full, reverse=True)}


def _step(step: int) -> str:
    return f"step {step}"


def _size(record: Mapping[str, Any]) -> float:
    delta = record["delta"]
    return float("inf") if delta is None or delta != delta else float(delta)
