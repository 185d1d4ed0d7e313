"""A dump's log-probs beside those of scoring it in any way.

Legend: N tokens of all sequences one after another; places count sequences from 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from rlalign.config import ScoringDtype
from rlalign.verifier import causes as catalogue
from rlalign.verifier.causes import Cause, Way
from rlalign.verifier.compare import LogprobPair
from rlalign.verifier.dumps.record import DumpSequence
from rlalign.verifier.score import Scorer, ScoreSettings

# a token whose log-prob is -inf on one side must not hide all the others: e**-20 is never sampled
CAP = 20.0


@dataclass(frozen=True, slots=True)
class Gap:
    """Difference over some tokens. mean_abs, max_abs: of |Δ|, counted as ``CAP`` at most; spread: standard error of the
    mean. mismatches: other bits."""

    tokens: int
    mismatches: int
    mean_abs: float
    max_abs: float
    spread: float = 0.0


@dataclass(slots=True)
class Scores:
    """The dump flattened, and every way's log-probs as they are asked for. decode: scoring token by token may be asked
    for, which takes as many forwards as the longest response has tokens. dtype: what the scorer computes in where a way
    doesn't say."""

    sequences: Sequence[DumpSequence]
    scorer: Scorer
    decode: bool = True
    dtype: ScoringDtype = "float32"
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
        length = len(self.sequences[place].token_ids)
        source = self._scored(way.settings)[place if way.partner is None else way.partner]
        if way.before is not None:
            count, settings = way.before
            source = np.concatenate([self._scored(settings)[place][:count], source[count:]])
        found = np.full(length, np.nan, np.float32)
        begin, end = max(0, -way.shift), min(length, len(source) - way.shift)
        if begin < end:
            found[begin:end] = source[begin + way.shift : end + way.shift]
        if way.base is not None:
            found = (found.astype(np.float64) / math.log(way.base)).astype(np.float32)
        return found if way.grid is None else on_grid(found, way.grid)

    def _scored(self, settings: ScoreSettings) -> list[np.ndarray]:
        if settings not in self._known:
            self._known[settings] = self.scorer(self.sequences, settings)
        return self._known[settings]

    def beside(self, ways: Sequence[Way], cause: Cause) -> np.ndarray | None:
        """Log-probs float32 [N] with a cause on top; None where the scorer can't imitate it."""
        try:
            return self.of([cause.change(way, place) for place, way in enumerate(ways)])
        except (ValueError, NotImplementedError):
            return None

    def dtype_of(self, ways: Sequence[Way]) -> ScoringDtype:
        """What ``ways`` are scored in; one of the causes in them may be another dtype."""
        return next((way.settings.dtype for way in ways if way.settings.dtype is not None), self.dtype)

    def in_float32(self, ways: Sequence[Way]) -> np.ndarray | None:
        """Log-probs float32 [N] of ``ways`` computed in float32; None where the scorer can't."""
        return self.of(ways) if self.dtype_of(ways) == "float32" else self.beside(ways, catalogue.FINE)

    def other_order(self, ways: Sequence[Way]) -> np.ndarray | None:
        """Log-probs float32 [N] in another order of summation than ``ways`` have, if it can one that
        gives other bits; None if the scorer has no other."""
        native, same = any(way.settings.numerics == "native" for way in ways), None
        for cause in catalogue.other_orders(native, decode=self.decode):
            changed = [cause.change(way, place) for place, way in enumerate(ways)]
            if changed != list(ways) and (scored := self.beside(ways, cause)) is not None:
                if scored.tobytes() != self.of(ways).tobytes():
                    return scored
                same = scored
        return same

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

    def apart(self, a: np.ndarray, b: np.ndarray, among: np.ndarray | None = None) -> float | None:
        """Mean |Δ| of ``between``; None if there is no token."""
        found = self.between(a, b, among)
        return found.mean_abs if found.tokens else None

    def between(self, a: np.ndarray, b: np.ndarray, among: np.ndarray | None = None) -> Gap:
        """Difference between two ways of scoring float32 [N], of tokens finite in both. among: bool [N]."""
        both = self.counts & np.isfinite(a) & np.isfinite(b)
        if among is not None:
            both &= among
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


def on_grid(values: np.ndarray, grid: str) -> np.ndarray:
    """float32 [N] as ``grid`` stores them: "bfloat16", "float16", or "<n> decimals"."""
    if grid == "bfloat16":
        bits = values.view(np.uint32)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
        return np.where(np.isfinite(values), even.view(np.float32), values)
    if grid == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    return np.round(values.astype(np.float64), int(grid.split()[0])).astype(np.float32)


def grid_step(values: np.ndarray, grid: str) -> np.ndarray:
    """float64 [N], how far apart values of ``on_grid`` lie at float32 [N]."""
    if grid == "bfloat16":
        return np.spacing(np.abs(values)).astype(np.float64) * 2**16
    if grid == "float16":
        return np.spacing(np.abs(values).astype(np.float16)).astype(np.float64)
    return np.full(len(values), 10.0 ** -int(grid.split()[0]))


def _gap(a: np.ndarray, b: np.ndarray) -> Gap:
    """Of float32 [n] each, none of them NaN and not both -inf."""
    if not len(a):
        return Gap(0, 0, 0.0, 0.0)
    size = np.minimum(np.abs(a.astype(np.float64) - b.astype(np.float64)), CAP)
    mismatches, spread = int((a.view(np.int32) != b.view(np.int32)).sum()), float(size.std()) / len(a) ** 0.5
    return Gap(len(a), mismatches, float(size.mean()), float(size.max()), spread)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.float32, copy=False) if len(parts) else np.zeros(0, np.float32)
