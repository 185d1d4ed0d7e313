"""Two sides of one sequence, cut to what can be compared, and many of them flattened.

Legend: L tokens of a sequence, N tokens of a piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlalign.verifier.compare import ulp_distance
from rlalign.verifier.dumps.record import MISSING, DumpSequence, missing


@dataclass(frozen=True, slots=True)
class Sides:
    """Both log-probs of one sequence. rollout, train: float32 [L], MISSING where there is none.

    keep: bool [L] of the tokens that count, None for all. compared: the first so many have a token on both sides;
    what comes after is missing. sequence: the rollout's record, whose token ids the first ``compared`` are.
    """

    sequence: DumpSequence
    rollout: np.ndarray
    train: np.ndarray
    keep: np.ndarray | None
    compared: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of some sequences, flattened. rollout, train, delta: float32 [N], delta NaN where nonfinite.

    sample, position: int64 [N], index into ``sides`` and place in the response. missing, nonfinite, mismatch: bool [N];
    nonfinite includes missing, mismatch is "32 bits differ or one is missing". ulp: int64 [N], -1 where nonfinite.
    """

    sides: Sequence[Sides]
    rollout: np.ndarray
    train: np.ndarray
    delta: np.ndarray
    sample: np.ndarray
    position: np.ndarray
    missing: np.ndarray
    nonfinite: np.ndarray
    mismatch: np.ndarray
    ulp: np.ndarray
    bounds: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.rollout)


def of_scores(sequence: DumpSequence, train: np.ndarray) -> Sides:
    """A sequence of a dump against log-probs float32 [L] of the same tokens. Raises ValueError for another shape."""
    if train.dtype != np.float32 or train.shape != sequence.logprobs.shape:
        raise ValueError(
            f"{sequence.source}: scored as {train.dtype} of shape {train.shape}, need float32 {sequence.logprobs.shape}"
        )
    return Sides(sequence, sequence.logprobs, train, sequence.mask, len(train))


def of_dumps(rollout: DumpSequence, train: DumpSequence) -> tuple[Sides, str | None]:
    """Two dumps' records of one sequence, and how their tokens differ, None if they don't.

    Tokens are compared as far as prompt and ids agree; what comes after has no counterpart and counts as missing. A
    token counts unless both masks leave it out.
    """
    same, difference = _agreement(rollout, train)
    length = max(len(rollout.token_ids), len(train.token_ids))
    sides = [np.full(length, MISSING, np.float32) for _ in range(2)]
    for side, sequence in zip(sides, (rollout, train), strict=True):
        side[: len(sequence.logprobs)] = sequence.logprobs
    return Sides(rollout, *sides, _either(rollout, train, length), same), difference


def _agreement(a: DumpSequence, b: DumpSequence) -> tuple[int, str | None]:
    """(tokens that both have, what differs in the ids)."""
    if not np.array_equal(a.prompt_token_ids, b.prompt_token_ids):
        lengths = f"{len(a.prompt_token_ids)} and {len(b.prompt_token_ids)} tokens"
        place = _first_difference(a.prompt_token_ids, b.prompt_token_ids)
        return 0, f"different prompts ({lengths}, first difference at {place})"
    shorter = min(len(a.token_ids), len(b.token_ids))
    place = _first_difference(a.token_ids, b.token_ids)
    if place < shorter:
        return place, f"different token ids from position {place} on ({a.token_ids[place]}, {b.token_ids[place]})"
    if len(a.token_ids) != len(b.token_ids):
        return shorter, f"different lengths ({len(a.token_ids)} and {len(b.token_ids)} tokens)"
    return shorter, None


def _first_difference(a: np.ndarray, b: np.ndarray) -> int:
    shorter = min(len(a), len(b))
    differs = a[:shorter] != b[:shorter]
    return int(np.argmax(differs)) if differs.any() else shorter


def _either(a: DumpSequence, b: DumpSequence, length: int) -> np.ndarray | None:
    if a.mask is None and b.mask is None:
        return None
    keep = np.zeros(length, np.bool_)
    for sequence in (a, b):
        own = len(sequence.token_ids)
        keep[:own] |= True if sequence.mask is None else sequence.mask
    return keep


def flatten(sides: Sequence[Sides]) -> Piece:
    """All kept tokens of the sequences, in order."""
    keeps = [np.flatnonzero(side.keep) if side.keep is not None else np.arange(len(side.rollout)) for side in sides]
    lengths = [len(keep) for keep in keeps]
    position = np.concatenate([*keeps, np.zeros(0, np.int64)]).astype(np.int64, copy=False)
    rollout, train = (
        np.concatenate([*(_kept(side, getattr(side, name), keep) for side, keep in zip(sides, keeps, strict=True)),
                        np.zeros(0, np.float32)])
        for name in ("rollout", "train")
    )  # fmt: skip
    compared = np.repeat(np.array([side.compared for side in sides], np.int64), lengths)
    absent = missing(rollout) | missing(train) | (position >= compared)
    nonfinite = absent | ~np.isfinite(rollout) | ~np.isfinite(train)
    delta = np.full(len(rollout), np.nan, np.float32)
    np.subtract(train, rollout, out=delta, where=~nonfinite)
    return Piece(
        sides=sides,
        rollout=rollout,
        train=train,
        delta=delta,
        sample=np.repeat(np.arange(len(sides), dtype=np.int64), lengths),
        position=position,
        missing=absent,
        nonfinite=nonfinite,
        mismatch=absent | (rollout.view(np.int32) != train.view(np.int32)),
        ulp=np.where(nonfinite, -1, ulp_distance(rollout, train)),
        bounds=np.cumsum([0, *lengths]),
    )


def _kept(side: Sides, values: np.ndarray, keep: np.ndarray) -> np.ndarray:
    return values if side.keep is None else values[keep]
