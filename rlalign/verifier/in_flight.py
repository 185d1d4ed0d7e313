"""Weights that were updated while responses were under way: their first tokens are of an older version.

Engines that take new weights without waiting for their requests to end (in-flight updates, partial rollouts) sample so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rlalign.verifier.causes import Cause, Way
from rlalign.verifier.scores import Scores

# shorter responses could be cut well by luck
_MIN_TOKENS = 8
# what is left where both versions had a part, of what either leaves alone
_HALF = 0.5


def in_flight_causes(scores: Scores, ways: Sequence[Way], now: np.ndarray, num_previous: int) -> list[Cause]:
    """One cause per older checkpoint that explains the first tokens of a response as the model explains the others.

    now: log-probs float32 [N] of ``ways``, N tokens of all sequences one after another.
    """
    found = []
    for version in range(1, num_previous + 1):
        older = [replace(way.settings, weights=version) for way in ways]
        try:
            scored = scores.of([replace(way, settings=one) for way, one in zip(ways, older, strict=True)])
        except (ValueError, NotImplementedError):  # as stale weights this version is listed with the reason
            continue
        cuts = [
            _cut(scores.distance(scored)[mine], scores.distance(now)[mine])
            for mine in (scores.place == place for place in range(len(ways)))
        ]
        if any(within for _, within in cuts):
            counts = [count for count, _ in cuts]
            found.append(_cause(version, counts))
    return found


def _cut(older: np.ndarray, newer: np.ndarray) -> tuple[int, bool]:
    """How many first tokens the older version explains best, and whether the newer one has the others. |Δ| float64 [L]
    of either."""
    length = len(older)
    older, newer = np.nan_to_num(older), np.nan_to_num(newer)
    left = np.concatenate([[0.0], np.cumsum(older)]) + np.concatenate([np.cumsum(newer[::-1])[::-1], [0.0]])
    best, either = int(np.argmin(left)), min(left[0], left[-1])
    if 0 < best < length and length >= _MIN_TOKENS and left[best] <= _HALF * either:
        return best, True
    return (length if left[-1] <= left[0] else 0), False


def _cause(version: int, counts: Sequence[int]) -> Cause:
    def change(way: Way, place: int) -> Way:
        older = replace(way.settings, weights=version)
        return replace(way, before=(counts[place], older)) if counts[place] else way

    return Cause(
        f"stale_weights[{version}].in_flight", "weights",
        f"previous model {version} sampled the first tokens of responses, the model the others: weights were updated "
        "in flight",
        "expect it of partial rollouts, and correct per token (importance weights against the reported log-probs), or "
        "let requests end before weights change",
        change,
    )  # fmt: skip
