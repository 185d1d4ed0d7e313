"""Numbers that can be no log-probs: by their signs, and by their being 0, what they may be instead."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlalign.verifier.dumps.record import DumpSequence

# of the finite ones: log-probs that are 0 by rounding, or above it by a little, are in honest dumps too
_FEW, _MOST = 0.01, 0.5
CLEARLY_NEGATIVE = -0.1
"""What a token's own log-prob is below, if a 0 is not its: also where 0 was rounded to one decimal."""


@dataclass(slots=True)
class Signs:
    """Counts of what passes by: finite log-probs of tokens that count."""

    finite: int = 0
    negative: int = 0
    positive: int = 0
    above_one: int = 0

    def add(self, sequence: DumpSequence) -> None:
        values = sequence.logprobs if sequence.mask is None else sequence.logprobs[sequence.mask]
        values = values[np.isfinite(values)]
        self.finite += len(values)
        self.negative += int((values < 0).sum())
        self.positive += int((values > 0).sum())
        self.above_one += int((values > 1).sum())

    @property
    def note(self) -> str | None:
        """A guess at what they are; None where they may be log-probs."""
        if self.positive <= _MOST * self.finite or self.negative > _FEW * self.finite:
            return None
        of = f"{self.finite:,} finite log-probs of the dump"
        if self.above_one <= _FEW * self.finite:
            return f"of {of} {self.negative:,} are below 0, and most lie between 0 and 1: probabilities, not log-probs?"
        return f"of {of} {self.negative:,} are below 0: negated log-probs?"


@dataclass(slots=True)
class Zeros:
    """Log-probs of one side that are exactly 0, and what the other side has there: a sure model's are its own.

    whose, others: the sides in words. tokens: that count. unlike: zeros where the other side's is clearly below 0.
    """

    whose: str = "the dump"
    others: str = "the model's"
    tokens: int = 0
    zeros: int = 0
    unlike: int = 0

    def add(self, reported: np.ndarray, other: np.ndarray, keep: np.ndarray | None) -> None:
        """Log-probs float32 [L] of the same tokens. keep: bool [L], those that count; None for all."""
        self.tokens += len(reported) if keep is None else int(keep.sum())
        zero = reported == 0 if keep is None else (reported == 0) & keep
        if zero.any():
            self.zeros += int(zero.sum())
            self.unlike += int((other[zero] < CLEARLY_NEGATIVE).sum())

    @property
    def note(self) -> str | None:
        """A guess at what they are; None where they may be log-probs, or are few."""
        if self.unlike <= _FEW * self.tokens or self.unlike < _MOST * self.zeros:
            return None
        return (
            f"{self.unlike:,} of {self.tokens:,} log-probs of {self.whose} are exactly 0 where {self.others} are below "
            f"{CLEARLY_NEGATIVE:g}: padding, never reported, or a temperature near 0?"
        )
