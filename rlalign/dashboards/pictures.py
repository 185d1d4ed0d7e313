"""Pictures of agreement: where the differences lie, how probabilities compare, and the worst tokens.

Drawn by matplotlib without a display. Legend: N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

# decades of |Δlogp|: below one float32 ULP of a tiny log-prob, up to beyond any plausible difference
_DECADES = (-10, 2)
_BINS_PER_DECADE = 4
_MAX_POINTS = 5000
# equal, different, not finite; the same in every renderer
GOOD, BAD, WORSE = "#2a9d4f", "#2f6fb0", "#c8352b"


@dataclass(frozen=True, slots=True)
class Trace:
    """Both log-probs along one sequence, or along a part of it.

    positions: int64 [T], in the response. rollout, train: float32 [T], NaN where missing. tokens: T texts, or ids.
    """

    name: str
    positions: np.ndarray
    rollout: np.ndarray
    train: np.ndarray
    tokens: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PictureData:
    """One step's comparison. rollout, train, delta: float32 [N] log-probs and their difference.

    nonfinite: bool [N], missing tokens included. worst: flat records of the worst tokens, all with the same keys.
    position: int64 [N], of each token in its response. trace: along the worst sequence. Both None where nobody says.
    """

    rollout: np.ndarray
    train: np.ndarray
    delta: np.ndarray
    nonfinite: np.ndarray
    worst: Sequence[dict[str, Any]]
    position: np.ndarray | None = None
    trace: Trace | None = None


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of |Δ|: exactly zero, not finite or missing, and int64 [B] between edges float64 [B+1] of log10 |Δ|."""

    zero: int
    nonfinite: int
    counts: np.ndarray
    edges: np.ndarray


def histogram(data: PictureData) -> Histogram:
    """Every token is in exactly one bin; what lies beyond the edges is in the outermost ones."""
    size = np.abs(data.delta[~data.nonfinite].astype(np.float64))
    edges = histogram_edges()
    logs = np.log10(size[size > 0]).clip(*_DECADES)
    return Histogram(
        zero=int((size == 0).sum()),
        nonfinite=int(data.nonfinite.sum()),
        counts=np.histogram(logs, edges)[0],
        edges=edges,
    )


def histogram_edges() -> np.ndarray:
    """Float64 [B+1] of log10 |Δ|: the same for every histogram, so that they add up."""
    low, high = _DECADES
    return np.linspace(low, high, (high - low) * _BINS_PER_DECADE + 1)


def draw_histogram(data: PictureData, *, title: str) -> Figure:
    """Bar chart of log10 |Δlogp|, exact zero in a bin of its own on the left, non-finite on the right."""
    h = histogram(data)
    figure, axes = _figure(7.0, 3.6)
    centres, width = (h.edges[:-1] + h.edges[1:]) / 2, h.edges[1] - h.edges[0]
    low, high = h.edges[0] - 1.8, h.edges[-1] + 1.8
    axes.bar(low, h.zero, width=0.8, color=GOOD)
    axes.bar(centres, h.counts, width=width * 0.95, color=BAD)
    axes.bar(high, h.nonfinite, width=0.8, color=WORSE)
    for x, count in ((low, h.zero), (high, h.nonfinite)):
        axes.annotate(f"{count:,}", (x, count), ha="center", va="bottom", fontsize=8)
    decades = np.arange(_DECADES[0], _DECADES[1] + 1, 2)
    axes.set_xticks([low, *decades, high], ["exactly 0", *(f"$10^{{{d}}}$" for d in decades), "NaN, ±inf,\nmissing"])
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0, max(h.zero, h.nonfinite, *h.counts, 1) * 4)
    total = len(data.delta)
    axes.set(
        xlabel="|Δ log-prob|, train − rollout", ylabel="tokens", title=f"{title}: Δ = 0 for {h.zero:,} of {total:,}"
    )
    return figure


def draw_scatter(data: PictureData, *, title: str) -> Figure:
    """Probability of each sampled token: trainer against rollout, on the diagonal when all is well."""
    chosen = chosen_points(data)
    figure, axes = _figure(4.6, 4.6)
    rollout, train = (np.exp(side[chosen].astype(np.float64)) for side in (data.rollout, data.train))
    differs = data.rollout[chosen].view(np.int32) != data.train[chosen].view(np.int32)
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1, zorder=1)
    for mask, color, label in ((~differs, GOOD, "equal"), (differs, BAD, "different")):
        axes.scatter(rollout[mask], train[mask], s=8, color=color, alpha=0.6, linewidths=0, label=label, zorder=2)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", xlabel="p of the rollout engine")
    finite = int((~data.nonfinite).sum())
    axes.set(ylabel="p of the trainer", title=f"{title}: {len(chosen):,} of {finite:,} tokens")
    axes.legend(loc="upper left", frameon=False, fontsize=8)
    return figure


def draw_trace(trace: Trace, *, title: str) -> Figure:
    """Both log-probs along one sequence, and their difference below."""
    figure, _ = _figure(9.0, 4.6)
    figure.clear()
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for side, color, style, label in ((trace.rollout, "#d07a1f", "-", "rollout"), (trace.train, BAD, ":", "train")):
        upper.plot(trace.positions, side, color=color, linestyle=style, marker=".", markersize=3, label=label)
    lower.bar(trace.positions, trace.train - trace.rollout, color=WORSE)
    upper.set(ylabel="log-prob", title=f"{title}: sample {trace.name}")
    lower.set(xlabel="position in the response", ylabel="Δ")
    upper.legend(loc="lower right", frameon=False, fontsize=8)
    return figure


def to_image(figure: Figure) -> Image:
    """The figure as a picture in memory."""
    import PIL.Image

    figure.canvas.draw()
    return PIL.Image.fromarray(np.asarray(figure.canvas.buffer_rgba()))


def table_rows(worst: Sequence[dict[str, Any]], columns: Sequence[str]) -> list[list[Any]]:
    """Rows of the worst-token table; a float that isn't finite is shown as None, since ``kind`` says why."""
    return [[_cell(record[column]) for column in columns] for record in worst]


def chosen_points(data: PictureData, limit: int = _MAX_POINTS) -> np.ndarray:
    """Indices, int64, of at most ``limit`` finite tokens: the largest differences, then evenly spaced ones."""
    finite = np.flatnonzero(~data.nonfinite)
    if len(finite) <= limit:
        return finite
    by_size = finite[np.argsort(-np.abs(data.delta[finite]), kind="stable")]
    half = limit // 2
    rest = by_size[half:]
    return np.concatenate([by_size[:half], rest[np.linspace(0, len(rest) - 1, limit - half).astype(np.int64)]])


def _cell(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    # the object interface: no pyplot, hence no global figure list and no display
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
