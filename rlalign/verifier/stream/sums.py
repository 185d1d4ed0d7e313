"""Statistics of numbers that pass by once, the same whatever their order and however they were cut into pieces.

Sums are integers: every float64 is a whole multiple of 2**-1074, so a sum of them is exact, and is rounded once, when
it is read. Legend: n values so far.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

# float64's smallest step is 2**-1074; frexp's 53-bit mantissas of denormal numbers reach further down
_SHIFT = 1200
_ONE = 1 << _SHIFT
_LOW = 27
# 2**18 numbers of 34 bits add up to 52
_AT_ONCE, _HEAD = 1 << 18, 34
_ROUNDS = 4
_EXACT = 1 << 20
_DROPPED = 9


class ExactSum:
    """Sum of float64 values, exact until it is read. Infinities and NaN give what adding them would."""

    def __init__(self) -> None:
        self.count = 0
        self._units = 0
        self._special = 0.0

    def add(self, values: np.ndarray) -> None:
        """Add float64 [m]."""
        self.count += len(values)
        finite = np.isfinite(values)
        if not finite.all():
            with np.errstate(invalid="ignore"):
                self._special += float(values[~finite].sum())
            values = values[finite]
        for begin in range(0, len(values), _AT_ONCE):
            self._units += _units(values[begin : begin + _AT_ONCE])

    @property
    def exact(self) -> Fraction | None:
        """The sum; None once an infinity or NaN is in it."""
        return None if self._special else Fraction(self._units, _ONE)

    @property
    def value(self) -> float:
        """The sum, correctly rounded; an infinity beyond float64's range."""
        if self._special:  # NaN too is not 0
            return self._special
        return to_float(Fraction(self._units, _ONE))

    @property
    def mean(self) -> float:
        """value / n; NaN of nothing."""
        return self.value / self.count if self.count else math.nan


def _units(values: np.ndarray) -> int:
    """Sum of at most 2**18 finite float64 values in units of 2**-_SHIFT."""
    total, rest = 0, values
    for _ in range(_ROUNDS):
        largest = float(np.abs(rest).max(initial=0.0))
        step = math.frexp(largest)[1] - _HEAD
        if largest == 0.0 or not -1000 < step < 900:
            break
        # adding and taking away this number leaves the multiples of 2**step: at most _HEAD bits, whose sums are exact
        round_to = 1.5 * 2.0 ** (step + 52)
        head = (rest + round_to) - round_to
        rest = rest - head
        total += int(float(head.sum()) * 2.0**-step) << (step + _SHIFT)
    return total + _slowly(rest[rest != 0])


def _slowly(values: np.ndarray) -> int:
    """The same for numbers of any size, by exponent."""
    if len(values) == 0:
        return 0
    mantissa, exponent = np.frexp(values)
    whole = np.ldexp(mantissa, 53).astype(np.int64)
    low, first = whole & ((1 << _LOW) - 1), int(exponent.min())
    place = exponent - first
    # sums of at most 2**18 numbers below 2**27: float64 weights hold them exactly
    lows, highs = np.bincount(place, weights=low), np.bincount(place, weights=whole >> _LOW)
    total = 0
    for shift in np.flatnonzero((lows != 0) | (highs != 0)).tolist():
        total += ((int(highs[shift]) << _LOW) + int(lows[shift])) << (shift + first - 53 + _SHIFT)
    return total


def to_float(value: Fraction) -> float:
    """Correctly rounded; an infinity beyond float64's range."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def variance(first: ExactSum, squares: ExactSum) -> Fraction | None:
    """Population variance, from the exact sums of values and of their squares; None of nothing or of infinities."""
    if not first.count or first.exact is None or squares.exact is None:
        return None
    mean = first.exact / first.count
    return max(squares.exact / first.count - mean * mean, Fraction(0))


def standard_deviation(first: ExactSum, squares: ExactSum) -> float:
    """Over n - 1; 0 of a single value, NaN where there is none."""
    found, n = variance(first, squares), first.count
    if found is None:
        return math.nan
    return math.sqrt(to_float(found * Fraction(n, n - 1))) if n > 1 else 0.0


class Quantiles:
    """Quantiles of float64 values >= 0, interpolated between the nearest ranks as numpy's are.

    Exact up to 2**20 values. Beyond, values are counted by the upper 22 bits of their float32: a quantile is then low
    by less than one part in 16,384 (whole numbers below 32,768 stay exact), and memory is 32 MiB.
    """

    def __init__(self) -> None:
        self.count = 0
        self._kept: list[np.ndarray] = []
        self._bins: np.ndarray | None = None

    def add(self, values: np.ndarray) -> None:
        """Add finite values [m]."""
        self.count += len(values)
        if self._bins is None and self.count <= _EXACT:
            self._kept.append(values.astype(np.float64))
            return
        if self._bins is None:
            self._bins = np.zeros(1 << (32 - 1 - _DROPPED), np.int64)
            for kept in self._kept:
                self._count(kept)
            self._kept = []
        self._count(values)

    def read(self, level: float) -> float:
        """The quantile at ``level`` percent; NaN of nothing."""
        if not self.count:
            return math.nan
        if self._bins is None:
            return float(np.percentile(np.concatenate(self._kept), level))
        place = (self.count - 1) * level / 100
        below, above = (self._at_rank(math.floor(place)), self._at_rank(math.ceil(place)))
        return below + (above - below) * (place - math.floor(place))

    def _count(self, values: np.ndarray) -> None:
        keys = values.astype(np.float32).view(np.uint32) >> _DROPPED
        places, counts = np.unique(keys, return_counts=True)
        self._bins[places] += counts

    def _at_rank(self, rank: int) -> float:
        key = int(np.searchsorted(np.cumsum(self._bins), rank, side="right"))
        return float(np.array([key << _DROPPED], np.uint32).view(np.float32)[0])
