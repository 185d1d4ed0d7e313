"""Every ``align/*`` metric of docs/metrics.md, from one comparison, in one reduction.

Legend: N tokens, n finite tokens, S samples. Δ = train - rollout in float32; ρ = exp(Δ). Statistics are float64.

Sums are exactly rounded (``math.fsum``), so they do not depend on the order in which samples arrived. Statistics are
over the n tokens that are finite on both sides; every maximum is inf as soon as one token is not, so that a NaN or a
missing log-prob can never look like agreement.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np

from rlalign.config import Correction
from rlalign.verifier.compare import Comparison

_NO_CORRECTION = Correction(math.inf)


@dataclass(frozen=True, slots=True)
class Provenance:
    """What the comparison itself can't know. None leaves the metric out.

    trainer_version: version of the weights that gave the train log-probs. weights_equal: hash of the trainer's weights
    == hash that the engine holds. correction: what changes ρ in the loss; None: nothing does.
    """

    trainer_version: int | None = None
    weights_equal: bool | None = None
    weights_version: int | None = None
    correction: Correction | None = None


def align_metrics(
    comparison: Comparison,
    *,
    advantages: Sequence[np.ndarray] | None = None,
    provenance: Provenance | None = None,
) -> dict[str, float]:
    """Flat dict of ``align/*``. advantages: float [L] per sample, in the comparison's order; adds ``align/adv_skew``.

    A statistic of no tokens at all is NaN. Raises ValueError if ``advantages`` does not fit the comparison.
    """
    equal, finite = comparison.equal, _finite(comparison)
    delta = comparison.delta[finite].astype(np.float64)
    train = comparison.train[finite].astype(np.float64)
    rollout = train if equal else comparison.rollout[finite].astype(np.float64)
    values = {
        "mismatch_count": float(comparison.mismatch_count),
        "nonfinite_count": float(comparison.nonfinite_count),
        "bitwise_match_frac": 1.0 if equal else _mean(~comparison.mismatch),
        **(_agreement() if equal else _tokens(train, rollout, delta, comparison.ulp[finite])),
        **_sequences(comparison.sample[finite], train, rollout, delta),
    }
    if comparison.nonfinite_count:
        values |= {name: math.inf for name in values if name.endswith(("/max", "_max"))}
    if advantages is not None:
        values["adv_skew"] = _adv_skew(comparison, delta, advantages)
    if provenance is not None:  # of a step of training: elsewhere nothing could correct a ratio
        modified = _modified(delta, comparison.sample[finite], provenance.correction or _NO_CORRECTION)
        values["ratio_frac_modified"] = _mean(modified)
        values |= _provenance(comparison, provenance)
    return {f"align/{name}": value for name, value in values.items()}


def _finite(comparison: Comparison) -> np.ndarray | slice:
    """Index of the n finite tokens; where these are all, one that copies nothing."""
    return ~comparison.nonfinite if comparison.nonfinite_count else slice(None)


def _modified(delta: np.ndarray, sample: np.ndarray, correction: Correction) -> np.ndarray:
    """bool [N]: tokens whose ratio e^delta is not their weight in the loss; sample: the sequence of each."""
    with np.errstate(over="ignore"):
        ratio = np.exp(delta)
    modified = ratio > correction.cap
    if (bound := correction.reject_beyond) is not None:
        modified |= (ratio > bound) | (ratio < 1 / bound)
    if correction.veto_below is not None:
        modified |= np.isin(sample, sample[ratio < correction.veto_below])
    return modified


def _tokens(train: np.ndarray, rollout: np.ndarray, delta: np.ndarray, ulp: np.ndarray) -> dict[str, float]:
    """Statistics of Δ and of what follows from it. All of them [n]."""
    return {**_logp(delta), **_ulp(ulp), **_prob(train, rollout), **_divergence(delta), **_ratio(delta)}


@cache
def _agreement() -> dict[str, float]:
    """``_tokens`` where all are equal: it is that of one, however many they are."""
    zero = np.zeros(1)
    return _tokens(zero, zero, zero, zero)


def _logp(delta: np.ndarray) -> dict[str, float]:
    size = np.abs(delta)
    p50, p99 = _percentiles(size, 50, 99)
    return {
        "logp_diff/mean": _mean(delta),
        "logp_abs_diff/mean": _mean(size),
        "logp_abs_diff/std": _std(size),
        "logp_abs_diff/p50": p50,
        "logp_abs_diff/p99": p99,
        "logp_abs_diff/max": _max(size),
    }


def _ulp(ulp: np.ndarray) -> dict[str, float]:
    (p99,) = _percentiles(ulp, 99)
    return {"ulp/p99": p99, "ulp/max": _max(ulp)}


def _prob(train_logp: np.ndarray, rollout_logp: np.ndarray) -> dict[str, float]:
    train = np.exp(train_logp)
    # exp of equal numbers is equal, of +0 and -0 too
    rollout = train if np.array_equal(train_logp, rollout_logp) else np.exp(rollout_logp)
    size = np.abs(train - rollout)
    return {
        "prob_abs_diff/mean": _mean(size),
        "prob_abs_diff/std": _std(size),
        "prob_abs_diff/max": _max(size),
        # points on the diagonal correlate perfectly, also when all of them are the same point
        "prob_pearson": 1.0 if len(train) and np.array_equal(train, rollout) else _pearson(train, rollout),
    }


def _divergence(delta: np.ndarray) -> dict[str, float]:
    with np.errstate(over="ignore"):
        k3 = np.expm1(delta) - delta
        return {
            "k1": _mean(-delta),
            "k3": _mean(k3),
            "k3_max": _max(k3),
            "mult_prob_error": _mean(np.exp(np.abs(delta))),
            # expm1 keeps E[ρ²]-1 exact where ρ² would round to 1
            "chi2/token": _mean(np.expm1(2.0 * delta)),
        }


def _ratio(delta: np.ndarray) -> dict[str, float]:
    with np.errstate(over="ignore"):
        ratio = np.exp(delta)
    shifted = np.exp(delta - delta.max()) if len(delta) else delta  # the common factor cancels in ess, its overflow not
    squares = _mean(shifted**2)
    return {
        "ratio_raw/min": float(ratio.min()) if len(ratio) else math.nan,
        "ratio_raw/mean": _mean(ratio),
        "ratio_raw/max": _max(ratio),
        "ess": _mean(shifted) ** 2 / squares if len(delta) else math.nan,
    }


def _sequences(sample: np.ndarray, train: np.ndarray, rollout: np.ndarray, delta: np.ndarray) -> dict[str, float]:
    """Per sample over its finite tokens, then the mean over the samples that have one. All of them [n]."""
    # pairs are flattened in order: a sample's tokens are one slice
    lengths = np.bincount(sample)
    lengths = lengths[lengths > 0]
    spans = [slice(begin, end) for begin, end in pairwise([0, *np.cumsum(lengths).tolist()])]
    total, equal = _sums(train, spans), np.array_equal(train, rollout)
    # equal numbers have equal sums, and 0 as every delta
    rollout, log_ratio = (total, np.zeros(len(spans))) if equal else (_sums(rollout, spans), _sums(delta, spans))
    train, rollout = -total / lengths, -rollout / lengths
    with np.errstate(over="ignore"):
        return {
            "ppl/train": _mean(np.exp(train)),
            "ppl/rollout": _mean(np.exp(rollout)),
            "ppl/ratio": _mean(np.exp(train - rollout)),
            "log_ppl_abs_diff": _mean(np.abs(train - rollout)),
            "chi2/seq": _mean(np.expm1(2.0 * log_ratio)),
        }


def _adv_skew(comparison: Comparison, delta: np.ndarray, advantages: Sequence[np.ndarray]) -> float:
    """Correlation of Δ, float64 [n], with the advantage's sign; 0 when either is constant, as Δ is when all agrees."""
    if len(advantages) != comparison.num_samples:
        raise ValueError(f"advantages has {len(advantages)} entries for {comparison.num_samples} samples")
    finite = _finite(comparison)
    sample, position = comparison.sample[finite], comparison.position[finite]
    sizes = np.array([values.size for values in advantages], np.int64)
    if {values.ndim for values in advantages} - {1} or (position >= sizes[sample]).any():
        raise ValueError("advantages must have one value per response token of each sample")
    if _constant(delta):  # it correlates with nothing, whatever the signs are
        return 0.0
    values = np.concatenate([*advantages, np.zeros(0)])[(np.cumsum(sizes) - sizes)[sample] + position]
    skew = _pearson(delta, np.sign(values))
    return 0.0 if math.isnan(skew) and len(delta) else skew


def _provenance(comparison: Comparison, provenance: Provenance) -> dict[str, float]:
    values: dict[str, float] = {}
    if provenance.trainer_version is not None:
        age = provenance.trainer_version - comparison.versions
        values |= {"policy_age/mean": _mean(age), "policy_age/max": _max(age)}
    for name in ("weights_equal", "weights_version"):
        if (value := getattr(provenance, name)) is not None:
            values[name] = float(value)
    return values


def _mean(values: np.ndarray) -> float:
    return _sum(values) / len(values) if len(values) else math.nan


def _sums(values: np.ndarray, spans: Sequence[slice]) -> np.ndarray:
    """The sum of each span: float64 [len(spans)]."""
    numbers = _doubles(values)
    return np.array([math.fsum(numbers[span]) for span in spans], np.float64)


def _sum(values: np.ndarray) -> float:
    # most statistics of a step without a difference are of equal numbers; + 0.0: fsum knows no -0
    if _constant(values):
        return len(values) * float(values[0]) + 0.0
    try:
        return math.fsum(_doubles(values))
    except OverflowError:  # finite terms whose partial sums leave float64's range
        return float(values.sum())


def _doubles(values: np.ndarray) -> array[float]:
    """The same numbers, from where fsum reads them in half the time of a list."""
    return array("d", values.astype(np.float64, copy=False).tobytes())


def _constant(values: np.ndarray) -> bool:
    """True if all are the same number, -0 being 0; False of none at all."""
    return bool(len(values) and values[0] == values[-1] and values.min() == values.max())


def _std(values: np.ndarray) -> float:
    """Over n - 1, as verl and torch have it, in two passes; 0 of a single value."""
    if len(values) < 2:
        return 0.0 if len(values) else math.nan
    return math.sqrt(_sum((values - _mean(values)) ** 2) / (len(values) - 1))


def _max(values: np.ndarray) -> float:
    return float(values.max()) if len(values) else math.nan


def _percentiles(values: np.ndarray, *levels: float) -> list[float]:
    """Linear interpolation between the nearest ranks."""
    if len(values) and not values.any():
        return [0.0] * len(levels)  # between zeros nothing is interpolated
    return np.percentile(values.astype(np.float64), levels).tolist() if len(values) else [math.nan] * len(levels)


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation; NaN when one of them is constant."""
    if len(a) == 0 or _constant(a) or _constant(b):
        return math.nan
    x, y = a - _mean(a), b - _mean(b)
    spread = math.sqrt(_sum(x * x)) * math.sqrt(_sum(y * y))
    return _sum(x * y) / spread if spread > 0 else math.nan
