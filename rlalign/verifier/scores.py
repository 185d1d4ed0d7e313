"""A dump's log-probs beside those of scoring it in any way, and what can be guessed before any cause is tried.

Legend: N tokens of all sequences one after another; places count sequences from 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from rlalign.verifier import causes as catalogue
from rlalign.verifier.causes import Cause, Way
from rlalign.verifier.compare import LogprobPair
from rlalign.verifier.dumps.record import DumpSequence
from rlalign.verifier.score import Scorer, ScoreSettings, effective_sampling

# a token whose log-prob is -inf on one side must not hide all the others: e**-20 is never sampled
CAP = 20.0
_TEMPERATURES = (0.2, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5, 2.0)
_FIT_TOKENS = 512
_BASES = (2, 10)
# how far from 1/ln base the middle factor may be, and those of all but a tenth of |log-prob| at either end
_MIDDLE, _ENDS = 0.01, 0.05
_LEAST_TOKENS = 20


@dataclass(frozen=True, slots=True)
class Gap:
    """Difference over some tokens. mean_abs, max_abs: of |Δ|, counted as ``CAP`` at most. mismatches: other bits."""

    tokens: int
    mismatches: int
    mean_abs: float
    max_abs: float


@dataclass(slots=True)
class Scores:
    """The dump flattened, and every way's log-probs as they are asked for. decode: scoring token by token may be asked
    for, which takes as many forwards as the longest response has tokens."""

    sequences: Sequence[DumpSequence]
    scorer: Scorer
    decode: bool = True
    reported: np.ndarray = field(init=False)
    place: np.ndarray = field(init=False)
    counts: np.ndarray = field(init=False)
    _known: dict[ScoreSettings, list[np.ndarray]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        lengths = [len(sequence.token_ids) for sequence in self.sequences]
        self.reported = _joined([sequence.logprobs for sequence in self.sequences])
        self.place = np.repeat(np.arange(len(lengths)), lengths)
        masks = [
            np.ones(n, np.bool_) if s.mask is None else s.mask for s, n in zip(self.sequences, lengths, strict=True)
        ]
        seen = np.concatenate([*masks, np.zeros(0, np.bool_)])
        self.counts = seen & np.isfinite(self.reported)

    def of(self, ways: Sequence[Way]) -> np.ndarray:
        """Log-probs float32 [N] with the i-th sequence scored by ways[i]. All sequences are scored in every setting, so
        that neighbours stay what they are."""
        return _joined([self._one(place, way) for place, way in enumerate(ways)])

    def _one(self, place: int, way: Way) -> np.ndarray:
        if way.settings not in self._known:
            self._known[way.settings] = self.scorer(self.sequences, way.settings)
        length = len(self.sequences[place].token_ids)
        source = self._known[way.settings][place if way.partner is None else way.partner]
        found = np.full(length, np.nan, np.float32)
        begin, end = max(0, -way.shift), min(length, len(source) - way.shift)
        if begin < end:
            found[begin:end] = source[begin + way.shift : end + way.shift]
        return found if way.base is None else (found.astype(np.float64) / math.log(way.base)).astype(np.float32)

    def beside(self, ways: Sequence[Way], cause: Cause) -> np.ndarray | None:
        """Log-probs float32 [N] with a cause on top; None where the scorer can't imitate it."""
        try:
            return self.of([cause.change(way, place) for place, way in enumerate(ways)])
        except (ValueError, NotImplementedError):
            return None

    def other_order(self, ways: Sequence[Way]) -> np.ndarray | None:
        """Log-probs float32 [N] in another order of summation than ``ways`` have; None if the scorer has no other."""
        native = any(way.settings.numerics == "native" for way in ways)
        for cause in catalogue.other_orders(native, decode=self.decode):
            changed = [cause.change(way, place) for place, way in enumerate(ways)]
            if changed != list(ways) and (scored := self.beside(ways, cause)) is not None:
                return scored
        return None

    def pairs(self, scored: np.ndarray) -> list[LogprobPair]:
        """Reported and scored log-probs of every sequence, for ``compare``; ``scored`` float32 [N]."""
        ends = np.cumsum([0, *(len(s.token_ids) for s in self.sequences)]).tolist()
        return [
            LogprobPair(s.logprobs.astype(np.float32, copy=False), scored[a:b], b - a, s.mask)
            for s, (a, b) in zip(self.sequences, pairwise(ends), strict=True)
        ]

    def distance(self, scored: np.ndarray, reported: np.ndarray | None = None) -> np.ndarray:
        """|Δ| float64 [N], at most ``CAP``; NaN where a token does not count or has none."""
        reported = self.reported if reported is None else reported
        with np.errstate(invalid="ignore"):
            size = np.abs(scored.astype(np.float64) - reported.astype(np.float64))
        size = np.where(np.isnan(scored), np.nan, np.minimum(size, CAP))
        return np.where(self.counts, size, np.nan)

    def apart(self, a: np.ndarray, b: np.ndarray) -> float | None:
        """Mean |Δ| of ``between``; None if there is no token."""
        found = self.between(a, b)
        return found.mean_abs if found.tokens else None

    def between(self, a: np.ndarray, b: np.ndarray) -> Gap:
        """Difference between two ways of scoring float32 [N], of tokens finite in both."""
        both = self.counts & np.isfinite(a) & np.isfinite(b)
        return _gap(a[both], b[both])

    def leave_out(self, tokens: np.ndarray) -> None:
        """bool [N]: these count no more, whatever the way of scoring."""
        self.counts &= ~tokens

    def gap(self, scored: np.ndarray, among: np.ndarray | None = None) -> Gap:
        """among: bool [N], the tokens to look at; None for all that have a log-prob."""
        size = self.distance(scored)
        chosen = np.isfinite(size) if among is None else among & np.isfinite(size)
        return _gap(scored[chosen], self.reported[chosen])


def last_place(logprobs: np.ndarray) -> np.ndarray:
    """How far two float32 log-probs [N] of the same logits may lie apart at the least.

    A log-prob is logit - maximum - log Σ with Σ ≥ 1 a float32: half a unit in the last place of 1 or more is lost in
    it, however small the log-prob. What comes out is rounded again, to its own last place.
    """
    return np.spacing(np.maximum(np.abs(logprobs), np.float32(1)))


def swaps(scores: Scores, now: np.ndarray) -> list[Cause]:
    """The cause that sequences carry each other's log-probs, if any do: their |Δ| to the other's scores is far smaller
    than to their own."""
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
    return [catalogue.swap_cause(partners, [s.id for s in scores.sequences])] if partners else []


def _mean_distance(a: np.ndarray, b: np.ndarray) -> float:
    both = np.isfinite(a) & np.isfinite(b)
    return float(np.abs(a[both].astype(np.float64) - b[both]).mean()) if both.sum() >= 2 else float("inf")


def fitted_temperature(scores: Scores, ways: list[Way], now: np.ndarray, whole: Gap) -> list[Cause]:
    """The temperature that fits best, where it is another than the one that the dump names."""
    few: list[DumpSequence] = []
    for sequence in scores.sequences:
        if sum(len(each.token_ids) for each in few) < _FIT_TOKENS:
            few.append(sequence)
    part = scores if len(few) == len(scores.sequences) else Scores(few, scores.scorer)

    def error(temperature: float) -> float:
        cause = catalogue.temperature_cause(temperature)
        return part.gap(part.of([cause.change(way, i) for i, way in enumerate(ways[: len(few)])])).mean_abs

    tried = {temperature: error(temperature) for temperature in _TEMPERATURES}
    for width in (0.05, 0.02, 0.01):
        middle = min(tried, key=lambda t: (tried[t], abs(t - 1)))
        around = [round(middle + sign * width, 2) for sign in (-1, 1)]
        tried |= {t: error(t) for t in around if t > 0 and t not in tried}
    best = min(tried, key=lambda t: (tried[t], abs(t - 1)))
    named = {effective_sampling(s, w.settings).temperature for s, w in zip(scores.sequences, ways, strict=True)}
    if named == {best} or tried[best] > 0.9 * part.gap(part.of(ways[: len(few)])).mean_abs:
        return []
    return [catalogue.temperature_cause(best)]


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
                return [catalogue.base_cause(base)]
    return []


def _colder(scores: Scores, factor: float) -> Cause:
    """Every temperature times ``factor``."""

    def change(way: Way, place: int) -> Way:
        named = effective_sampling(scores.sequences[place], way.settings).temperature or 1.0
        return replace(way, settings=replace(way.settings, temperature=named * factor))

    return Cause("", "sampling", "", "", change)


def _gap(a: np.ndarray, b: np.ndarray) -> Gap:
    """Of float32 [n] each, none of them NaN and not both -inf."""
    if not len(a):
        return Gap(0, 0, 0.0, 0.0)
    size = np.minimum(np.abs(a.astype(np.float64) - b.astype(np.float64)), CAP)
    return Gap(len(a), int((a.view(np.int32) != b.view(np.int32)).sum()), float(size.mean()), float(size.max()))


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.float32, copy=False) if len(parts) else np.zeros(0, np.float32)
