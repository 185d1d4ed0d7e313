"""Weights that were updated while responses were under way: their first tokens are of an older version.

Engines that take new weights without waiting for their requests to end (in-flight updates, partial rollouts) sample so.
They compute the KV cache again, or go on with what the older weights have put into it. Legend: N tokens of all
sequences one after another, L of one response; a cut is how many first tokens of a response are of the older weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rlalign.verifier.causes import Cause, Way
from rlalign.verifier.score import ScoreSettings
from rlalign.verifier.scores import Scores

# shorter responses could be cut well by luck, and so could shorter parts of one
_MIN_TOKENS, _MIN_PART = 8, 4
# what is left where both versions had a part, of what is left without
_HALF = 0.5
# of all sequences, to find the cuts of a cache that was kept
_MOST_FORWARDS = 6
# a request that is sent again finds so many tokens, or a multiple, in vLLM's prefix cache
_BLOCK = 16
# that a log-prob is off by
_LEAST = 1e-7
_SHOWN = 5


def in_flight_causes(scores: Scores, ways: Sequence[Way], now: np.ndarray, num_previous: int) -> list[Cause]:
    """One cause per older checkpoint that explains the first tokens of a response as the model explains the others, by
    itself or upon the older one's KV cache.

    now: log-probs float32 [N] of ``ways``.
    """
    found = []
    for version in range(1, num_previous + 1):
        try:
            scored = scores.of([replace(way, settings=_of(way, version)) for way in ways])
        except (ValueError, NotImplementedError):  # as stale weights this version is listed with the reason
            continue
        update = _Update(scores, ways, version, _errors(scores, scored), _errors(scores, now))
        cuts = [_cut(*pair) for pair in zip(update.older, update.newer, strict=True)]
        if (kept := update.upon_kept_cache([cut for cut, _ in cuts])) is not None:
            found.append(kept)
        elif any(within for _, within in cuts):
            found.append(update.cause([cut for cut, _ in cuts]))
    return found


@dataclass(frozen=True, slots=True)
class _Update:
    """From the version of an older checkpoint to the model. older, newer: |Δ| float64 [L] of every sequence, by either
    alone."""

    scores: Scores
    ways: Sequence[Way]
    version: int
    older: Sequence[np.ndarray]
    newer: Sequence[np.ndarray]

    def cause(self, cuts: Sequence[int], block: int | None = None) -> Cause:
        """block: the model goes on with the older version's keys and values, as far as they fill blocks of so many
        tokens; None: it computes them again."""
        prompts = [len(sequence.prompt_token_ids) for sequence in self.scores.sequences]
        inside = [0 < cut < len(older) for cut, older in zip(cuts, self.older, strict=True)]
        # the last token that the older version predicted has not been fed to it
        rows = [has * (n - 1 + cut) for has, n, cut in zip(inside, prompts, cuts, strict=True)]
        cached = {} if block is None else self._cached([n // block * block for n in rows])

        def change(way: Way, place: int) -> Way:
            if not cuts[place]:
                return way
            settings = replace(way.settings, **cached)
            return replace(way, settings=settings, before=(cuts[place], _of(way, self.version)))

        shown = [str(cut) for cut, has in zip(cuts, inside, strict=True) if has]
        at = ", ".join(shown[:_SHOWN]) + (", …" if len(shown) > _SHOWN else "")
        kept = "" if block is None else " upon its KV cache, which was kept"
        kept += f" in whole blocks of {block} tokens" if (block or 1) > 1 else ""
        again = "; or to compute the KV cache again (vLLM: pause_generation with clear_cache=True)" if kept else ""
        return Cause(
            f"stale_weights[{self.version}].in_flight" + (".cache_kept" if kept else ""), "weights",
            f"previous model {self.version} sampled the first tokens of responses ({at}), the model the others{kept}: "
            "weights were updated in flight",
            "expect it of partial rollouts, and correct per token (importance weights against the reported log-probs), "
            f"or let requests end before weights change{again}",
            change, guessed=block is not None,
        )  # fmt: skip

    def upon_kept_cache(self, recomputed: Sequence[int]) -> Cause | None:
        """The cause if the cache was kept; None where no sequence tells that from everything else. recomputed: the cuts
        if it was computed again.

        A forward per round for all sequences together: the cuts of least |Δ| are found step by step, from where that of
        the older version grows.
        """
        places, lengths = range(len(self.ways)), [len(older) for older in self.older]
        prompts = self._cached([len(sequence.prompt_token_ids) - 1 for sequence in self.scores.sequences])
        near = self._under([replace(way, settings=replace(way.settings, **prompts)) for way in self.ways])
        if near is None:
            return None
        alone = [min(older.sum(), newer.sum()) for older, newer in zip(self.older, self.newer, strict=True)]
        again = [_left(self.older[p], self.newer[p])[recomputed[p]] for p in places]
        most = [min(alone[p], again[p], near[p].sum()) for p in places]
        asked = [_growth(older) for older in self.older]
        known: list[dict[int, float]] = [{} for _ in places]
        for _ in range(_MOST_FORWARDS):
            sums = self._sums(asked, 1)
            known = [{cut: sums[p]} | left for p, (cut, left) in enumerate(zip(asked, known, strict=True))]
            cuts = [min(left, key=left.__getitem__) for left in known]
            asked = [_next(known[p], cuts[p], lengths[p]) for p in places]
            if asked == cuts or all(known[p][cuts[p]] >= most[p] for p in places):
                break
        left = {1: [known[p][cuts[p]] for p in places], _BLOCK: self._sums(cuts, _BLOCK)}
        # sequences that were not under way tell nothing of it
        kept, blocks = (float(np.minimum(left[block], alone).sum()) for block in (1, _BLOCK))
        block = _BLOCK if blocks < _HALF * kept else 1
        told = (
            lengths[p] >= _MIN_TOKENS and lengths[p] - cuts[p] >= _MIN_PART and left[block][p] < _HALF * most[p]
            for p in places
        )
        if not any(told):
            return None
        whole = [length * bool(self.older[p].sum() < self.newer[p].sum()) for p, length in enumerate(lengths)]
        return self.cause([cuts[p] if left[block][p] <= _HALF * alone[p] else whole[p] for p in places], block)

    def _cached(self, rows: Sequence[int]) -> dict[str, Any]:
        return {"cached": tuple(rows), "cached_by": self.version}

    def _sums(self, cuts: Sequence[int], block: int) -> list[float]:
        """Sum of |Δ| of every sequence with these cuts and the cache kept; infinite where it can't be scored."""
        cause = self.cause(cuts, block)
        sizes = self._under([cause.change(way, place) for place, way in enumerate(self.ways)])
        return [math.inf] * len(cuts) if sizes is None else [float(size.sum()) for size in sizes]

    def _under(self, ways: Sequence[Way]) -> list[np.ndarray] | None:
        """|Δ| float64 [L] of every sequence; None where it can't be scored."""
        try:
            return _errors(self.scores, self.scores.of(ways))
        except (ValueError, NotImplementedError):
            return None


def _of(way: Way, version: int) -> ScoreSettings:
    """The older version by itself from the first token on."""
    return replace(way.settings, weights=version, cached=())


def _errors(scores: Scores, scored: np.ndarray) -> list[np.ndarray]:
    """|Δ| float64 [L] of every sequence; 0 where a token doesn't count."""
    size = np.nan_to_num(scores.distance(scored))
    return [size[scores.place == place] for place in range(len(scores.sequences))]


def _left(older: np.ndarray, newer: np.ndarray) -> np.ndarray:
    """Sum of |Δ| at every cut, float64 [L + 1]."""
    return np.concatenate([[0.0], np.cumsum(older)]) + np.concatenate([np.cumsum(newer[::-1])[::-1], [0.0]])


def _cut(older: np.ndarray, newer: np.ndarray) -> tuple[int, bool]:
    """How many first tokens the older version explains best, and whether the newer one has the others. |Δ| float64 [L]
    of either."""
    length, left = len(older), _left(older, newer)
    best, either = int(np.argmin(left)), min(left[0], left[-1])
    if 0 < best < length and length >= _MIN_TOKENS and left[best] <= _HALF * either:
        return best, True
    return (length if left[-1] <= left[0] else 0), False


def _growth(size: np.ndarray) -> int:
    """The likeliest place at which |Δ| float64 [L] changes its scale, neither the first nor the end if there is one."""
    if len(size) < 2:
        return 0
    first = np.arange(1, len(size))
    sums, others = np.cumsum(size)[:-1], len(size) - first
    scales = first * np.log(sums / first + _LEAST), others * np.log((size.sum() - sums) / others + _LEAST)
    return 1 + int(np.argmin(scales[0] + scales[1]))


def _next(known: dict[int, float], best: int, length: int) -> int:
    """A cut beside the best one whose |Δ| isn't known yet; the best one if there is none."""
    return next((cut for cut in (best - 1, best + 1) if 0 < cut < length and cut not in known), best)
