"""Numbers that can be no log-probs: by their signs, what they may be instead."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlalign.verifier.dumps.record import DumpSequence

# of the finite ones: log-probs that are 0 by rounding, or above it by a little, are in honest dumps too
_FEW, _MOST = 0.01, 0.5


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
