"""The worst tokens of a stream: missing log-probs first, then those that are not finite, then by |Δ| and ULP.

Ties are broken by the sequence's id and the position, so that the list does not depend on the order of arrival.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rlalign.verifier.stream.pieces import Piece

Kind = Literal["missing", "nonfinite", "differs"]
_CONTEXT = 6


@dataclass(frozen=True, slots=True)
class TokenDifference:
    """One token on which two sides disagree. delta: train - rollout, NaN unless kind is "differs"; ulp: -1 likewise.

    before, after: ids of the tokens around it. sequence_length: prompt and response. source: "file:line". name: the
    sequence's, for people.
    """

    kind: Kind
    id: str
    position: int
    token_id: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    rollout: float
    train: float
    delta: float
    ulp: int
    sequence_length: int
    weights_version: int | None
    finish_reason: str | None
    source: str
    name: str

    def record(self) -> dict[str, Any]:
        """As a flat dict of JSON's own types."""
        values = {name: getattr(self, name) for name in TokenDifference.__slots__}
        return values | {"before": list(self.before), "after": list(self.after)}


class WorstTokens:
    """Keeps the worst K. Tokens without a counterpart in the other dump are left to whoever names the sequence."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._kept: list[tuple[tuple[Any, ...], TokenDifference]] = []

    def add(self, piece: Piece) -> None:
        """Look at all tokens of a piece."""
        compared = np.array([side.compared for side in piece.sides], np.int64)[piece.sample]
        bad = np.flatnonzero((piece.mismatch | piece.nonfinite) & (piece.position < compared))
        if len(bad) == 0 or self._keep == 0:
            return
        size = np.where(piece.nonfinite[bad], math.inf, np.abs(piece.delta[bad].astype(np.float64)))
        if len(bad) > self._keep:
            enough = size >= np.partition(size, -self._keep)[-self._keep]
            bad, size = bad[enough], size[enough]
        order = np.lexsort((_by_name(piece, bad), -piece.ulp[bad], -size, ~piece.missing[bad]))[: self._keep]
        chosen = [(_key(token), token) for token in (_token(piece, int(i)) for i in bad[order])]
        self._kept = heapq.nsmallest(self._keep, [*self._kept, *chosen], key=lambda item: item[0])

    def read(self) -> tuple[TokenDifference, ...]:
        """Worst first."""
        return tuple(token for _, token in self._kept)


def _by_name(piece: Piece, tokens: np.ndarray) -> np.ndarray:
    """Rank int64 of tokens by their sequence's id, then by position."""
    names = np.argsort(np.argsort(np.array([side.sequence.id for side in piece.sides]), kind="stable"), kind="stable")
    return np.argsort(np.lexsort((piece.position[tokens], names[piece.sample[tokens]])))


def _key(token: TokenDifference) -> tuple[Any, ...]:
    size = abs(token.delta) if token.kind == "differs" else math.inf
    return (token.kind != "missing", -size, -token.ulp, token.id, token.position)


def _token(piece: Piece, i: int) -> TokenDifference:
    sequence, position = piece.sides[int(piece.sample[i])].sequence, int(piece.position[i])
    ids = sequence.token_ids
    before = np.concatenate([sequence.prompt_token_ids[-_CONTEXT:], ids[max(0, position - _CONTEXT) : position]])
    return TokenDifference(
        kind="missing" if piece.missing[i] else "nonfinite" if piece.nonfinite[i] else "differs",
        id=sequence.id,
        position=position,
        token_id=int(ids[position]),
        before=tuple(before[-_CONTEXT:].tolist()),
        after=tuple(ids[position + 1 : position + 1 + _CONTEXT].tolist()),
        rollout=float(piece.rollout[i]),
        train=float(piece.train[i]),
        delta=float(piece.delta[i]),
        ulp=int(piece.ulp[i]),
        sequence_length=sequence.num_tokens,
        weights_version=sequence.weights_version,
        finish_reason=sequence.finish_reason,
        source=sequence.source,
        name=sequence.name,
    )
