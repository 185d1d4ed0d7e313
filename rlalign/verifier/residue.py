"""What a difference looks like that no cause removes: in which tokens it is, and what that points to.

Legend: N tokens of all sequences one after another; places count sequences of the dump from 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rlalign.verifier.compare import ulp_distance
from rlalign.verifier.dumps.record import DumpSequence, missing
from rlalign.verifier.dumps.signs import CLEARLY_NEGATIVE

_ONE_SIDED = 0.95
_MIN_TOKENS = 40
# a log-prob above 0 by rounding is not one of these
_POSITIVE = 1e-3
# a penalty: how many tokens on either side, and how many of them the way it moves them
_LEAST_REPEATED, _MOST = 5, 0.85
# sequences: tokens to tell by; times rounding within which they agree, beyond which not; how many must be either
_LEAST_TOKENS, _NEAR, _OFF, _NEARLY_ALL = 4, 3.0, 10.0, 0.8
# tokens of a sequence that make more than single ones
_FEW = 3
# the end of a sequence among others: tokens, how far off in standard errors and times the others' mean |Δ|
_LEAST_RAISED, _RAISED_ERRORS, _RAISED = 8, 8.0, 2.0
# a mean: how far from 0, in standard errors and of the mean |Δ|
_LEAN_ERRORS, _LEAN = 5.0, 0.5
NO_NUMBERS = ("missing", "nan", "-inf", "positive", "scored_nan")
"""Names of findings that no cause and no rounding accounts for."""


@dataclass(frozen=True, slots=True)
class Finding:
    """tokens: how many it is about. where: (place of the sequence, position in the response) of each."""

    name: str
    what: str
    tokens: int
    where: tuple[tuple[int, int], ...]


def broken(sequences: Sequence[DumpSequence], scored: np.ndarray, place: np.ndarray) -> tuple[Finding, ...]:
    """Log-probs that are no numbers, or no log-probabilities. scored: float32 [N]; place: int64 [N]."""
    reported = np.concatenate([*(s.logprobs for s in sequences), np.zeros(0, np.float32)])
    absent = missing(reported)
    kinds = (
        ("missing", "the dump has no log-prob", absent),
        ("nan", "the dump's log-prob is NaN", np.isnan(reported) & ~absent),
        ("-inf", "the dump's log-prob is -inf: a token that could not be sampled", np.isneginf(reported)),
        ("positive", "the dump's log-prob is above 0: no log-probability", reported > _POSITIVE),
        ("scored_nan", "the model's own log-prob is NaN", np.isnan(scored)),
    )
    position = _positions(place)
    masks = np.concatenate([*(_mask(s) for s in sequences), np.zeros(0, np.bool_)])
    return tuple(
        _finding(name, what, found & masks, place, position) for name, what, found in kinds if (found & masks).any()
    )


def at_the_edge(edge: np.ndarray, place: np.ndarray) -> tuple[Finding, ...]:
    """bool [N] of sampled tokens that rounding put outside the support, as a finding if there are any."""
    what = (
        "tokens at the border of top-k, top-p or min-p: whether they, or those beside them, are left out is decided by "
        "rounding; not counted in what is left"
    )
    return (_finding("edge_of_support", what, edge, place, _positions(place)),) if edge.any() else ()


def describe_rest(
    sequences: Sequence[DumpSequence],
    size: np.ndarray,
    scored: np.ndarray,
    place: np.ndarray,
    counts: np.ndarray,
    far: np.ndarray,
    *,
    explained: bool = False,
    others: bool = False,
    typical: float = 0.0,
    grid: str | None = None,
) -> tuple[Finding, ...]:
    """Patterns of what is left. size: |Δ| float64 [N], NaN where a token does not count. scored: float32 [N]. counts,
    far: bool [N], tokens that do, and those that are off by more than rounding where most tokens differ a little.
    explained: by rounding; others: all but those that are far. typical: mean |Δ| that rounding gives. grid: what the
    dump's log-probs all fit into."""
    reported = np.concatenate([*(s.logprobs for s in sequences), np.zeros(0, np.float32)])
    valid = counts & np.isfinite(size)
    differs = valid & (reported.view(np.int32) != scored.view(np.int32))
    if not differs.any() or explained:
        return ()
    position = _positions(place)
    found = [_outside(scored, valid, place, position), _stored(grid, valid, place, position)]
    valid, differs = valid & ~np.isneginf(scored), differs & ~np.isneginf(scored)
    if (penalty := _penalty(sequences, reported, scored, valid, place, position)) is not None:
        return tuple(each for each in (*found, penalty) if each is not None)
    exact = differs.sum() < 0.5 * valid.sum()
    beyond, far = far, differs if exact else differs & far
    for name, what, same in _one_value(reported, scored, valid, differs, place):
        found.append(_finding(name, what, same, place, position))
        valid, differs, beyond = valid & ~same, differs & ~same, beyond & ~same
        # rounding explains the others, in few tokens too
        far = beyond if others and not beyond.any() else far & ~same
    if not differs.any() or (others and not far.any()):
        return tuple(each for each in found if each is not None)
    # of tokens that all differ by more than rounding, the far ones are the ends of one distribution
    if (exact or others) and 0 < far.sum() < 0.5 * valid.sum():
        found += _clusters(far, valid, place, position, reported, scored, size, exact=exact)
    elif not exact:
        found.append(_some_sequences(size, valid, place, position, typical))
        # what is no log-probability has no side
        found += _trends(size, scored, reported, valid & ~(reported > _POSITIVE), place, position)
    return tuple(each for each in found if each is not None)


def _outside(scored: np.ndarray, valid: np.ndarray, place: np.ndarray, position: np.ndarray) -> Finding | None:
    outside = valid & np.isneginf(scored)
    what = "tokens that the sampling parameters leave out under these weights, yet were sampled"
    return _finding("outside_support", what, outside, place, position) if outside.any() else None


def _stored(grid: str | None, valid: np.ndarray, place: np.ndarray, position: np.ndarray) -> Finding | None:
    what = f"every log-prob of the dump fits into {grid}: rounded where it was computed or stored"
    return None if grid is None else _finding("stored", what, valid, place, position)


def _one_value(
    reported: np.ndarray, scored: np.ndarray, valid: np.ndarray, differs: np.ndarray, place: np.ndarray
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Name, words and bool [N] of tokens that all have one log-prob in the dump and others by the model."""
    zero = differs & (reported == 0)
    none = zero & (scored < CLEARLY_NEGATIVE)
    if none.any():
        # where most are a sure model's own, only those that are not
        none = zero if none.sum() >= 0.5 * zero.sum() else none
        end = {"first_token": " (always the first token)", "last_token": " (always the last token)"}
        always = end.get(_always(none, valid, place) or "", "")
        what = f"the dump's log-prob is exactly 0 and the model's is not{always}: padding, or never reported"
        yield "zero", what, none
    lowest = reported[valid].min(initial=0)
    clamped = differs & ~zero & (reported == lowest) & (scored < lowest)
    if clamped.sum() >= _MIN_TOKENS // 4:
        yield (
            "clamped",
            f"the dump's log-prob is its lowest, {lowest:.9g}, and the model's below: clamped there",
            clamped,
        )


def _some_sequences(
    size: np.ndarray, valid: np.ndarray, place: np.ndarray, position: np.ndarray, typical: float
) -> Finding | None:
    """Sequences that are far off, where the others are within rounding."""
    means = {int(p): size[valid & (place == p)] for p in np.unique(place)}
    means = {p: float(values.mean()) for p, values in means.items() if len(values) >= _LEAST_TOKENS}
    near = [p for p, mean in means.items() if mean <= _NEAR * typical]
    off = [p for p, mean in means.items() if mean > _OFF * typical]
    if not near or not off or len(near) + len(off) < _NEARLY_ALL * len(means):
        return None
    what = "whole sequences differ and the others agree to rounding: other prompt, weights or sampling in these"
    return _finding("sequence", what, valid & np.isin(place, off), place, position)


def _penalty(
    sequences: Sequence[DumpSequence],
    reported: np.ndarray,
    scored: np.ndarray,
    valid: np.ndarray,
    place: np.ndarray,
    position: np.ndarray,
) -> Finding | None:
    """Tokens that stood in the prompt or the response before are less likely in the dump, and all others more."""
    repeated = np.concatenate([*(_repeated(s) for s in sequences), np.zeros(0, np.bool_)])
    delta = np.where(valid, reported.astype(np.float64) - scored, np.nan)
    again, first = delta[valid & repeated], delta[valid & ~repeated]
    if len(again) < _LEAST_REPEATED or len(first) < _LEAST_REPEATED:
        return None
    lower, higher = float((again < 0).mean()), float((first > 0).mean())
    if min(lower, higher) < _MOST:
        return None
    what = (
        "tokens that stood before are less likely in the dump, and all others a little more: a repetition, presence or "
        "frequency penalty, which scoring can't apply; sample without, or ask for raw log-probs"
    )
    return _finding("penalty", what, valid & repeated, place, position)


def _repeated(sequence: DumpSequence) -> np.ndarray:
    """bool [L]: tokens that are in the prompt, or earlier in the response."""
    first = np.zeros(len(sequence.token_ids), np.bool_)
    first[np.unique(sequence.token_ids, return_index=True)[1]] = True
    return ~first | np.isin(sequence.token_ids, sequence.prompt_token_ids)


def _clusters(
    far: np.ndarray,
    valid: np.ndarray,
    place: np.ndarray,
    position: np.ndarray,
    reported: np.ndarray,
    scored: np.ndarray,
    size: np.ndarray,
    *,
    exact: bool,
) -> list[Finding]:
    """Tokens that are off, one finding per kind: up to a position, from one on, whole sequences, or here and there.
    size: |Δ| float64 [N]. exact: the others agree bit for bit."""
    names = ("until_position", "from_position", "sequence", "isolated")
    groups: dict[str, np.ndarray] = {name: np.zeros_like(far) for name in names}
    begun = [s for s in np.unique(place[far]) if _begins(far & (place == s), valid & (place == s), position)]
    for sequence in np.unique(place[far]):
        mine = far & (place == sequence)
        # what changes on the way does so for all that run
        if len(begun) > 1 and sequence in begun:
            groups["until_position"] |= mine
            continue
        first = int(position[mine].min())
        after = valid & (place == sequence) & (position >= first)
        whole = mine.sum() >= _FEW and mine.sum() >= 0.5 * after.sum()
        if not exact and not whole and (start := _raised_from(size, valid, place == sequence)) is not None:
            first, whole = int(position[start]), True
            mine = valid & (place == sequence) & (position >= first)
        groups["isolated" if not whole else "sequence" if first <= 1 else "from_position"] |= mine
    if (end := _always(groups["isolated"], valid, place)) is not None:
        groups[end] = groups.pop("isolated")
    says = {
        "until_position": "differs up to a token and agrees "
        + ("" if exact else "to rounding ")
        + "from there on: other weights sampled the first tokens, updated in flight (--previous-model shows it), "
        "sampling changed on the way, or these were changed after they were computed",
        "from_position": ("agrees" if exact else "agrees to rounding")
        + " up to a token and differs from there on: what it attends to changed, such as a wrong "
        "or stale KV block, a prefix-cache hit after a weight update, a preempted request, or another token there than "
        "was sampled (bisect --dump shows the layer)",
        "sequence": "whole sequences differ and the others agree: other prompt, weights or padding in these",
        **{
            name: f"only the {word} token of a response differs, of nearly all: its log-prob is another's, or none"
            for name, word in (("first_token", "first"), ("last_token", "last"))
        },
        "isolated": f"single tokens differ, by up to {_ulp(reported, scored, far)} ULP, and "
        + ("most agree" if exact else "most far less")
        + ": the log-prob was changed after it was computed (conversion, rounding, storage)"
        + ("" if exact else ", or rounding hides at the others what is wrong with them too"),
    }
    return [_finding(name, says[name], mask, place, position) for name, mask in groups.items() if mask.any()]


def _always(single: np.ndarray, valid: np.ndarray, place: np.ndarray) -> str | None:
    """The end of the response that single tokens are at, of nearly all sequences; None if they are elsewhere."""
    counted, first, last = np.flatnonzero(valid), np.zeros_like(valid), np.zeros_like(valid)
    starts = np.flatnonzero(np.diff(place[counted], prepend=-1))
    first[counted[starts]] = last[counted[np.append(starts[1:], len(counted)) - 1]] = True
    if single.sum() < max(_FEW, _NEARLY_ALL * len(starts)):
        return None
    ends = {"first_token": first, "last_token": last}
    return next((name for name, end in ends.items() if not (single & ~end).any()), None)


def _begins(far: np.ndarray, mine: np.ndarray, position: np.ndarray) -> bool:
    """Whether one sequence's far tokens are its beginning, and no more. mine: bool [N], its tokens that count."""
    last = int(position[far].max())
    begin, rest = mine & (position <= last), mine & (position > last)
    return bool(far.sum() >= max(_FEW, _NEARLY_ALL * begin.sum()) and rest.sum() >= _FEW)


def _raised_from(size: np.ndarray, valid: np.ndarray, mine: np.ndarray) -> int | None:
    """Place in [0, N) of the token from which on one sequence is off by far more than all others are; None if none. A
    token counts as the others' largest at most, so that a single one raises nothing."""
    own, others = np.flatnonzero(valid & mine), size[valid & ~mine]
    if len(own) < _LEAST_RAISED or len(others) < _MIN_TOKENS:
        return None
    level, spread = float(others.mean()), float(others.std())
    count = np.arange(len(own), 0, -1)
    means = np.cumsum(np.minimum(size[own], others.max())[::-1])[::-1] / count
    errors = np.where(count < _LEAST_RAISED, -np.inf, (means - level) * count**0.5)
    start = int(errors.argmax())
    raised = errors[start] > _RAISED_ERRORS * spread and means[start] > _RAISED * level
    # to its end, and not by what stands at its beginning
    raised &= bool(np.median(size[own[start:]]) > _RAISED * np.median(others))
    return int(own[start]) if raised else None


def lean(delta: np.ndarray, least: float = 0.0) -> float:
    """The mean of reported less scored log-probs float64 [n], where it is no chance, a large part of |Δ| and above
    ``least``; else 0. Rounding has no side, but for the last place, where two formulas may lean to different ones.

    Tokens are likelier under what sampled them than under any other distribution, by about half the mean square.
    """
    if not len(delta) or (delta != 0).mean() < _LEAN:  # few tokens that differ may be on any side
        return 0.0
    errors = _LEAN_ERRORS * float(delta.std()) / len(delta) ** 0.5
    least = max(least, errors, _LEAN * float(np.abs(delta).mean()), float(np.square(delta).mean()))
    return float(delta.mean()) if abs(delta.mean()) > least else 0.0


def _trends(
    size: np.ndarray,
    scored: np.ndarray,
    reported: np.ndarray,
    valid: np.ndarray,
    place: np.ndarray,
    position: np.ndarray,
) -> list[Finding]:
    """What all tokens have in common."""
    if valid.sum() < _MIN_TOKENS:
        return []
    found: list[Finding] = []
    if (side := _side(reported[valid].astype(np.float64) - scored[valid])) is not None:
        found.append(_finding("one_sided", f"the dump's log-probs are {side}", valid, place, position))
    length = np.array([position[place == p].max() + 1 for p in np.unique(place)])
    relative = position / np.repeat(length, [(place == p).sum() for p in np.unique(place)])
    start, end = (size[valid & part] for part in (relative < 0.25, relative >= 0.75))
    if min(len(start), len(end)) >= _MIN_TOKENS // 4:
        if start.mean() > 3 * end.mean():
            what = (
                "largest at the start of responses, as with another prompt or chat template, or weights that were "
                "updated in flight (--previous-model)"
            )
            found.append(_finding("at_the_start", what, valid & (relative < 0.25), place, position))
        elif end.mean() > 3 * start.mean():
            what = "grows along responses, as with other positions, RoPE scaling, or KV cache (such as its dtype)"
            found.append(_finding("grows", what, valid & (relative >= 0.75), place, position))
    return found


def _side(delta: np.ndarray) -> str | None:
    """What nearly all reported less scored log-probs float64 [n] have in common, or else their mean."""
    above, below = ("higher", float((delta > 0).mean())), ("lower", float((delta < 0).mean()))
    word, share = max(above, below, key=lambda one: one[1])
    nearly_all = share >= _ONE_SIDED
    if not nearly_all and not lean(delta):
        return None
    mean = "higher" if delta.mean() > 0 else "lower"
    if nearly_all and mean != word:
        # what is taken from all others goes to these
        return f"nearly all {word} than scoring gives, and {mean} on average: as with a bias on a few tokens' logits"
    why = {
        "higher": "as when renormalised over a top-k or top-p set, or a lower temperature, that it doesn't name",
        "lower": "as at a higher temperature, or with a penalty, that it doesn't name",
    }
    return f"{'nearly all' if nearly_all else 'on average'} {mean} than scoring gives: {why[mean]}"


def _ulp(reported: np.ndarray, scored: np.ndarray, mask: np.ndarray) -> str:
    finite = mask & np.isfinite(reported) & np.isfinite(scored)
    return f"{int(ulp_distance(reported[finite], scored[finite]).max()):,}" if finite.any() else "inf"


def _finding(name: str, what: str, mask: np.ndarray, place: np.ndarray, position: np.ndarray) -> Finding:
    where = tuple((int(place[i]), int(position[i])) for i in np.flatnonzero(mask))
    return Finding(name, what, int(mask.sum()), where)


def _positions(place: np.ndarray) -> np.ndarray:
    """int64 [N], each token's position in its sequence."""
    starts = np.flatnonzero(np.diff(place, prepend=-1))
    lengths = np.diff(np.append(starts, len(place)))
    return np.arange(len(place)) - np.repeat(starts, lengths)


def _mask(sequence: DumpSequence) -> np.ndarray:
    return np.ones(len(sequence.token_ids), np.bool_) if sequence.mask is None else sequence.mask
