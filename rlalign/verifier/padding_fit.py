"""Padding that attention sees, up to widths that the dump does not name: of each sequence the one of least error.

A batch is padded to its own longest prompt, and a dump may be of several. Legend: N tokens of all sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rlalign.verifier.causes import Cause, Way, position_causes, setting_cause
from rlalign.verifier.score import ScoreSettings
from rlalign.verifier.scores import Scores

_PADDING = "padding."
# times what another order of summation gives
_FAR_OFF = 3.0
# widths that are tried; of one that is believed: tokens that it is told by, and what it leaves
_MOST_WIDTHS, _LEAST_TOKENS, _HALF = 16, 4, 0.5


def padding_causes(scores: Scores, ways: Sequence[Way], now: np.ndarray) -> list[Cause]:
    """One cause for every kind of padding, if padding to another one than the longest prompt's length is nearer in any
    sequence. Not tried within rounding, for it takes a forward for every length of a prompt."""
    # of many lengths the larger ones are more likely a batch's largest
    widths = sorted({len(sequence.prompt_token_ids) for sequence in scores.sequences})[1:-1][-_MOST_WIDTHS:]
    order = scores.other_order(ways) if widths else None
    floor = 0.0 if order is None else scores.apart(order, now) or 0.0
    if not widths or scores.gap(now).mean_abs <= _FAR_OFF * floor:
        return []
    found = []
    for alike in (cause for cause in position_causes() if cause.name.startswith(_PADDING)):
        try:
            nearest = _nearest(scores, ways, now, alike, widths)
        except (ValueError, NotImplementedError):  # no room for so many positions, or beside what is kept by now
            continue
        if any(way.settings.pad_to is not None for way in nearest):
            found.append(_cause(alike, nearest))
    return found


def _nearest(scores: Scores, ways: Sequence[Way], now: np.ndarray, alike: Cause, widths: Sequence[int]) -> list[Way]:
    """Of every sequence the way of least mean |Δ|: as it is, padded to the longest prompt, or to one of ``widths``
    where that is far nearer than either."""
    kind = alike.change(Way(), 0).settings
    padded = [[_padded(way, replace(kind, pad_to=width)) for way in ways] for width in (None, *widths)]
    errors = np.array([_errors(scores, scored) for scored in (now, *map(scores.of, padded))])
    plain = errors[:2].argmin(axis=0)
    clear = errors[2:].min(axis=0) < _HALF * errors[:2].min(axis=0)
    best = np.where(clear, errors.argmin(axis=0), plain)
    return [(ways, *padded)[index][place] for place, index in enumerate(best.tolist())]


def _errors(scores: Scores, scored: np.ndarray) -> np.ndarray:
    """Mean |Δ| float64 of every sequence; 0, which nothing is nearer than, where it has too few tokens."""
    size = scores.distance(scored)
    mine = (size[(scores.place == place) & np.isfinite(size)] for place in range(len(scores.sequences)))
    return np.array([values.mean() if len(values) >= _LEAST_TOKENS else 0.0 for values in mine])


def _padded(way: Way, like: ScoreSettings) -> Way:
    values = {name: getattr(like, name) for name in ("padding", "pad_to", "pad_position")}
    return setting_cause("", "positions", "", "", **values).change(way, 0)


def _cause(alike: Cause, nearest: Sequence[Way]) -> Cause:
    """With what ``nearest`` has of padding, whatever else a way is."""

    def change(way: Way, place: int) -> Way:
        settings = nearest[place].settings
        return way if settings.padding == "none" else _padded(way, settings)

    what = alike.what.replace("up to the longest prompt's length", "up to the longest of its batch")
    return replace(alike, name=f"{alike.name}.batches", what=what, change=change, guessed=True)
