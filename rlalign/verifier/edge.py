"""Tokens at the edge of a support: whether top-k, top-p or min-p keep them is up to rounding.

Filters are loosened and tightened by what another order of summation, without any filter, says that rounding does to a
probability. Legend: N tokens of all sequences one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rlalign.verifier.causes import FILTERS, Way
from rlalign.verifier.scores import Scores

# how many times the mean |Δ| of another order of summation a probability may be off
_EDGE = 8.0


def outside_by_rounding(scores: Scores, ways: Sequence[Way], now: np.ndarray) -> np.ndarray:
    """bool [N]: tokens that fell out of the recomputed support by no more than rounding.

    They are -inf by whichever side of the edge they fell on, and say nothing of any cause.
    """
    outside = scores.counts & np.isneginf(now)
    if not outside.any():
        return outside
    slack = _slack(scores, ways)
    return outside & np.isfinite(_with_slack(scores, ways, slack)) if slack else np.zeros_like(outside)


def without_edge(scores: Scores, ways: Sequence[Way]) -> np.ndarray:
    """Log-probs float32 [N] of ``ways``; NaN where ``outside_by_rounding`` says that they tell nothing."""
    scored = scores.of(ways)
    return np.where(outside_by_rounding(scores, ways, scored), np.float32(np.nan), scored)


def moved_by_edge(scores: Scores, ways: Sequence[Way], now: np.ndarray) -> np.ndarray:
    """bool [N]: tokens that are further off than rounding, but not if others at the edge were kept, or left out.

    The mass that is left is another then: what the dump reports lies between that of the widest support and that of
    the narrowest.
    """
    size = scores.distance(now)
    off = np.isfinite(size) & np.isfinite(now)
    slack = _slack(scores, ways) if off.any() else 0.0
    off &= size > slack
    if not slack or not off.any():
        return np.zeros_like(off)
    widest, narrowest = _with_slack(scores, ways, slack), _with_slack(scores, ways, -slack)
    narrowest = np.where(np.isneginf(narrowest), now, narrowest)
    other = widest < narrowest
    return off & other & (scores.reported >= widest - slack) & (scores.reported <= narrowest + slack)


def _slack(scores: Scores, ways: Sequence[Way]) -> float:
    """How far rounding may move a log-prob that nothing is left out of; 0 if no other order says."""
    unfiltered = [_unfiltered(FILTERS.change(way, place)) for place, way in enumerate(ways)]
    order = scores.other_order(unfiltered)
    if order is None:
        return 0.0
    # a router of experts that decides otherwise moves few tokens, and these by much more than the mean
    gap = scores.between(order, scores.of(unfiltered))
    return max(_EDGE * gap.mean_abs, gap.max_abs)


def _unfiltered(way: Way) -> Way:
    """Without values that stand in place of the dump's either."""
    return replace(way, settings=replace(way.settings, top_k=None, top_p=None, min_p=None))


def _with_slack(scores: Scores, ways: Sequence[Way], slack: float) -> np.ndarray:
    return scores.of([replace(way, settings=replace(way.settings, slack=slack)) for way in ways])
