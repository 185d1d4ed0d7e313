"""Why do the log-probs of a dump differ from a model's? By scoring in other ways, until one of them agrees.

Every cause is a change to how a sequence is scored (causes.py, config_causes.py, data_causes.py, in_flight.py); a few
are fitted (sampling_fit.py). Each is tried alone, and then on top of what was kept before (greedy.py). The rest is set
beside what rounding alone gives. Legend: N tokens that count, of all sequences one after another; r reported log-probs,
t those of scoring, both float32 [N]; Δ = t - r.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rlalign.config import ScoringDtype
from rlalign.verifier import causes as catalogue
from rlalign.verifier.attribution import Attribution, Effect, Rounding, Step, within_rounding
from rlalign.verifier.causes import Cause, Way, without_effect
from rlalign.verifier.compare import compare
from rlalign.verifier.config_causes import Change, config_causes, generation_causes
from rlalign.verifier.data_causes import fitted_base, grid_causes, shift_causes, stored_grid, swaps
from rlalign.verifier.dumps.record import DumpSequence
from rlalign.verifier.edge import moved_by_edge, outside_by_rounding
from rlalign.verifier.greedy import greedily
from rlalign.verifier.in_flight import in_flight_causes
from rlalign.verifier.metrics import align_metrics
from rlalign.verifier.padding_fit import padding_causes
from rlalign.verifier.residue import at_the_edge, broken, describe_rest, lean
from rlalign.verifier.sampling_fit import fitted_sampling
from rlalign.verifier.score import Scorer, ScoreSettings, effective_sampling
from rlalign.verifier.scores import Gap, Scores, grid_step, last_place

# what a cause may leave where the rest is unexplained; a guessed filter where the rest is on one side
_NEXT_TO, _HALF, _ASIDE = 0.05, 0.5, 0.01
# what it leaves of the few sequences that it holds of, where others are off too
_FIFTH = 0.2
_FILTERS = ("top_k", "top_p", "min_p")
# so many causes that can't be right, and no more values are fitted
_MOST_WRONG = 5
# a factor that is right to five digits, such as somebody's 1.4427, is no fault of its own
_DIGITS = 1e-5
# share of the sequences that is as good as all
_MANY = 0.75
# of other orders of summation: a token that is off by more than so many times their largest is not one of theirs
_BEYOND, _TYPICAL = 3.0, 20.0
_NOTHING = Gap(0, 0, 0.0, 0.0)


def attribute(
    sequences: Sequence[DumpSequence],
    scorer: Scorer,
    *,
    base: ScoreSettings | Sequence[ScoreSettings] | None = None,
    dtype: ScoringDtype = "float32",
    num_previous: int = 0,
    config_changes: Sequence[Change] = (),
    generation: Mapping[str, Any] | None = None,
    decode: bool = True,
    progress: Callable[[str], None] = lambda _what: None,
) -> Attribution:
    """Attribute the difference between the dump's log-probs and the scorer's.

    base: how scoring is done to begin with, of all sequences or of each. dtype: what the scorer computes in where
    settings don't say. num_previous: older checkpoints that the scorer has. config_changes: as
    ``config_causes.config_changes`` gives them. generation: fields of generation_config.json. decode: also score token
    by token, which takes as many forwards as the longest response has tokens. progress: told what is scored.
    Raises what the scorer raises for ``base``; a cause that it can't imitate is listed with the reason.
    """
    scores = Scores(sequences, scorer, decode, dtype)
    base = base or ScoreSettings()
    ways = [Way(one) for one in ([base] * len(sequences) if isinstance(base, ScoreSettings) else base)]
    native = any(way.settings.numerics == "native" for way in ways)
    progress("as the dump says")
    now = scores.of(ways) if len(sequences) else np.zeros(0, np.float32)
    comparison = compare(scores.pairs(now))
    metrics, num_tokens = align_metrics(comparison), comparison.num_tokens
    counted = scores.counts.copy()
    scores.leave_out(outside_by_rounding(scores, ways, now))
    whole = scores.gap(now)
    damaged = broken(sequences, now, scores.place)
    if whole.tokens == 0 or whole.mismatches == 0:
        damaged += at_the_edge(counted & ~scores.counts, scores.place)
        return Attribution(
            len(sequences), whole, (), (), whole, None, damaged, (), metrics, num_tokens, compared=(comparison,)
        )
    tries = _Tries(
        scores,
        num_previous,
        [*shift_causes(), *swaps(scores, now), *catalogue.sampling_causes(), *generation_causes(generation or {})],
        # a checkpoint that is only configured in another way is both, and the way is what to set
        [*config_causes(config_changes), *catalogue.weight_causes(num_previous), *catalogue.token_causes(),
         *catalogue.position_causes()],
        catalogue.numeric_causes(dtype, decode=decode, native=native),
    )  # fmt: skip
    effects = _alone(scores, ways, now, tries(ways, now, True), progress)
    if not num_previous:
        [stale] = catalogue.weight_causes(1)
        effects.append(Effect(stale, _NOTHING, _NOTHING, 0.0, "no older checkpoint was given (--previous-model)"))
    tries.without = {effect.cause.name for effect in effects if effect.skipped is not None}
    steps, kept, after, nearest = _search(scores, ways, now, tries, progress)
    scores.leave_out(moved_by_edge(scores, kept, after))
    rest, rounding = scores.gap(after), _rounding(scores, kept, after, progress)
    far = _beyond(scores, after, rounding)
    rounding = replace(
        rounding,
        met=any(step.cause.kind == "numerics" for step in steps),
        native=native,
        beyond=int(far.sum()),
        others=scores.gap(after, ~far),
        lean=_lean(scores, after, rounding, ~far),
    )
    sure = not rest.mismatches or (within_rounding(rest, rounding) and not rounding.in_doubt(rest))
    grid = None if rounding.on_grid else stored_grid(scores)
    findings = describe_rest(
        sequences, scores.distance(after), after, scores.place, scores.counts, far,
        explained=sure, others=rounding.explains_others, typical=rounding.alone, grid=grid,
    )  # fmt: skip
    damaged += at_the_edge(counted & ~scores.counts, scores.place)
    return Attribution(
        len(sequences), whole, tuple(effects), tuple(steps), rest, rounding if rest.mismatches else None, damaged,
        findings, metrics, num_tokens, None if sure else nearest,
        (comparison, compare(scores.pairs(after))) if steps else (comparison,),
    )  # fmt: skip


def _search(
    scores: Scores,
    ways: list[Way],
    now: np.ndarray,
    tries: _Tries,
    progress: Callable[[str], None],
) -> tuple[list[Step], list[Way], np.ndarray, Step | None]:
    """Causes that were kept, ways of scoring with them, log-probs float32 [N] of these; one that came near, no more.

    Whatever can't be right is left out, one by one, and the search begun again: what stood on it may go too.
    """
    counts = scores.counts.copy()
    wrong: list[Step] = []
    while True:
        steps, kept, after = greedily(scores, ways, now, tries, progress)
        step = _disbelieved(scores, ways, steps, after, _rounding(scores, kept, after, progress))
        if step is None:
            # a guess that leaves most is no nearer than chance
            near = [one for one in wrong if not one.cause.guessed or one.after.mean_abs <= _HALF * one.before.mean_abs]
            nearest = min(near, key=lambda one: one.after.mean_abs, default=None)
            return _without_replaced(scores, ways, steps, kept), kept, after, nearest
        wrong.append(step)
        scores.counts = counts.copy()
        tries.without.add(step.cause.name)
        # there is always another value beside the one that was left out
        tries.guesses = len(wrong) < _MOST_WRONG


def _without_replaced(scores: Scores, ways: list[Way], steps: list[Step], kept: list[Way]) -> list[Step]:
    """The steps without those that make no difference to ``kept``: a value was fitted again beside a later cause."""
    for step in steps:
        others = [one for one in steps if one is not step]
        if step.cause.guessed and _composed(ways, others) == kept:
            told, now = [], ways
            for one in others:
                after = _composed(now, [one])
                gaps = scores.gap(scores.of(now)), scores.gap(scores.of(after))
                told.append(replace(one, before=gaps[0], after=gaps[1]))
                now = after
            return _without_replaced(scores, ways, told, kept)
    return steps


def _composed(ways: Sequence[Way], steps: Sequence[Step]) -> list[Way]:
    """Ways with the causes of ``steps`` in them, one after another."""
    found = list(ways)
    for step in steps:
        touched = range(len(found)) if step.sequences is None else step.sequences
        for place in touched:
            found[place] = step.cause.change(found[place], place)
    return found


@dataclass(slots=True)
class _Tries:
    """Causes in the order in which equals are preferred, some of them fitted to what is left. without: names of those
    that can't be, or were in vain. guesses: False leaves out what is fitted to nothing but the log-probs."""

    scores: Scores
    num_previous: int
    first: Sequence[Cause]
    then: Sequence[Cause]
    last: Sequence[Cause]
    without: set[str] = field(default_factory=set)
    guesses: bool = True
    _fitted: dict[bytes, list[Cause]] = field(default_factory=dict)

    def __call__(self, ways: Sequence[Way], now: np.ndarray, more: bool) -> list[Cause]:
        fitted = self._fits(ways, now) if more else []
        found = [*self.first, *fitted, *self.then, *self.last]
        return [one for one in found if one.name not in self.without and (self.guesses or not one.guessed)]

    def _fits(self, ways: Sequence[Way], now: np.ndarray) -> list[Cause]:
        # the first are asked for twice: alone, and as a step
        if now.tobytes() not in self._fitted:
            self._fitted[now.tobytes()] = [
                *grid_causes(self.scores),
                *fitted_base(self.scores, ways, now),
                *in_flight_causes(self.scores, ways, now, self.num_previous),
                *(padding_causes(self.scores, ways, now) if self.guesses else ()),
                *self._sampling(ways, now),
            ]
        return self._fitted[now.tobytes()]

    def _sampling(self, ways: Sequence[Way], now: np.ndarray) -> list[Cause]:
        try:
            return fitted_sampling(self.scores, ways, now) if self.guesses else []
        except (ValueError, NotImplementedError):  # a scorer that can't imitate them: nothing to list by name
            return []


def _disbelieved(
    scores: Scores, ways: Sequence[Way], steps: Sequence[Step], now: np.ndarray, rounding: Rounding
) -> Step | None:
    """The first step whose cause can't be right; None if there is none. ways: before the first.

    Of right ones most tokens are left with rounding, whatever else is wrong with the others, and a filter leaves
    nothing on one side. Of a cause that holds of few sequences their tokens are looked at.
    """
    side = _lean(scores, now, rounding)
    near = 2 * max(rounding.alone, rounding.last_place)
    for index, step in enumerate(steps):
        cause, left = step.cause, step.after.mean_abs / step.before.mean_abs
        size = scores.distance(now)
        if step.sequences is not None and len(step.sequences) < _MANY * len(scores.sequences):
            mine = np.isin(scores.place, step.sequences)
            before = scores.gap(scores.of(_composed(ways, steps[:index])), mine)
            left = scores.gap(now, mine).mean_abs / max(before.mean_abs, 1e-300)
            others, size = size[~mine & np.isfinite(size)], np.where(mine, size, np.nan)
            # as near as whatever else is wrong with all lets them be
            if left <= _FIFTH and len(others) and float(np.nanmedian(size)) <= 2 * float(np.median(others)):
                continue
        size = size[np.isfinite(size)]
        if cause.kind == "numerics" or not len(size):
            continue
        # weights of the version before explain what they can, beside whatever scoring can't imitate
        most = _HALF if cause.kind == "weights" and not cause.guessed else _NEXT_TO
        aside = _ASIDE if cause.kind == "sampling" and any(name in cause.name for name in _FILTERS) else _NEXT_TO
        if (float(np.median(size)) > near and left > most) or (cause.guessed and side and left > aside):
            return step
    return None


def _lean(scores: Scores, now: np.ndarray, rounding: Rounding, among: np.ndarray | None = None) -> float:
    """The mean of r - t, where it is no chance; among: bool [N], None for all tokens that count."""
    valid = scores.counts & np.isfinite(now)
    valid &= True if among is None else among
    size = float(np.abs(now[valid]).mean()) if valid.any() else 0.0
    least = max(2 * rounding.last_place, _DIGITS * size)
    return lean(scores.reported[valid].astype(np.float64) - now[valid], least)


def _beyond(scores: Scores, now: np.ndarray, rounding: Rounding) -> np.ndarray:
    """bool [N]: tokens that are off by more than rounding gives at any."""
    size = np.nan_to_num(scores.distance(now))
    differing = size[size > 0]
    typical = float(np.median(differing)) if len(differing) else 0.0
    return size > max(_BEYOND * rounding.largest, _TYPICAL * typical)


def _alone(
    scores: Scores, ways: list[Way], now: np.ndarray, found: Sequence[Cause], progress: Callable[[str], None]
) -> list[Effect]:
    effects: list[Effect] = []
    seen: dict[bytes, str] = {now.tobytes(): ""}
    for cause in found:
        progress(cause.name)
        changed = [cause.change(way, place) for place, way in enumerate(ways)]
        if reason := _changes_nothing(scores.sequences, ways, changed, cause):
            effects.append(Effect(cause, _NOTHING, _NOTHING, 0.0, reason))
            continue
        try:
            other = scores.of(changed)
        except (ValueError, NotImplementedError) as error:  # the scorer can't imitate it: listed, not hidden
            effects.append(Effect(cause, _NOTHING, _NOTHING, 0.0, " ".join(str(error).split())))
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


def _rounding(
    scores: Scores,
    ways: Sequence[Way],
    now: np.ndarray,
    progress: Callable[[str], None],
) -> Rounding:
    progress("what rounding alone gives")
    dtype = scores.dtype_of(ways)
    grid = next((way.grid for way in ways if way.grid is not None), None)
    finite = scores.counts & np.isfinite(now)
    step = 0.0
    if grid is not None:  # a token that rounding moves over the middle of a step is off by all of it
        step = float(grid_step(now[finite], grid).max(initial=0.0))
        ways = [replace(way, grid=None) for way in ways]
        now = scores.of(ways)
    if dtype == "float32" and any(way.settings.logits != "float32" for way in ways):  # a logit that it moves as well
        ways = [replace(way, settings=replace(way.settings, logits="float32")) for way in ways]
        rounded, now = now, scores.of(ways)
        step = max(step, scores.between(rounded, now).max_abs)
    order, single = scores.other_order(ways), scores.in_float32(ways) if dtype != "float32" else None
    other = _NOTHING if order is None else scores.between(order, now)
    own, engine = (_NOTHING if single is None else scores.between(single, of) for of in (now, scores.reported))
    units = last_place(now[finite])
    largest = max(other.max_abs, own.max_abs, float(units.max(initial=0.0)), step)
    return Rounding(
        dtype=dtype,
        other_order=other.mean_abs if other.tokens else None,
        other_mismatches=other.mismatches,
        last_place=float(units.mean()) if len(units) else 0.0,
        largest=largest,
        engine_error=engine.mean_abs if engine.tokens else None,
        engine_spread=engine.spread,
        own_error=own.mean_abs if own.tokens else None,
        outside=int((scores.counts & np.isneginf(now)).sum()),
        on_grid=step > 0,
    )
