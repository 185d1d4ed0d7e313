"""What the pictures show of one comparison, reduced until it is small whatever the comparison's size.

A run writes one snapshot per step into ``pictures.jsonl``; a report draws them later, without the tokens. Legend: N
tokens of the comparison, B bins of positions, K chosen points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlalign.dashboards.pictures import Histogram, PictureData, Trace, chosen_points, histogram, histogram_edges

MAX_BINS = 128
_MAX_POINTS = 1000


@dataclass(frozen=True, slots=True)
class PositionRow:
    """Max |Δ| by position in the response: float64 [B], each of ``width`` positions, a power of two.

    NaN where no response has a token, inf where a log-prob is missing or not finite.
    """

    width: int
    max_abs: np.ndarray


@dataclass(frozen=True, slots=True)
class LayerRow:
    """How far each layer's output differs between two settings: one float of ``unit`` per layer, 0 where bitwise equal,
    inf where not finite."""

    names: tuple[str, ...]
    difference: tuple[float, ...]
    unit: str = "ULP"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One comparison's pictures. points: float32 [2, K] log-probs (rollout, train) of chosen tokens, None if left out.

    worst: flat records of the worst tokens. Whatever nobody measured is None, and its picture is left out.
    """

    num_tokens: int
    histogram: Histogram
    positions: PositionRow | None = None
    points: np.ndarray | None = None
    worst: tuple[dict[str, Any], ...] = ()
    trace: Trace | None = None
    layers: LayerRow | None = None


def take_snapshot(data: PictureData, *, full: bool = True, layers: LayerRow | None = None) -> Snapshot:
    """Snapshot of a comparison; without ``full`` no points, worst tokens and trace, and 0.3-3 KB as JSON."""
    return Snapshot(
        num_tokens=len(data.delta),
        histogram=histogram(data),
        positions=None if data.position is None else position_row(data),
        points=_points(data) if full else None,
        worst=tuple(data.worst) if full else (),
        trace=data.trace if full else None,
        layers=layers,
    )


def _points(data: PictureData) -> np.ndarray:
    chosen = chosen_points(data, _MAX_POINTS)
    return np.stack([data.rollout[chosen], data.train[chosen]])


def position_row(data: PictureData) -> PositionRow:
    """Largest |Δ| of every bin of positions; at most ``MAX_BINS``. ``data.position`` must be there."""
    position = data.position
    if position is None or len(position) == 0:
        return PositionRow(1, np.zeros(0))
    width = 1
    while position.max() // width >= MAX_BINS:
        width *= 2
    size = np.where(data.nonfinite, np.inf, np.abs(data.delta.astype(np.float64)))
    # maximum.at needs a number to start from, and no |Δ| is below 0
    row = np.full(int(position.max()) // width + 1, -1.0)
    np.maximum.at(row, position // width, size)
    return PositionRow(width, np.where(row < 0, np.nan, row))


def merge_positions(rows: Sequence[PositionRow]) -> PositionRow:
    """The rows' maximum, bin by bin, at the widest row's width. ValueError for no rows."""
    width = max(row.width for row in rows)
    coarse = [_coarser(row, width) for row in rows]
    merged = np.full(max(map(len, coarse)), np.nan)
    for row in coarse:
        merged[: len(row)] = np.fmax(merged[: len(row)], row)
    return PositionRow(width, merged)


def position_cells(
    rows: Mapping[int, PositionRow], max_columns: int = 400
) -> tuple[np.ndarray, int, list[tuple[int, int]]]:
    """The heat map position × step: float64 [bins, columns], positions per bin, (first, last) step of each column.

    NaN where no response has a token, inf where not finite. Neighbouring steps share a column where there are too many.
    """
    steps = sorted(rows)
    group = math.ceil(len(steps) / max_columns)
    columns = [steps[i : i + group] for i in range(0, len(steps), group)]
    width = max(row.width for row in rows.values())
    empty = PositionRow(width, np.zeros(0))
    merged = [merge_positions([empty, *(rows[step] for step in column)]) for column in columns]
    cells = np.full((max(len(row.max_abs) for row in merged), len(merged)), np.nan)
    for index, row in enumerate(merged):
        cells[: len(row.max_abs), index] = row.max_abs
    return cells, width, [(column[0], column[-1]) for column in columns]


def snapshot_to_dict(snapshot: Snapshot) -> dict[str, Any]:
    """JSON's own types, NaN and infinities as floats; ``snapshot_from_dict`` takes it back."""
    h = snapshot.histogram
    values: dict[str, Any] = {
        "num_tokens": snapshot.num_tokens,
        "histogram": {"zero": h.zero, "nonfinite": h.nonfinite, "counts": h.counts.tolist()},
    }
    if (row := snapshot.positions) is not None:
        values["positions"] = {"width": row.width, "max_abs": _digits(row.max_abs)}
    if snapshot.points is not None:
        values["points"] = {name: _digits(side) for name, side in zip(_SIDES, snapshot.points, strict=True)}
    if snapshot.worst:
        values["worst"] = list(snapshot.worst)
    if (trace := snapshot.trace) is not None:
        sides = {name: _digits(getattr(trace, name)) for name in _SIDES}
        values["trace"] = {
            "name": trace.name,
            "positions": trace.positions.tolist(),
            **sides,
            "tokens": list(trace.tokens),
        }
    if (layers := snapshot.layers) is not None:
        values["layers"] = {
            "names": list(layers.names),
            "difference": list(layers.difference),
            "unit": layers.unit,
        }
    return values


def snapshot_from_dict(values: Mapping[str, Any]) -> Snapshot:
    """A line of ``pictures.jsonl``. Raises KeyError or ValueError naming what is missing or of another version."""
    h, edges = values["histogram"], histogram_edges()
    if len(h["counts"]) != len(edges) - 1:
        raise ValueError(f"field 'histogram.counts' has {len(h['counts'])} bins, this version draws {len(edges) - 1}")
    row, points, trace, layers = (values.get(name) for name in ("positions", "points", "trace", "layers"))
    return Snapshot(
        num_tokens=values["num_tokens"],
        histogram=Histogram(h["zero"], h["nonfinite"], np.array(h["counts"], np.int64), edges),
        positions=None if row is None else PositionRow(row["width"], np.array([float(x) for x in row["max_abs"]])),
        points=None if points is None else np.stack([_floats(points[name]) for name in _SIDES]),
        worst=tuple({name: _number(value) for name, value in one.items()} for one in values.get("worst", ())),
        trace=None
        if trace is None
        else Trace(
            trace["name"],
            np.array(trace["positions"], np.int64),
            *(_floats(trace[name]) for name in _SIDES),
            tuple(trace["tokens"]),
        ),
        layers=None
        if layers is None
        else LayerRow(tuple(layers["names"]), tuple(float(x) for x in layers["difference"]), layers["unit"]),
    )


_SIDES = ("rollout", "train")


def _coarser(row: PositionRow, width: int) -> np.ndarray:
    factor = width // row.width
    padded = np.full(math.ceil(len(row.max_abs) / factor) * factor, np.nan)
    padded[: len(row.max_abs)] = row.max_abs
    # fmax passes over bins without a token
    return np.fmax.reduce(padded.reshape(-1, factor), axis=1) if len(padded) else padded


def _digits(values: np.ndarray) -> list[float]:
    """Nine digits, which tell float32 values apart."""
    return [float(f"{value:.9g}") for value in values.tolist()]


def _floats(values: Sequence[Any]) -> np.ndarray:
    # strict JSON writes NaN and infinities as words, which float() reads
    return np.array([float(value) for value in values], np.float32)


def _number(value: Any) -> Any:
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value
