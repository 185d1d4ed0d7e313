"""Which causes explain a difference together: the one that removes most first, the others tried on top of it.

A cause is kept if it removes at least ``MIN_SHARE`` of the mean |Δ| by a margin that chance does not give; one of
arithmetic alone ``MIN_NUMERIC_SHARE``, since two roundings of the same size always hide a part of each other. A coarser
dtype than scoring's adds errors of its own, so that little of |Δ| goes: it is known by errors that go the same way.
Legend: N tokens of all sequences one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rlalign.verifier import causes as catalogue
from rlalign.verifier.attribution import Step
from rlalign.verifier.causes import Cause, Way
from rlalign.verifier.edge import outside_by_rounding, without_edge
from rlalign.verifier.scores import Scores
from rlalign.verifier.words import counted

MIN_SHARE = 0.05
MIN_NUMERIC_SHARE = 0.25
_MIN_STANDARD_ERRORS = 4.0
_MAX_STEPS = 5
# at most so many times another
_OF_A_SIZE = 1.5
# times the median
_LARGE = 3.0
# what a finer dtype removes where the engine has it: all but the last places of float32
_MOST = 0.95
# one sequence by itself can be lucky: it needs some tokens, and to have been far off
_MIN_TOKENS = 4
_FAR_OFF = 3.0
_SOME = 0.05
# of what another order of summation gives: no reason to name the less common of two causes
_OF_ROUNDING = 0.1

# what there is to try, given the ways so far and their log-probs; the flag: also what is fitted to what is left
Tries = Callable[[Sequence[Way], np.ndarray, bool], list[Cause]]


def greedily(
    scores: Scores,
    ways: list[Way],
    now: np.ndarray,
    tries: Tries,
    progress: Callable[[str], None],
) -> tuple[list[Step], list[Way], np.ndarray]:
    """Causes that were kept, how sequences are scored with them, and the log-probs float32 [N] of that."""
    steps: list[Step] = []
    order = scores.other_order(ways)
    floor = 0.0 if order is None else scores.apart(order, now) or 0.0
    while len(steps) < _MAX_STEPS and scores.gap(now).mismatches:
        best: tuple[float, Cause, list[Way], np.ndarray, tuple[int, ...] | None] | None = None
        more = not steps or scores.gap(now).mean_abs > _FAR_OFF * floor
        for cause in tries(ways, now, more):
            progress(f"{cause.name} on top of {counted(len(steps), 'other')}" if steps else cause.name)
            for changed, chosen in _candidates(scores, ways, now, cause, floor):
                other = without_edge(scores, changed)
                gain = _gain(scores, ways, now, other, cause)
                # a cause further down the list must be better, not as good; a guess of some sequences clearly so
                least = _SOME if cause.guessed and chosen is not None else 1e-9
                tie = _tie(scores, best[3], floor) if best is not None and cause.kind == "positions" else 0.0
                if gain > 0 and (best is None or gain > best[0] * (1 + least) + tie):
                    best = (gain, cause, changed, other, chosen)
        if best is None:
            break
        before = scores.gap(now)
        _, cause, ways, _, chosen = best
        now = scores.of(ways)
        scores.leave_out(outside_by_rounding(scores, ways, now))
        ids = None if chosen is None else tuple(scores.sequences[place].name for place in chosen)
        steps.append(Step(cause, before, scores.gap(now), chosen, ids))
    return steps, ways, now


def _tie(scores: Scores, best: np.ndarray, floor: float) -> float:
    """By how much of Σ|Δ| another cause must be nearer than scoring ``best``, which may leave no more than rounding."""
    left = scores.gap(best)
    return _OF_ROUNDING * floor * left.tokens if left.mean_abs <= _OF_A_SIZE * floor else 0.0


def _candidates(
    scores: Scores, ways: list[Way], now: np.ndarray, cause: Cause, floor: float
) -> list[tuple[list[Way], tuple[int, ...] | None]]:
    """The cause in all sequences, and in those that it brings close by itself."""
    changed = [cause.change(way, place) for place, way in enumerate(ways)]
    if changed == ways:
        return []
    try:
        other = without_edge(scores, changed)
    except (ValueError, NotImplementedError):  # beside the causes kept by now; alone it was possible
        return []
    touched = tuple(place for place, (a, b) in enumerate(zip(ways, changed, strict=True)) if a != b)
    found: list[tuple[list[Way], tuple[int, ...] | None]] = [(changed, None if len(touched) == len(ways) else touched)]
    helped = tuple(place for place in touched if _helps(scores, now, other, place, floor))
    if cause.kind != "numerics" and helped and len(helped) < len(touched):
        found.append(([changed[p] if p in helped else way for p, way in enumerate(ways)], helped))
    return found


def _helps(scores: Scores, now: np.ndarray, other: np.ndarray, place: int, floor: float) -> bool:
    """Whether one sequence is brought so close that it can't be luck."""
    mine = scores.place == place
    before, after = scores.distance(now)[mine], scores.distance(other)[mine]
    both = np.isfinite(before) & np.isfinite(after)
    if both.sum() < _MIN_TOKENS:
        return False
    start, end = float(before[both].mean()), float(after[both].mean())
    # the mean may be one token's
    typical = np.median(after[both]) <= 0.5 * np.median(before[both])
    return bool(end <= 0.5 * start and typical) and start > _FAR_OFF * floor


def _gain(scores: Scores, ways: Sequence[Way], now: np.ndarray, other: np.ndarray, cause: Cause) -> float:
    """Sum of |Δ| that goes; 0 if it is too small a part, or may be chance."""
    before, after = scores.distance(now), scores.distance(other)
    both = np.isfinite(before) & np.isfinite(after)
    if not both.any():
        return 0.0
    better = before[both] - after[both]
    numerics = cause.kind == "numerics"
    total, share = float(better.sum()), float(better.sum()) / max(float(before[both].sum()), 1e-300)
    if cause.name in catalogue.COARSE and share > 0:
        if (fine := scores.in_float32(ways)) is not None:
            finite = both & np.isfinite(fine) & np.isfinite(other)
            error, moved = (values[finite].astype(np.float64) - fine[finite] for values in (scores.reported, other))
            if _same_errors(error, moved):
                return total
        # of two coarse dtypes the finer one is nearer to whatever is finer than both
        if scores.dtype_of(ways) != "float32":
            return 0.0
    if share < (_MOST if cause.name == catalogue.FINE.name else MIN_NUMERIC_SHARE if numerics else MIN_SHARE):
        return 0.0
    # tokens that the cause leaves as they are, of other sequences for instance, say nothing of whether it is chance
    touched = better[now[both] != other[both]]
    root = len(touched) ** 0.5
    # a few tokens beyond the support outweigh all others' sum, not their signs
    sure = total > _MIN_STANDARD_ERRORS * float(touched.std()) * root
    sure |= float(np.sign(touched).sum()) > _MIN_STANDARD_ERRORS * root
    old, new = (scores.gap(values, both).mismatches for values in (now, other))
    exact = new == 0 or (new < old // 2 and old - new > _MIN_STANDARD_ERRORS * old**0.5)
    # one operator of many, or another batch, is named where it is all; else it is one more order of summation
    one = cause.name.startswith(catalogue.ONE_OPERATOR)
    sure &= not one and cause.name != catalogue.BATCH.name
    # few tokens that differ in arithmetic are arithmetic's; of anything else they would be chance
    exact &= old >= _MIN_TOKENS or (numerics and not one)
    return total if exact or (sure and len(touched) >= _MIN_TOKENS) else 0.0


def _same_errors(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether errors [n] are of a size, and correlated as chance does not give."""
    if len(a) < _MIN_TOKENS:
        return False
    sizes = [[float(of(np.abs(errors))) for of in (np.mean, np.median)] for errors in (a, b)]
    if 0 in (*sizes[0], *sizes[1]) or any(max(x, y) > _OF_A_SIZE * min(x, y) for x, y in zip(*sizes, strict=True)):
        return False
    # a few large ones would make a correlation by themselves
    a, b = (np.clip(e, -_LARGE * middle, _LARGE * middle) for e, (_, middle) in zip((a, b), sizes, strict=True))
    return float(np.corrcoef(a, b)[0, 1]) * len(a) ** 0.5 > _MIN_STANDARD_ERRORS
