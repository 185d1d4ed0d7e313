"""Sampling parameters that a dump does not name: temperature and filters, fitted to its log-probs.

A fit takes whatever comes nearest, so these causes are ``guessed``. Legend: N tokens of all sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rlalign.verifier.causes import Cause, Way, setting_cause
from rlalign.verifier.edge import without_edge
from rlalign.verifier.score import effective_sampling
from rlalign.verifier.scores import Scores

_TEMPERATURES = (0.2, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5, 2.0)
_CLOSER = (0.05, 0.02, 0.01)
# coarse values of a filter, and how fine they are then taken
_FILTERS: dict[str, tuple[tuple[float, ...], float]] = {
    "top_k": ((1, 2, 5, 10, 20, 50, 100, 200, 500, 1000), 1),
    "top_p": ((0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99), 0.01),
    "min_p": ((0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5), 0.01),
}
# values of few digits, which people choose, and how much more error is no more than rounding's
_TIDY = {"top_k": 5, "top_p": 0.05, "min_p": 0.05}
_TIDY_TEMPERATURE = 0.1
_EQUAL = 1.1
_FIT_TOKENS = 512
# a pair is tried many times
_PAIR_TOKENS = 128
_PAIR_ROUNDS = 4
# pairs of one round that go on, by their error
_CLOSE = 2.0
# what either of a true pair leaves alone, at most, of |Δ|
_PROMISING = 0.75
# as renormalisation leaves them: share of tokens on one side of scoring; or how far their mean is, in standard errors
# and of the mean |Δ|
_ONE_SIDED, _STANDARD_ERRORS, _OF_SIZE = 0.9, 4.0, 0.2
# sequences that differ, by their median |Δ|
_MUCH, _TYPICAL_TOKENS = 0.1, 8
# share of |Δ| that is left where a fit is worth a try
_WORTH = 0.9
# what is true of several leaves far less than a part of it
_HALF = 0.5
# top-k and top-p at once, as generation_config.json's often have them: values of top-k to begin with
_STARTS = (10, 20, 50)
_ROUNDS = 6


@dataclass(slots=True)
class _Fit:
    """The first of a dump's sequences that differ, and mean |Δ| of scoring them with other sampling parameters.
    among: bool [N], their tokens; None for all. places: which they are; none for all."""

    scores: Scores
    ways: Sequence[Way]
    among: np.ndarray | None = None
    places: tuple[int, ...] = ()
    known: dict[tuple[tuple[str, float], ...], float] = field(default_factory=dict)

    @classmethod
    def of(cls, scores: Scores, ways: Sequence[Way], num_tokens: int, much: float = _MUCH) -> _Fit:
        """much: share of the |Δ| of the sequence that differs most; 1 takes that one alone."""
        sizes = _typical(scores, scores.of(ways))
        least = much * max(sizes, default=0.0)
        places, found = [], 0
        for place, size in enumerate(sizes):
            count = int(scores.counts[scores.place == place].sum())
            if count and found < num_tokens and size >= least:
                places.append(place)
                found += count
        # other sequences' log-probs, prompts or caches are looked up by place
        apart = all(way.partner is None and way.settings.prompt not in ("next", "previous") for way in ways)
        apart &= not any(way.settings.cached for way in ways)
        if not apart:
            return cls(scores, ways)
        if int(scores.counts.sum()) <= _FIT_TOKENS:  # what all sequences have in these settings is wanted later on
            return cls(scores, ways, np.isin(scores.place, places), tuple(places))
        few = Scores([scores.sequences[place] for place in places], scores.scorer, scores.decode, scores.dtype)
        few.counts = scores.counts[np.isin(scores.place, places)]
        return cls(few, [ways[place] for place in places], places=tuple(places))

    def error(self, **values: float) -> float:
        """Of these parameters in place of those that ``ways`` have."""
        key = tuple(sorted(values.items()))
        if key not in self.known:
            ways = [replace(way, settings=replace(way.settings, **values)) for way in self.ways]
            self.known[key] = self.scores.gap(without_edge(self.scores, ways), self.among).mean_abs
        return self.known[key]

    def floor(self) -> float:
        """Mean |Δ| that another order of summation gives, at the parameters as they are; 0 if there is no other."""
        order = self.scores.other_order(self.ways)
        return 0.0 if order is None else self.scores.apart(order, self.scores.of(self.ways), self.among) or 0.0

    def temperature(self, near: float | None = None, **others: float) -> float:
        """The one of least error, to a hundredth; of equals one of few digits. near: only some around this one."""
        start = _TEMPERATURES if near is None else (near - 0.1, near, near + 0.1)
        tried = {t: self.error(temperature=t, **others) for t in (round(t, 2) for t in start) if t > 0}
        for width in _CLOSER:
            middle = min(tried, key=lambda t: (tried[t], abs(t - 1)))
            around = [round(middle + sign * width, 2) for sign in (-1, 1)]
            tried |= {t: self.error(temperature=t, **others) for t in around if t > 0 and t not in tried}
        best = min(tried, key=lambda t: (tried[t], abs(t - 1)))
        return _tidy(best, _TIDY_TEMPERATURE, lambda t: self.error(temperature=t, **others))

    def filter(self, name: str, **others: float) -> float:
        """The value of least error: around the best of the coarse ones error falls and then rises. Of equals a common
        one."""
        return self.lowest(name, lambda value: self.error(**{name: value}, **others))

    def lowest(self, name: str, error: Callable[[float], float]) -> float:
        """The filter's value that ``error`` is least for, as ``filter`` looks for it."""
        coarse, step = _FILTERS[name]
        best = min(range(len(coarse)), key=lambda i: error(coarse[i]))
        low, high = coarse[max(0, best - 1)], coarse[min(len(coarse) - 1, best + 1)]
        values = [type(coarse[0])(round(low + step * i, 2)) for i in range(round((high - low) / step) + 1)]
        lowest = min((_lowest(values, error), coarse[best]), key=error)
        return coarse[best] if error(coarse[best]) <= _EQUAL * error(lowest) else _tidy(lowest, _TIDY[name], error)


def _typical(scores: Scores, now: np.ndarray) -> list[float]:
    """Of every sequence the median |Δ| of scoring's log-probs float32 [N]; 0 where few tokens count, which any value
    fits."""
    size = scores.distance(now)
    found = [size[(scores.place == place) & np.isfinite(size)] for place in range(len(scores.sequences))]
    return [float(np.median(one)) if len(one) >= _TYPICAL_TOKENS else 0.0 for one in found]


def _tidy(value: float, step: float, error: Callable[[float], float]) -> float:
    """The nearest multiple of ``step`` if rounding can't tell it from ``value``."""
    tidy = type(value)(round(round(value / step) * step, 2))
    return tidy if tidy > 0 and error(tidy) <= _EQUAL * error(value) else value


def _lowest(values: Sequence[float], error: Callable[[float], float]) -> float:
    """The value of least error, which falls and then rises along ascending values."""
    low, high = 0, len(values) - 1
    while high - low > 2:
        left, right = low + (high - low) // 3, high - (high - low) // 3
        if error(values[left]) <= error(values[right]):
            high = right
        else:
            low = left
    return min(values[low : high + 1], key=error)


def fitted_sampling(scores: Scores, ways: Sequence[Way], now: np.ndarray) -> list[Cause]:
    """Causes that are a temperature, a filter, or both at once, other than the dump names; those that fit best.

    A filter is tried where the dump's log-probs are nearly all on one side of scoring's, or some tokens have none;
    both where a temperature alone leaves more than rounding does, top-k and top-p at once where both do.
    """
    fit = _Fit.of(scores, ways, _FIT_TOKENS)
    before, least = fit.error(), 2 * fit.floor()
    found: list[dict[str, float]] = []
    temperature = fit.temperature()
    # greedy ones have the log-probs of temperature 1
    named = {effective_sampling(s, w.settings).temperature or 1.0 for s, w in zip(scores.sequences, ways, strict=True)}
    if named != {temperature} and fit.error(temperature=temperature) <= _WORTH * before:
        found.append({"temperature": temperature})
    if all(fit.error(**values) > least for values in found):
        if _one_sided(scores, now):
            filters = [{name: fit.filter(name)} for name in _FILTERS]
            found += [values for values in filters if fit.error(**values) <= _WORTH * before]
        few = _Fit.of(scores, ways, _PAIR_TOKENS)
        if found and min(fit.error(**values) for values in found) > least:
            found += _pairs(few, temperature)
        # of sequences that were sampled at several temperatures none holds of all
        if found and len(named) == 1 and (alone := min(fit.error(**values) for values in found)) > least:
            temperatures = {*named, *(values["temperature"] for values in found if "temperature" in values)}
            if (several := _both_filters(few, temperatures)) and fit.error(**several) <= _HALF * alone:
                found.append({k: v for k, v in several.items() if k != "temperature" or named != {v}})
    if all(fit.error(**values) > _HALF * before for values in found):
        # what holds of some sequences alone may be nothing in the mean of all
        one = _Fit.of(scores, ways, 1, much=1.0)
        if one.places == fit.places:
            return [sampling_cause(**values) for values in found]
        own = [{"temperature": one.temperature()}, *({name: one.filter(name)} for name in _FILTERS)]
        found += [values for values in own if values not in found and one.error(**values) <= _HALF * one.error()]
    return [sampling_cause(**values) for values in found]


def _one_sided(scores: Scores, now: np.ndarray) -> bool:
    valid = scores.counts & ~np.isnan(now)
    if (valid & np.isneginf(now)).any():
        return True
    delta = scores.reported[valid].astype(np.float64) - now[valid]
    if not len(delta) or max((delta > 0).mean(), (delta < 0).mean()) >= _ONE_SIDED:
        return len(delta) > 0
    least = max(_STANDARD_ERRORS * delta.std() / len(delta) ** 0.5, _OF_SIZE * np.abs(delta).mean())
    return bool(abs(delta.mean()) > least)


def _pairs(fit: _Fit, temperature: float) -> list[dict[str, float]]:
    """A filter and a temperature, each fitted in turn: the pair of least error, if one halves what either leaves."""
    alone = min(fit.error(temperature=temperature), *(fit.error(**{name: fit.filter(name)}) for name in _FILTERS))
    if alone > _PROMISING * fit.error():
        return []
    pairs = {name: _in_turn(fit, name, {"temperature": temperature}) for name in _FILTERS}
    seen = list(pairs.values())
    for _ in range(_PAIR_ROUNDS):
        least = min(fit.error(**values) for values in pairs.values())
        pairs = {name: values for name, values in pairs.items() if fit.error(**values) <= _CLOSE * least}
        better = {name: _in_turn(fit, name, values) for name, values in pairs.items()}
        if better == pairs:
            break
        pairs = better
        seen += pairs.values()
    best = min(seen, key=lambda values: fit.error(**values))
    if fit.error(**best) > 2 * fit.floor():
        best = min(
            [best, *(_together(fit, name, values) for name, values in pairs.items())], key=lambda v: fit.error(**v)
        )
    return [best] if fit.error(**best) <= _HALF * alone else []


def _together(fit: _Fit, name: str, values: dict[str, float]) -> dict[str, float]:
    """The pair of least error around this one, the temperature fitted to each value of the filter: where a larger
    min-p makes up for a higher temperature, neither gets better by itself."""

    def beside(value: float) -> dict[str, float]:
        return {"temperature": fit.temperature(values["temperature"], **{name: value}), name: value}

    value = fit.lowest(name, lambda value: fit.error(**beside(value)))
    return beside(value)


def _both_filters(fit: _Fit, temperatures: Iterable[float]) -> dict[str, float] | None:
    """Top-k and top-p of least error, each fitted in turn, and the temperature with them, from these on; None if one of
    the two does not halve what the others leave."""
    starts = []
    for temperature in temperatures:
        for top_k in _STARTS:
            values = {"temperature": temperature, "top_k": top_k}
            starts.append(values | {"top_p": fit.filter("top_p", **values)})
    best = min(starts, key=lambda values: fit.error(**values))
    for _ in range(_ROUNDS):
        before = best
        for name in ("top_k", "top_p"):
            others = {key: value for key, value in best.items() if key != name}
            best = others | {name: fit.filter(name, **others)}
        filters = {key: best[key] for key in ("top_k", "top_p")}
        best = {"temperature": fit.temperature(best["temperature"], **filters), **filters}
        if best == before:
            break
    without = ({key: value for key, value in best.items() if key != name} for name in ("top_k", "top_p"))
    return best if all(fit.error(**best) <= _HALF * fit.error(**values) for values in without) else None


def _in_turn(fit: _Fit, name: str, values: dict[str, float]) -> dict[str, float]:
    """The filter fitted at this temperature, and the temperature then to that."""
    value = fit.filter(name, temperature=values["temperature"])
    return {"temperature": fit.temperature(values["temperature"], **{name: value}), name: value}


def sampling_cause(**values: float) -> Cause:
    """Sampling parameters other than the dump names, if it names any, found by fitting."""
    name = ",".join(f"{key}={value:g}" for key, value in values.items())
    what = " and ".join(
        f"at temperature {value:g}" if key == "temperature" else f"renormalised over {key}={value:g}"
        for key, value in values.items()
    )
    return setting_cause(
        name, "sampling", f"the log-probs are {what}, other than the dump says",
        "put the sampling parameters into the dump (vLLM takes those of generation_config.json where a request names "
        "none; transformers' generate has top_k=50), and score with them (verl: rollout.temperature; TRL: temperature)",
        guessed=True, **values,
    )  # fmt: skip
