"""Causes that lie in how log-probs were stored: beside other tokens or sequences, to another base, with fewer digits.

Legend: N tokens of all sequences one after another; places count sequences from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from rlalign.verifier.causes import Cause, Way
from rlalign.verifier.score import effective_sampling
from rlalign.verifier.scores import Scores, last_place, on_grid

_BASES = (2, 10)
# how far from 1/ln base the middle factor may be, and those of all but a tenth of |log-prob| at either end
_MIDDLE, _ENDS = 0.01, 0.05
_LEAST_TOKENS = 20
_MIN_VALUES = 40
_DECIMALS = range(1, 7)
# tokens, and standard errors, by which log-probs are another sequence's and not their own
_LEAST_ALIKE, _SURELY_ALIKE = 8, 6.0
# one dump in e**20
_CHANCE = 20.0


def shift_causes() -> list[Cause]:
    """Log-probs stored one place off their tokens."""

    def moved(shift: int) -> Callable[[Way, int], Way]:
        return lambda way, _place: replace(way, shift=shift)

    remedy = "store the log-prob beside its own token: index i of both lists (TRL, verl: check the shift by one)"
    return [
        Cause("shifted_index[+1]", "data", "each token carries the log-prob of the next token", remedy, moved(1)),
        Cause("shifted_index[-1]", "data", "each token carries the log-prob of the previous token", remedy, moved(-1)),
    ]


def swaps(scores: Scores, now: np.ndarray) -> list[Cause]:
    """The cause that sequences carry each other's log-probs, if any do: their |Δ| to the other's scores is far smaller
    than to their own, or they rise and fall with the other's and not with their own, as they do at any temperature."""
    ends = np.cumsum([0, *(len(s.token_ids) for s in scores.sequences)])
    scored = [now[a:b] for a, b in pairwise(ends.tolist())]
    own = scores.distance(now)
    partners: dict[int, int] = {}
    for place, sequence in enumerate(scores.sequences):
        mine = own[ends[place] : ends[place + 1]]
        if np.isfinite(mine).sum() < 2 or not np.nanmean(mine):
            continue
        others = [
            (_mean_distance(sequence.logprobs, scored[other]), other)
            for other in range(len(scored))
            if other != place and len(scored[other]) == len(mine)
        ]
        nearest = min(others, default=(np.inf, -1))
        if nearest[0] <= 0.25 * np.nanmean(mine):
            partners[place] = nearest[1]
            continue
        alike = max(
            ((_likeness(sequence.logprobs, scored[other]), other) for _, other in others), default=(-np.inf, -1)
        )
        if alike[0] > _likeness(sequence.logprobs, scored[place]) + _SURELY_ALIKE:
            partners[place] = alike[1]
    return [swap_cause(partners, [s.name for s in scores.sequences])] if partners else []


def _mean_distance(a: np.ndarray, b: np.ndarray) -> float:
    both = np.isfinite(a) & np.isfinite(b)
    return float(np.abs(a[both].astype(np.float64) - b[both]).mean()) if both.sum() >= 2 else float("inf")


def _likeness(a: np.ndarray, b: np.ndarray) -> float:
    """Fisher's z of the correlation of log-probs [n], in standard errors of what chance gives."""
    both = np.isfinite(a) & np.isfinite(b)
    if both.sum() < _LEAST_ALIKE or not (np.ptp(a[both]) and np.ptp(b[both])):
        return 0.0
    with np.errstate(divide="ignore"):
        return float(np.arctanh(np.corrcoef(a[both].astype(np.float64), b[both])[0, 1])) * (both.sum() - 3) ** 0.5


def fitted_base(scores: Scores, ways: Sequence[Way], now: np.ndarray) -> list[Cause]:
    """The base of the logarithm, where all log-probs that differ are off by its factor, and a temperature is not as
    good: of a token beside one that has nearly all the mass, a temperature of ln base makes the same."""
    differs = scores.counts & (now < 0) & np.isfinite(now) & (now.view(np.int32) != scores.reported.view(np.int32))
    if differs.sum() < _LEAST_TOKENS:
        return []
    size = -now[differs].astype(np.float64)
    factors = -scores.reported[differs] / size
    order = np.argsort(factors)
    # the line through 0 of least |Δ| has the median of the factors, each counted as its |log-prob|
    low, middle, high = factors[order][np.searchsorted(np.cumsum(size[order]), size.sum() * np.array([0.1, 0.5, 0.9]))]
    for base in _BASES:
        one = 1 / math.log(base)
        if abs(middle / one - 1) <= _MIDDLE and (1 - _ENDS) * one <= low and high <= (1 + _ENDS) * one:
            left = scores.gap(scores.of([replace(way, base=base) for way in ways]), differs).mean_abs
            colder = scores.beside(ways, _colder(scores, math.log(base)))
            least = float(last_place(now[differs]).mean())
            if colder is None or scores.gap(colder, differs).mean_abs > 2 * max(left, least):
                return [base_cause(base)]
    return []


def _colder(scores: Scores, factor: float) -> Cause:
    """Every temperature times ``factor``."""

    def change(way: Way, place: int) -> Way:
        named = effective_sampling(scores.sequences[place], way.settings).temperature or 1.0
        return replace(way, settings=replace(way.settings, temperature=named * factor))

    return Cause("", "sampling", "", "", change)


def stored_grid(scores: Scores) -> str | None:
    """What all log-probs of the dump fit into, as ``on_grid`` names it, where that many would not by chance."""
    values = np.unique(scores.reported[scores.counts & (scores.reported != 0)])
    if len(values) < _MIN_VALUES:
        return None
    fits = (grid for grid in ("bfloat16", "float16") if (on_grid(values, grid) == values).all())
    return next(fits, None) or next((f"{n} decimals" for n in _DECIMALS if _has_decimals(values, n)), None)


def _has_decimals(values: np.ndarray, count: int) -> bool:
    """Whether float32 values [N] have no more than ``count``, although there is room for more between them."""
    if not (on_grid(values, f"{count} decimals") == values).all():
        return False
    by_chance = np.minimum(1.0, np.spacing(np.abs(values)).astype(np.float64) * 10**count)
    return -float(np.log(by_chance[np.abs(values) >= 10**-count]).sum()) > _CHANCE


def grid_causes(scores: Scores) -> list[Cause]:
    """That the dump's log-probs were rounded to what they all fit into, if there is such a thing."""
    grid = stored_grid(scores)
    if grid is None:
        return []
    return [
        Cause(
            f"stored[{grid}]", "data", f"every log-prob of the dump fits into {grid}: rounded where it was stored",
            "store log-probs as float32, in text with nine digits", lambda way, _place: replace(way, grid=grid),
        )
    ]  # fmt: skip


def swap_cause(partners: Mapping[int, int], ids: Sequence[str]) -> Cause:
    """Log-probs that belong to other sequences: partners[i] is whose the i-th sequence, called ids[i], carries."""
    pairs = ", ".join(f"{ids[a]} carries those of {ids[b]}" for a, b in sorted(partners.items()))
    return Cause(
        "swapped_sequences", "data", f"log-probs of other sequences (by id: {pairs})",
        "match log-probs to sequences by request id, not by order of arrival",
        lambda way, place: replace(way, partner=partners.get(place)),
    )  # fmt: skip


def base_cause(base: int) -> Cause:
    """Logarithms to another base than e."""
    return Cause(
        f"log_base[{base}]", "data", f"the log-probs are logarithms to base {base}, not to base e",
        f"report natural logarithms (torch.log, not log{base}), or multiply by ln {base} = {math.log(base):.6g}",
        lambda way, _place: replace(way, base=base),
    )  # fmt: skip
