"""Under which distribution a dump's log-probs are to be taken: decided here, for every command that scores one.

The command line counts, else what the sequence says, else what its format's engine does by default.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rlalign.config import SamplingParams
from rlalign.verifier.dumps import DumpSequence, Format
from rlalign.verifier.score import ScoreSettings, effective_sampling
from rlalign.verifier.words import counted

FLAGS = ("temperature", "top_k", "top_p", "min_p")
_FILTERS = ("top_k", "top_p", "min_p")
_NAMED = 8
_CONVENTIONS = {
    "raw": "raw, at temperature 1 (--processed says otherwise)",
    "temperature": "after temperature, but not renormalised after top-k, top-p and min-p (--raw, --processed)",
    "processed": "after all sampling transforms (--raw says otherwise)",
}


@dataclass(slots=True)
class Distribution:
    """flags: sampling parameters of the command line, which replace the dump's. processed: --processed, --raw, or None.
    assumed: sequences so far for which nobody said, and it matters. unmodelled: sequences so far by (field, value) of
    the request that scoring can't apply, and that their log-probs are after, for all that is said."""

    flags: Mapping[str, Any]
    processed: bool | None
    format: Format
    assumed: int = 0
    unmodelled: Counter[tuple[str, str]] = field(default_factory=Counter)

    @classmethod
    def of(cls, arguments: Mapping[str, Any], format: Format) -> Distribution:
        """From a command line's arguments by name. Raises ValueError for parameters out of bounds."""
        flags = {name: arguments[name] for name in FLAGS if arguments[name] is not None}
        SamplingParams(**flags)
        return cls(flags, arguments["processed"], format)

    def decided(self, sequence: DumpSequence, base: ScoreSettings) -> tuple[DumpSequence, ScoreSettings]:
        """The sequence with nothing left open, and ``base`` with the transforms that its log-probs are not after."""
        params = replace(sequence.sampling or SamplingParams(), **self.flags)
        processed = sequence.processed if self.processed is None else self.processed
        if processed is not False:
            self.unmodelled.update(sequence.unmodelled)
        if processed is None:
            transformed = not params.greedy and (params.temperature != 1.0 or params.truncated)
            self.assumed += transformed or bool(sequence.unmodelled)
            processed = self.format.convention != "raw"
            if self.format.convention == "temperature":
                base = replace(base, ignore=base.ignore | set(_FILTERS))
        return replace(sequence, sampling=params, processed=processed), base

    def sampling(self, sequence: DumpSequence) -> SamplingParams:
        """Parameters whose transforms the log-probs are after; greedy ones mean temperature 1, untruncated."""
        return effective_sampling(*self.decided(sequence, ScoreSettings()))

    @property
    def notes(self) -> list[str]:
        """What was assumed, and what scoring leaves out; empty if nothing."""
        found = []
        if self.assumed:
            silent = "doesn't say what its" if self.assumed == 1 else "don't say what their"
            found.append(
                f"{counted(self.assumed, 'sequence')} {silent} log-probs are; as {self.format.name} does by default, "
                f"they were taken as {_CONVENTIONS[self.format.convention]}"
            )
        if self.unmodelled:
            named = [
                f"{name}={value} in {counted(n, 'sequence')}"
                for (name, value), n in self.unmodelled.most_common(_NAMED)
            ]
            more = [f"{len(self.unmodelled) - _NAMED:,} more"] if len(self.unmodelled) > _NAMED else []
            found.append(
                "scoring applies no penalties, biases and bans, which move log-probs that are not raw: "
                f"{', '.join(named + more)}"
            )
        return found
