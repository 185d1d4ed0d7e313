"""Heat map of a difference: layer by token (a bisection's), or anything else with two axes. Drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rlalign.dashboards.pictures import _figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_LABELS = 40
_MAX_COLUMN_LABELS = 12


def draw_heat_map(
    values: np.ndarray,
    rows: Sequence[str],
    *,
    title: str,
    x_label: str = "token",
    columns: Sequence[str] | None = None,
    what: str = "max |Δ|",
    blank_nan: bool = False,
) -> Figure:
    """values: float64 [rows, columns], not negative. Exactly 0 is green, what is not finite red, the rest by decade.

    The first row is at the bottom, so that depth grows upwards. columns: what to call them; None: by number, from 0.
    blank_nan: a NaN stands for nothing there.
    """
    from matplotlib.colors import LogNorm

    figure, axes = _figure(8.0, max(2.4, 1.4 + 0.16 * min(len(rows), 60)))
    finite = np.isfinite(values)
    shown = np.ma.masked_where((values <= 0) | ~finite, values)
    low, high = (float(shown.min()), float(shown.max())) if shown.count() else (1e-9, 1.0)
    span = {"aspect": "auto", "origin": "lower", "interpolation": "nearest"}
    ground = np.where(finite, 0.0, 1.0)
    if blank_nan:
        ground[np.isnan(values)] = np.nan
    axes.imshow(ground, cmap=_two("#bfe3c8", "#c8352b"), vmin=0, vmax=1, **span)
    image = axes.imshow(shown, cmap="plasma", norm=LogNorm(low, max(high, low * 10)), **span)
    every = max(1, -(-len(rows) // _MAX_LABELS))
    axes.set_yticks(range(0, len(rows), every), list(rows)[::every], fontsize=7)
    if columns is not None:
        every = max(1, -(-len(columns) // _MAX_COLUMN_LABELS))
        axes.set_xticks(range(0, len(columns), every), list(columns)[::every], fontsize=8)
    axes.set(xlabel=x_label, title=title)
    figure.colorbar(image, ax=axes, label=f"{what} (green: equal bits)")
    return figure


def _two(zero: str, one: str) -> object:
    from matplotlib.colors import ListedColormap

    return ListedColormap([zero, one])
