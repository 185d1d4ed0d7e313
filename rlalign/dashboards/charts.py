"""The pictures as Plotly figures: plain dicts of data and layout, so that drawing them needs no plotly in Python.

Numbers come from ``pictures`` and ``snapshot``; here they only get axes, colours and words.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlalign.dashboards.pictures import BAD, GOOD, WORSE, Histogram, Trace
from rlalign.dashboards.snapshot import LayerRow, PositionRow, position_cells

Figure = dict[str, Any]

_GREY = "#9aa0a6"
COLORS = ("#2f6fb0", "#d07a1f", "#7b4fa3", "#2a9d4f", "#c8352b", "#4f8f8b", "#8a6d3b", "#b0457f")
_DASHES = ("solid", "dot")
_MAX_TRACE_TICKS = 12
# up to so many steps each has its tick; beyond, Plotly chooses whole numbers by itself
_MAX_STEP_TICKS = 10


def histogram_figure(h: Histogram) -> Figure:
    """Tokens by log10 |Δ|: exact zero in a bin of its own on the left, missing and non-finite ones on the right."""
    low, high = float(h.edges[0]) - 1.8, float(h.edges[-1]) + 1.8
    centres = ((h.edges[:-1] + h.edges[1:]) / 2).tolist()
    spans = [f"{10**a:.2g} to {10**b:.2g}" for a, b in zip(h.edges[:-1], h.edges[1:], strict=True)]
    decades = list(range(int(h.edges[0]), int(h.edges[-1]) + 1, 2))
    bars = [
        _bar([low], [h.zero], ["exactly 0"], 0.8, GOOD, text=True),
        _bar(centres, h.counts.tolist(), spans, float(h.edges[1] - h.edges[0]) * 0.95, BAD),
        _bar([high], [h.nonfinite], ["NaN, ±inf or missing"], 0.8, WORSE, text=True),
    ]
    top = max(h.zero, h.nonfinite, int(h.counts.max()), 1)
    layout = _layout("|Δ log-prob|, train − rollout", "tokens", height=320)
    layout["xaxis"] |= {
        "tickvals": [low, *decades, high],
        "ticktext": ["0", *(f"1e{d}" for d in decades), "NaN, inf"],
        "range": [low - 0.8, high + 0.8],
    }
    # the axis begins below 1, or a bar of a single token would have no height
    layout["yaxis"] |= {"type": "log", "range": [math.log10(0.5), math.log10(top * 3)], "dtick": 1}
    return {"data": bars, "layout": layout | {"showlegend": False}}


def scatter_figure(points: np.ndarray) -> Figure:
    """Probability by the trainer against probability by the rollout. points: float32 [2, K] log-probs."""
    rollout, train = np.exp(points.astype(np.float64))
    differs = points[0].view(np.int32) != points[1].view(np.int32)
    diagonal = {"x": [0, 1], "y": [0, 1], "mode": "lines", "line": {"color": _GREY, "width": 1}, "hoverinfo": "skip"}
    traces: list[Figure] = [{"type": "scatter", "showlegend": False, **diagonal}]
    for mask, color, name in ((~differs, GOOD, "equal"), (differs, BAD, "different")):
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": _six(rollout[mask]),
                "y": _six(train[mask]),
                "marker": {"color": color, "size": 5, "opacity": 0.6},
                "hovertemplate": "rollout %{x:.6g}<br>train %{y:.6g}",
            }
        )
    layout = _layout("p of the rollout engine", "p of the trainer", height=380)
    layout["xaxis"] |= {"range": [-0.02, 1.02], "constrain": "domain"}
    layout["yaxis"] |= {"range": [-0.02, 1.02], "scaleanchor": "x"}
    return {"data": traces, "layout": layout}


def position_figure(rows: Mapping[int, PositionRow]) -> Figure:
    """Heat map of max |Δ|: response position upwards, steps (the mapping's keys) to the right."""
    cells, width, columns = position_cells(rows)
    figure = _heat_map(cells, "|Δ|", [_span(first, last) for first, last in columns])
    figure["data"][0] |= {"x": [first for first, _ in columns], "y": [index * width for index in range(len(cells))]}
    figure["data"][0]["hovertemplate"] = (
        "step %{customdata[0]}<br>position %{y}<br>max |Δ| %{customdata[1]}<extra></extra>"
    )
    figure["layout"] |= _layout("step" if len(columns) > 1 else "", "position in the response", height=380)
    figure["layout"]["xaxis"] |= _whole([first for first, _ in columns])
    if len(columns) == 1:  # its width means nothing, so neither does its axis
        figure["layout"]["xaxis"]["showticklabels"] = False
    return figure


def layer_figure(rows: Mapping[int | str, LayerRow]) -> Figure:
    """Heat map of how far each layer's output differs: layers upwards, steps to the right, in the mapping's order.

    Rows must name the same layers in the same unit, or it is a ValueError.
    """
    steps = list(rows)
    first = rows[steps[0]]
    for step in steps:
        if (rows[step].names, rows[step].unit) != (first.names, first.unit):
            raise ValueError(f"step {step} names other layers, or another unit, than step {steps[0]}")
    cells = np.array([rows[step].difference for step in steps], np.float64).T
    figure = _heat_map(cells, first.unit, [str(step) for step in steps])
    figure["data"][0] |= {"x": [str(step) for step in steps], "y": list(first.names)}
    figure["data"][0]["hovertemplate"] = f"step %{{x}}<br>%{{y}}<br>%{{customdata[1]}} {first.unit}<extra></extra>"
    figure["layout"] |= _layout("step" if len(steps) > 1 else "", "", height=max(300, 18 * len(first.names) + 100))
    figure["layout"]["xaxis"]["type"] = "category"
    figure["layout"]["yaxis"] |= {"type": "category", "automargin": True}
    return figure


def trace_figure(trace: Trace) -> Figure:
    """Both log-probs along one sequence, and their difference below."""
    positions = trace.positions.tolist()
    tokens = list(trace.tokens)
    delta = trace.train - trace.rollout
    sides = (("rollout", trace.rollout, "#d07a1f", "solid"), ("train", trace.train, BAD, "dot"))
    lines = [
        {
            "type": "scatter", "mode": "lines+markers", "name": name, "x": positions, "y": _six(side),
            "text": tokens, "line": {"color": color, "width": 1.5, "dash": dash}, "marker": {"size": 4},
            "hovertemplate": f"%{{text}}<br>position %{{x}}<br>{name} %{{y:.9g}}<extra></extra>",
        }
        for name, side, color, dash in sides
    ]  # fmt: skip
    bars = {
        "type": "bar", "name": "Δ", "x": positions, "y": _six(delta), "yaxis": "y2",
        "text": tokens, "textposition": "none",
        "marker": {"color": WORSE}, "hovertemplate": "%{text}<br>position %{x}<br>Δ %{y:.6g}<extra></extra>",
    }  # fmt: skip
    layout = _layout(f"position in the response of {trace.name}", "log-prob", height=400)
    layout["yaxis"]["domain"] = [0.36, 1.0]
    layout["yaxis2"] = {
        "title": {"text": "Δ"},
        "domain": [0.0, 0.26],
        "zeroline": True,
        "exponentformat": "e",
        "minexponent": 3,
    }
    layout["xaxis"] |= {"anchor": "y2", "nticks": _MAX_TRACE_TICKS}
    return {"data": [*lines, bars], "layout": layout}


def series_figure(series: Mapping[tuple[str, str], Sequence[tuple[int, float]]]) -> Figure:
    """Metrics by step. series: (run, metric) to (step, value); runs differ by dash, metrics by colour.

    A value that is not finite is a red cross on top, never a gap.
    """
    runs = list(dict.fromkeys(run for run, _ in series))
    metrics = list(dict.fromkeys(metric for _, metric in series))
    finite = [value for points in series.values() for _, value in points if math.isfinite(value)]
    top = max(finite, default=0.0)
    traces: list[Figure] = []
    for (run, metric), points in series.items():
        name = _legend(run, metric, runs, metrics)
        # one metric of two runs: the runs get the colours
        color = COLORS[(metrics.index(metric) if len(metrics) > 1 else runs.index(run)) % len(COLORS)]
        line = {"color": color, "width": 1.6, "dash": _DASHES[runs.index(run) % len(_DASHES)]}
        good = [(step, value) for step, value in points if math.isfinite(value)]
        bad = [(step, value) for step, value in points if not math.isfinite(value)]
        common = {"type": "scatter", "name": name, "legendgroup": name}
        traces.append(
            {
                **common,
                "mode": "lines+markers" if len(good) <= 60 else "lines",
                "x": [step for step, _ in good],
                "y": [float(f"{value:.9g}") for _, value in good],
                "line": line,
                "marker": {"size": 4},
                "hovertemplate": "step %{x}: %{y:.6g}",
            }
        )
        if bad:
            cross = {"symbol": "x", "color": WORSE, "size": 9}
            traces.append(
                {
                    **common,
                    "mode": "markers",
                    "showlegend": False,
                    "x": [step for step, _ in bad],
                    "y": [top] * len(bad),
                    "text": [str(value) for _, value in bad],
                    "marker": cross,
                    "hovertemplate": "step %{x}: %{text}",
                }
            )
    layout = _layout("step", "", height=280)
    layout["xaxis"] |= _whole([step for points in series.values() for step, _ in points])
    return {"data": traces, "layout": layout | {"showlegend": len(series) > 1}}


def stacked_figure(series: Mapping[str, Sequence[tuple[int, float]]], unit: str) -> Figure:
    """Parts of a whole by step, such as the seconds of each phase."""
    traces = [
        {
            "type": "bar", "name": name, "x": [step for step, _ in points], "y": [float(f"{v:.6g}") for _, v in points],
            "marker": {"color": COLORS[index % len(COLORS)]}, "hovertemplate": f"step %{{x}}: %{{y:.4g}} {unit}",
        }
        for index, (name, points) in enumerate(series.items())
    ]  # fmt: skip
    return {"data": traces, "layout": _layout("step", unit, height=320) | {"barmode": "stack", "bargap": 0.05}}


def _heat_map(cells: np.ndarray, unit: str, columns: Sequence[str]) -> Figure:
    """Colours by log10; exactly 0 is green, not finite is red, no token stays blank. cells: float64 [rows, columns]."""
    positive = cells[np.isfinite(cells) & (cells > 0)]
    low = math.floor(math.log10(positive.min())) if len(positive) else -1
    high = max(low + 1, math.ceil(math.log10(positive.max()))) if len(positive) else 0
    gap = 0.08 * (high - low)  # of the scale, for what is not on it
    with np.errstate(divide="ignore"):
        logs = np.where(cells == 0, low - gap, np.where(np.isinf(cells), high + gap, np.log10(np.abs(cells))))
    z = [[None if math.isnan(value) else round(value, 3) for value in row] for row in logs.tolist()]
    share = gap / (high - low + 2 * gap)
    shown = [["" if math.isnan(value) else f"{value:.4g}" for value in row] for row in cells.tolist()]
    ticks = list(range(low, high + 1, max(1, (high - low) // 6)))
    heat = {
        "type": "heatmap",
        "z": z,
        "zmin": low - gap,
        "zmax": high + gap,
        "customdata": [[[column, cell] for column, cell in zip(columns, row, strict=True)] for row in shown],
        "colorscale": [
            [0.0, GOOD], [share * 0.9, GOOD], [share * 0.9, "#eef3f8"], [0.5, "#7fa9d1"], [1 - share * 0.9, "#173a63"],
            [1 - share * 0.9, WORSE], [1.0, WORSE],
        ],
        "colorbar": {
            "title": {"text": unit},
            "tickvals": [low - gap, *ticks, high + gap],
            "ticktext": ["0", *(f"1e{tick}" for tick in ticks), "inf"],
        },
    }  # fmt: skip
    return {"data": [heat], "layout": {}}


def _whole(steps: Sequence[int]) -> Figure:
    """Ticks of an axis of few steps: there is nothing between two of them."""
    return {"dtick": 1} if steps and max(steps) - min(steps) < _MAX_STEP_TICKS else {}


def _bar(
    x: Sequence[float], y: Sequence[int], names: Sequence[str], width: float, color: str, *, text: bool = False
) -> Figure:
    bar: Figure = {
        "type": "bar", "x": list(x), "y": list(y), "width": width, "marker": {"color": color},
        "customdata": list(names), "hovertemplate": "%{customdata}: %{y:,} tokens<extra></extra>",
    }  # fmt: skip
    return bar | ({"text": [f"{count:,}" for count in y], "textposition": "outside"} if text else {})


def _layout(x: str, y: str, *, height: int) -> Figure:
    axis: Figure = {"gridcolor": "#ececec", "linecolor": "#bbbbbb", "zeroline": False, "automargin": True}
    return {
        "height": height,
        # Plotly's buttons have the upper margin to themselves and the legend
        "margin": {"l": 56, "r": 16, "t": 34, "b": 44},
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "xaxis": {**axis, "title": {"text": x}},
        "yaxis": {**axis, "title": {"text": y}, "exponentformat": "e", "minexponent": 3},
    }


def _legend(run: str, metric: str, runs: Sequence[str], metrics: Sequence[str]) -> str:
    short = metric.rpartition("/")[2] if len({m.rpartition("/")[0] for m in metrics}) == 1 else metric
    parts = [part for part, wanted in ((run, len(runs) > 1), (short, len(metrics) > 1)) if wanted]
    return " · ".join(parts) or metric


def _six(values: np.ndarray) -> list[float | None]:
    """Nine digits; None, which Plotly leaves out, where not finite."""
    return [float(f"{value:.9g}") if math.isfinite(value) else None for value in values.tolist()]


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}–{last}"
