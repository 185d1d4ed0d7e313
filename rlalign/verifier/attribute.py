"""Why do the log-probs of a dump differ from a model's? By scoring in other ways, until one of them agrees.

Every cause of verifier/causes.py is a change to how a sequence is scored. Each is tried alone, and then greedily: the
one that removes most is kept, and the others are tried on top of it, until nothing removes a considerable part of what
is left. The rest is set beside what rounding alone gives. Legend: N tokens that count, of all sequences one after
another; r reported log-probs, t those of scoring, both float32 [N]; Δ = t - r.

A cause is kept if it removes at least ``MIN_SHARE`` of the mean |Δ| by a margin that chance does not give; one of
arithmetic alone ``MIN_NUMERIC_SHARE``, since two roundings of the same size always hide a part of each other. A coarser
dtype than scoring's adds errors of its own, so that little of |Δ| goes: it is known by errors that go the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from rlalign.config import Dtype
from rlalign.verifier import causes as catalogue
from rlalign.verifier.attribution import Attribution, Effect, Rounding, Step, within_rounding
from rlalign.verifier.causes import Cause, Way, without_effect
from rlalign.verifier.compare import compare
from rlalign.verifier.dumps.record import DumpSequence
from rlalign.verifier.metrics import align_metrics
from rlalign.verifier.residue import at_the_edge, broken, describe_rest
from rlalign.verifier.score import Scorer, ScoreSettings, effective_sampling
from rlalign.verifier.scores import Gap, Scores, fitted_base, fitted_temperature, last_place, swaps

MIN_SHARE = 0.05
MIN_NUMERIC_SHARE = 0.25
_MIN_STANDARD_ERRORS = 4.0
_MAX_STEPS = 5
# at most so many times another
_OF_A_SIZE = 1.5
# one sequence by itself can be lucky: it needs some tokens, and to have been far off
_MIN_TOKENS = 4
_FAR_OFF = 3.0
# how many times the mean |Δ| of another order of summation a probability may be off at the edge of a support
_EDGE = 8.0
# what the verdict on a rest compares with, beside another order of summation
_FLOAT32 = catalogue.setting_cause("", "numerics", "", "", dtype="float32")


def attribute(
    sequences: Sequence[DumpSequence],
    scorer: Scorer,
    *,
    base: ScoreSettings | Sequence[ScoreSettings] | None = None,
    dtype: Dtype = "float32",
    num_previous: int = 0,
    config_changes: Sequence[tuple[str, int | float | str, str]] = (),
    decode: bool = True,
    progress: Callable[[str], None] = lambda _what: None,
) -> Attribution:
    """Attribute the difference between the dump's log-probs and the scorer's.

    base: how scoring is done to begin with, of all sequences or of each. dtype: what the scorer computes in where
    settings don't say. num_previous:
    older checkpoints that the scorer has. config_changes: as ``causes.config_changes`` gives them. decode: also score
    token by token, which takes as many forwards as the longest response has tokens. progress: told what is scored.
    Raises what the scorer raises for ``base``; a cause that it can't imitate is listed with the reason.
    """
    scores = Scores(sequences, scorer, decode)
    base = base or ScoreSettings()
    bases = [base] * len(sequences) if isinstance(base, ScoreSettings) else list(base)
    native = any(one.numerics == "native" for one in bases)
    ways = [Way(one) for one in bases]
    progress("as the dump says")
    now = scores.of(ways) if len(sequences) else np.zeros(0, np.float32)
    comparison = compare(scores.pairs(now))
    metrics, num_tokens = align_metrics(comparison), comparison.num_tokens
    edge = _edge(scores, ways, now)
    scores.leave_out(edge)
    whole = scores.gap(now)
    damaged = (*broken(sequences, now, scores.place), *at_the_edge(edge, scores.place))
    if whole.tokens == 0 or whole.mismatches == 0:
        return Attribution(len(sequences), whole, (), (), whole, None, damaged, (), metrics, num_tokens)
    found = [
        *catalogue.shift_causes(),
        *swaps(scores, now),
        *catalogue.sampling_causes(),
        *catalogue.weight_causes(num_previous),
        *catalogue.config_causes(config_changes),
        *catalogue.token_causes(),
        *catalogue.position_causes(),
        *catalogue.numeric_causes(dtype, decode=decode, native=native),
    ]
    found += [*fitted_temperature(scores, ways, now, whole), *fitted_base(scores, ways, now)]
    effects = _alone(scores, ways, now, found, progress)
    usable = [effect.cause for effect in effects if effect.skipped is None]
    steps, ways, now = _greedily(scores, ways, now, usable, progress)
    rest = scores.gap(now)
    met = any(step.cause.kind == "numerics" for step in steps)
    rounding = None
    if rest.mismatches:
        rounding = replace(_rounding(scores, ways, now, dtype, progress), met=met, native=native)
    explained = rounding is not None and within_rounding(rest, rounding) and not rounding.in_doubt(rest)
    findings = describe_rest(sequences, scores.distance(now), now, scores.place, scores.counts, explained=explained)
    return Attribution(
        len(sequences), whole, tuple(effects), tuple(steps), rest, rounding, damaged, findings, metrics, num_tokens
    )


def _alone(
    scores: Scores, ways: list[Way], now: np.ndarray, found: Sequence[Cause], progress: Callable[[str], None]
) -> list[Effect]:
    effects: list[Effect] = []
    seen: dict[bytes, str] = {now.tobytes(): ""}
    nothing = Gap(0, 0, 0.0, 0.0)
    for cause in found:
        progress(cause.name)
        changed = [cause.change(way, place) for place, way in enumerate(ways)]
        if reason := _changes_nothing(scores.sequences, ways, changed, cause):
            effects.append(Effect(cause, nothing, nothing, 0.0, reason))
            continue
        try:
            other = scores.of(changed)
        except (ValueError, NotImplementedError) as error:  # the scorer can't imitate it: listed, not hidden
            effects.append(Effect(cause, nothing, nothing, 0.0, " ".join(str(error).split())))
            continue
        twin = seen.setdefault(other.tobytes(), cause.name)
        both = np.isfinite(scores.distance(now)) & np.isfinite(scores.distance(other))
        effects.append(
            Effect(
                cause,
                scores.gap(now, both),
                scores.gap(other, both),
                scores.apart(other, now) or 0.0,
                "changes no log-prob here" if twin == "" else None,
                twin if twin not in ("", cause.name) else None,
            )
        )
    return effects


def _changes_nothing(
    sequences: Sequence[DumpSequence], before: Sequence[Way], after: Sequence[Way], cause: Cause
) -> str | None:
    """Why a change is none, for what can be told without scoring."""
    if not all(map(_same_distribution, sequences, before, after)):
        return None
    return without_effect(sequences, before, cause) if cause.kind == "sampling" else "changes nothing here"


def _same_distribution(sequence: DumpSequence, before: Way, after: Way) -> bool:
    """Whether two ways of scoring are the same, but for transforms that nothing is after."""
    if replace(before, settings=after.settings) != after:
        return False
    params = effective_sampling(sequence, before.settings)
    moved = _differ_in(before.settings, after.settings) - {"processed", "ignore", "temperature"}
    if moved == {"filters_first"}:
        return not params.truncated or params.temperature == 1
    return not moved and params == effective_sampling(sequence, after.settings)


def _differ_in(a: ScoreSettings, b: ScoreSettings) -> set[str]:
    return {name for name in a.__dataclass_fields__ if getattr(a, name) != getattr(b, name)}


def _greedily(
    scores: Scores,
    ways: list[Way],
    now: np.ndarray,
    usable: Sequence[Cause],
    progress: Callable[[str], None],
) -> tuple[list[Step], list[Way], np.ndarray]:
    steps: list[Step] = []
    order = scores.other_order(ways)
    floor = 0.0 if order is None else scores.apart(order, now) or 0.0
    while len(steps) < _MAX_STEPS and scores.gap(now).mismatches:
        best: tuple[float, Cause, list[Way], np.ndarray, tuple[int, ...] | None] | None = None
        for cause in usable:
            progress(f"{cause.name} on top of {len(steps)} others" if steps else cause.name)
            for changed, chosen in _candidates(scores, ways, now, cause, floor):
                other = _without_edge(scores, changed)
                gain = _gain(scores, now, other, cause)
                # a cause further down the list must be better, not as good
                if gain > 0 and (best is None or gain > best[0] * (1 + 1e-9)):
                    best = (gain, cause, changed, other, chosen)
        if best is None:
            break
        before = scores.gap(now)
        _, cause, ways, _, chosen = best
        now = scores.of(ways)
        scores.leave_out(_edge(scores, ways, now))
        ids = None if chosen is None else tuple(scores.sequences[place].id for place in chosen)
        steps.append(Step(cause, before, scores.gap(now), chosen, ids))
    return steps, ways, now


def _candidates(
    scores: Scores, ways: list[Way], now: np.ndarray, cause: Cause, floor: float
) -> list[tuple[list[Way], tuple[int, ...] | None]]:
    """The cause in all sequences, and in those that it brings close by itself."""
    changed = [cause.change(way, place) for place, way in enumerate(ways)]
    if changed == ways:
        return []
    try:
        other = _without_edge(scores, changed)
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
    return end <= 0.5 * start and (start > _FAR_OFF * floor)


def _gain(scores: Scores, now: np.ndarray, other: np.ndarray, cause: Cause) -> float:
    """Sum of |Δ| that goes; 0 if it is too small a part, or may be chance."""
    before, after = scores.distance(now), scores.distance(other)
    both = np.isfinite(before) & np.isfinite(after)
    if not both.any():
        return 0.0
    better = before[both] - after[both]
    total, share = float(better.sum()), float(better.sum()) / max(float(before[both].sum()), 1e-300)
    if cause.name == catalogue.COARSER and share > 0:
        fine = both & np.isfinite(now) & np.isfinite(other)
        error, moved = (values[fine].astype(np.float64) - now[fine] for values in (scores.reported, other))
        if _same_errors(error, moved):
            return total
    if share < (MIN_NUMERIC_SHARE if cause.kind == "numerics" else MIN_SHARE):
        return 0.0
    # tokens that the cause leaves as they are, of other sequences for instance, say nothing of whether it is chance
    touched = better[now[both] != other[both]]
    root = len(touched) ** 0.5
    # a few tokens beyond the support outweigh all others' sum, not their signs
    sure = total > _MIN_STANDARD_ERRORS * float(touched.std()) * root
    sure |= float(np.sign(touched).sum()) > _MIN_STANDARD_ERRORS * root
    exact = scores.gap(other, both).mismatches < scores.gap(now, both).mismatches // 2
    return total if exact or (sure and len(touched) >= _MIN_TOKENS) else 0.0


def _same_errors(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether errors [n] are of a size, and correlated as chance does not give."""
    if len(a) < _MIN_TOKENS or a.std() == 0 or b.std() == 0:
        return False
    ratio, correlation = np.abs(a).mean() / np.abs(b).mean(), np.corrcoef(a, b)[0, 1]
    return 1 / _OF_A_SIZE <= ratio <= _OF_A_SIZE and correlation * len(a) ** 0.5 > _MIN_STANDARD_ERRORS


def _rounding(
    scores: Scores,
    ways: Sequence[Way],
    now: np.ndarray,
    dtype: str,
    progress: Callable[[str], None],
) -> Rounding:
    progress("what rounding alone gives")
    # one of the causes that were kept may be another one
    dtype = next((way.settings.dtype for way in ways if way.settings.dtype is not None), dtype)
    order, single = scores.other_order(ways), scores.beside(ways, _FLOAT32) if dtype != "float32" else None
    other = Gap(0, 0, 0.0, 0.0) if order is None else scores.between(order, now)
    units = last_place(now[scores.counts & np.isfinite(now)])
    return Rounding(
        dtype=dtype,
        other_order=other.mean_abs if other.tokens else None,
        other_mismatches=other.mismatches,
        last_place=float(units.mean()) if len(units) else 0.0,
        largest=max(other.max_abs, float(units.max(initial=0.0))),
        engine_error=None if single is None else scores.apart(single, scores.reported),
        own_error=None if single is None else scores.apart(single, now),
        outside=int((scores.counts & np.isneginf(now)).sum()),
    )


def _without_edge(scores: Scores, ways: Sequence[Way]) -> np.ndarray:
    """Log-probs float32 [N] of ``ways``; NaN where ``_edge`` says that they tell nothing."""
    scored = scores.of(ways)
    return np.where(_edge(scores, ways, scored), np.float32(np.nan), scored)


def _edge(scores: Scores, ways: Sequence[Way], now: np.ndarray) -> np.ndarray:
    """bool [N]: tokens that fell out of the recomputed support by no more than rounding.

    They are -inf by whichever side of the edge they fell on, and say nothing of any cause. Another order of summation
    without any filter says how far rounding moves a probability.
    """
    outside = scores.counts & np.isneginf(now)
    if not outside.any():
        return outside
    unfiltered = [catalogue.FILTERS.change(way, place) for place, way in enumerate(ways)]
    order = scores.other_order(unfiltered)
    floor = None if order is None else scores.apart(order, scores.of(unfiltered))
    if not floor:
        return np.zeros_like(outside)
    loosened = scores.of([replace(way, settings=replace(way.settings, slack=_EDGE * floor)) for way in ways])
    return outside & np.isfinite(loosened)
