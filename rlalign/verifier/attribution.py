"""What ``attribute`` finds, as records: each cause's effect, the steps that were kept, and what is left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rlalign.verifier.causes import Cause
from rlalign.verifier.compare import Comparison
from rlalign.verifier.residue import NO_NUMBERS, Finding
from rlalign.verifier.scores import Gap
from rlalign.verifier.words import counted

# share of the tokens that rounding touches, below which a difference is something else
_FEW = 0.25
# both sides err: one may be as far off as the other, the other way
_TWICE = 2.0
# standard errors that a mean may be off by chance: a router of experts moves few tokens by much
_SPREADS, _BY_CHANCE = 2.0, 3.0
# so many last places of a float32 log-prob a forward in float32 loses at a token, if any
_LAST_PLACES = 4.0


@dataclass(frozen=True, slots=True)
class Effect:
    """One cause alone. before, after: over the tokens that have a log-prob in both ways. moves: mean |Δ| between the
    two ways of scoring, whatever the dump says. skipped: why it was not tried; None if it was. same_as: causes before
    it in the list that give the very same log-probs."""

    cause: Cause
    before: Gap
    after: Gap
    moves: float
    skipped: str | None = None
    same_as: str | None = None

    @property
    def removes(self) -> float:
        """Share of the mean |Δ| that goes; negative if there is more than before."""
        return 1.0 - self.after.mean_abs / self.before.mean_abs if self.before.mean_abs else 0.0


@dataclass(frozen=True, slots=True)
class Step:
    """One cause that was kept, on top of those before it. sequences: places among those compared; None for all.
    ids: what they are called in the dump, which may have had more."""

    cause: Cause
    before: Gap
    after: Gap
    sequences: tuple[int, ...] | None
    ids: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Rounding:
    """What arithmetic alone gives, with all kept causes in place, before scoring's log-probs or logits are put on a
    coarser grid if they are (on_grid). engine_error, own_error: mean |Δ| of r and of t to float32 scoring; None where
    that is scoring's own dtype. engine_spread: standard error of the first. other_order: mean |Δ| between t and
    another order of summation, None if there is no other, whose bits differ in other_mismatches tokens. last_place:
    mean of what the last rounding to float32 gives already (``scores.last_place``). largest: |Δ| at one token, by any
    of these. outside: tokens beyond the support by more than that, in no mean. beyond: tokens that are off by far more
    than any other order of summation gives; others: without these. lean: mean of r - t where it is no chance, else 0.
    met: a cause of arithmetic was kept, so that scoring may be the engine's own but for a few shapes, and few tokens
    be left. native: scoring is PyTorch's, of which the same may be true without a cause."""

    dtype: str
    other_order: float | None
    other_mismatches: int
    engine_error: float | None
    own_error: float | None
    engine_spread: float
    last_place: float
    largest: float
    outside: int = 0
    beyond: int = 0
    others: Gap | None = None
    lean: float = 0.0
    on_grid: bool = False
    met: bool = False
    native: bool = False

    @property
    def alone(self) -> float:
        """Mean |Δ| that two correct implementations may have."""
        return max(self.other_order or 0.0, self.own_error or 0.0)

    def at_least(self, mean: float, spread: float) -> float:
        """What a mean |Δ| is without what chance may have added. Of values that were put on a grid, few are off, each
        by a whole step of it, and their mean is all chance."""
        return max(mean - _SPREADS * spread, 0.0 if self.on_grid else mean / _BY_CHANCE)

    def spares(self, rest: Gap) -> bool:
        """Whether ``rest`` is of far fewer tokens than rounding touches, which spares hardly any. It may where scoring
        is all but the engine's own: then few are no sign as long as none of them is off by more than rounding gives."""
        return not self.on_grid and self._few(rest) and not ((self.met or self.native) and self._holds(rest))

    def is_last_place(self, rest: Gap) -> bool:
        """Whether ``rest`` is what float32 itself loses, and no token more: too little for two orders to show it."""
        return (self.met or self.native) and rest.mean_abs <= _TWICE * self.last_place and self._holds(rest)

    def in_doubt(self, rest: Gap) -> bool:
        """Whether few tokens are taken for rounding by their size alone, where a fault of that size would look so."""
        places = rest.mean_abs * rest.tokens / max(1, rest.mismatches) / self.last_place
        return self._few(rest) and self.native and not (self.met or self.on_grid) and places > _LAST_PLACES

    @property
    def explains_others(self) -> bool:
        """Whether it explains all but the tokens beyond it, where others differ at all."""
        return (
            self.beyond > 0
            and not self.outside
            and not self.lean
            and self.others.mismatches > 0
            and _within(self.others, self)
        )

    def _few(self, rest: Gap) -> bool:
        return rest.mismatches < _FEW * self.other_mismatches

    def _holds(self, rest: Gap) -> bool:
        return rest.max_abs <= _TWICE * self.largest


@dataclass(frozen=True, slots=True)
class Attribution:
    """All of it. broken: log-probs that are no numbers, or of tokens at the edge of a support. findings: what is left
    looks like. metrics: ``align/*`` of ``num_tokens``, the dump as rollout against scoring as the dump says, before any
    cause. nearest: where much is left unexplained, the cause that removes most and yet can't be right; in no step.
    compared: with scoring as the dump says, and with all steps' causes."""

    num_sequences: int
    base: Gap
    effects: tuple[Effect, ...]
    steps: tuple[Step, ...]
    rest: Gap
    rounding: Rounding | None
    broken: tuple[Finding, ...]
    findings: tuple[Finding, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)
    num_tokens: int = 0
    nearest: Step | None = None
    compared: tuple[Comparison, ...] = ()

    @property
    def equal(self) -> bool:
        return self.base.tokens > 0 and self.base.mismatches == 0 and not self.broken

    @property
    def explained(self) -> bool:
        """Nothing is left that a named cause or rounding doesn't account for, and all log-probs are numbers."""
        if any(finding.name in NO_NUMBERS for finding in self.broken):
            return False
        if self.rest.mismatches == 0:
            return True
        return self.rounding is not None and within_rounding(self.rest, self.rounding)

    @property
    def verdict(self) -> str:
        """A line or two: how much, by what, and what is left."""
        if self.base.tokens == 0:
            return "nothing was compared: no token has a log-prob on both sides"
        if self.equal:
            return f"bit for bit equal on {counted(self.base.tokens, 'token')}: nothing to attribute"
        size = f"mean |Δ| {self.base.mean_abs:.3g} on {counted(self.base.tokens, 'token')}"
        parts = [f"{size}, {self.base.mismatches:,} differ"]
        parts += [f"{finding.name} ({counted(finding.tokens, 'token')}): {finding.what}" for finding in self.broken]
        parts += [
            f"{step.cause.name}: {step.cause.what}{_on(step.ids)}, |Δ| {step.before.mean_abs:.3g} → "
            f"{step.after.mean_abs:.3g}"
            for step in self.steps
        ]
        if self.nearest is not None:
            name, before, after = self.nearest.cause.name, self.nearest.before.mean_abs, self.nearest.after.mean_abs
            parts.append(
                f"nearest, though it leaves too much to be the whole cause: {name}, |Δ| {before:.3g} → {after:.3g}"
            )
        return "; ".join([*parts, self._rest_line()])

    def _rest_line(self) -> str:
        rest = self.rest
        if rest.mismatches == 0:
            return "nothing is left"
        named = [f"{finding.name}: {finding.what}" for finding in self.findings]
        count = f"{counted(rest.mismatches, 'token')} differ{'s' if rest.mismatches == 1 else ''}"
        line = f"left: mean |Δ| {rest.mean_abs:.3g}, {count}"
        if self.rounding is not None:
            line += f" ({rounding_line(rest, self.rounding)})"
        return "; ".join([line, *named])


def rounding_line(rest: Gap, rounding: Rounding) -> str:
    """What rounding alone gives, in words."""
    parts = []
    if rounding.other_order is not None:
        parts.append(f"another order of summation alone gives {rounding.other_order:.3g}")
    if rest.mean_abs > _TWICE * rounding.alone and rounding.is_last_place(rest):
        parts.append(f"the last place of a float32 log-prob is {rounding.last_place:.3g}")
    if rounding.engine_error is not None and rounding.own_error is not None:
        errors = f"the dump has {rounding.engine_error:.3g}, {rounding.dtype} scoring {rounding.own_error:.3g}"
        parts.append(f"to float32 scoring of the same weights {errors}")
    few = rounding.spares(rest)
    if few:
        parts.append(f"and touches {rounding.other_mismatches:,} tokens, not {rest.mismatches:,}")
    explained = within_rounding(rest, rounding)
    told = "rounding explains it" if explained else "not rounding" if few else "more than rounding"
    if rounding.lean:
        side = "higher" if rounding.lean > 0 else "lower"
        but = f" but for {counted(rounding.beyond, 'token')}" if rounding.beyond else ""
        told = f"not rounding, which has no side: the dump's are {side} by {abs(rounding.lean):.3g} on average{but}"
    if rounding.explains_others:
        told = f"rounding explains all but {counted(rounding.beyond, 'token')}"
    if explained and rounding.dtype != "float32":
        told += ", and a fault that is no larger would not show"
    if explained and rounding.in_doubt(rest):
        told += (
            f", by its size: it touches {rounding.other_mismatches:,} tokens, and a fault as small would look so too"
        )
    return "; ".join([*parts, told if explained else f"{told}: unexplained"])


def within_rounding(rest: Gap, rounding: Rounding) -> bool:
    """Whether two implementations of the same arithmetic may be this far apart, and in as many tokens."""
    if rounding.outside or rounding.beyond or rounding.lean:
        return False
    return _within(rest, rounding)


def _within(rest: Gap, rounding: Rounding) -> bool:
    if rounding.spares(rest):
        return False
    if rounding.engine_error is not None and rounding.own_error is not None and not rounding.on_grid:
        # each is held against float32 by itself: a dump that rounds as we do is no further from it than we are
        return rounding.at_least(rounding.engine_error, rounding.engine_spread) <= 1.5 * rounding.alone
    least = rounding.at_least(rest.mean_abs, rest.spread)
    return least <= _TWICE * rounding.alone or rounding.is_last_place(rest)


def _on(ids: tuple[str, ...] | None) -> str:
    if ids is None:
        return ""
    shown = ", ".join(ids[:5]) + (", …" if len(ids) > 5 else "")
    return f" (in {len(ids)} sequences: {shown})" if len(ids) > 1 else f" (in sequence {shown})"
