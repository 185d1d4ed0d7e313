"""Sequences of a dump through the trainer's forward, a micro-batch at a time."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from rlalign.config import SamplingParams
from rlalign.verifier.dumps import DumpSequence, Format

if TYPE_CHECKING:
    from rlalign.modeling import Policy

_FILTERS = ("temperature", "top_k", "top_p", "min_p")
_OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
_CONVENTIONS = {
    "raw": "raw, at temperature 1 (--processed says otherwise)",
    "temperature": "after temperature, but not renormalised after top-k, top-p and min-p (--raw, --processed)",
    "processed": "after all sampling transforms (--raw says otherwise)",
}


@dataclass(slots=True)
class Distribution:
    """Under which distribution each sequence's log-probs are to be taken: the flags, else the dump, else its format.

    flags: sampling parameters of the command line, which replace the dump's. processed: --processed, --raw, or None.
    assumed: sequences so far for which nobody said, and it matters.
    """

    flags: dict[str, float]
    processed: bool | None
    format: Format
    assumed: int = 0

    @classmethod
    def of(cls, args: argparse.Namespace, format: Format) -> Distribution:
        """From a command line. Raises ValueError for parameters out of bounds."""
        flags = {name: getattr(args, name) for name in _FILTERS if getattr(args, name) is not None}
        SamplingParams(**flags)
        return cls(flags, args.processed, format)

    def sampling(self, sequence: DumpSequence) -> SamplingParams:
        """Parameters whose transforms the log-probs are after; greedy ones mean temperature 1, untruncated."""
        params = replace(sequence.sampling or SamplingParams(), **self.flags)
        processed = sequence.processed if self.processed is None else self.processed
        if processed is None:
            self.assumed += not params.greedy and (params.temperature != 1.0 or params.truncated)
            convention = self.format.convention
        else:
            convention = "processed" if processed else "raw"
        if convention == "raw":
            return SamplingParams()
        return replace(params, **_OFF) if convention == "temperature" else params

    @property
    def note(self) -> str | None:
        """What was assumed; None if nothing was."""
        if not self.assumed:
            return None
        return (
            f"{self.assumed:,} sequences don't say what their log-probs are; as {self.format.name} does by default, "
            f"they were taken as {_CONVENTIONS[self.format.convention]}"
        )


@dataclass(frozen=True, slots=True)
class Scored:
    """A sequence and its log-probs float32 [L] by the trainer's forward; None, and why, where it can't be scored."""

    sequence: DumpSequence
    train: np.ndarray | None
    error: str = ""


def score_dump(
    policy: Policy, sequences: Iterable[DumpSequence], distribution: Distribution, *, micro_batch_tokens: int
) -> Iterator[Scored]:
    """Every sequence, in order, scored; memory holds a micro-batch."""
    group: list[DumpSequence] = []
    tokens = 0
    for sequence in sequences:
        group.append(sequence)
        tokens += sequence.num_tokens
        if tokens >= micro_batch_tokens:
            yield from _group(policy, group, distribution, micro_batch_tokens)
            group, tokens = [], 0
    yield from _group(policy, group, distribution, micro_batch_tokens)


def _group(
    policy: Policy, group: list[DumpSequence], distribution: Distribution, micro_batch_tokens: int
) -> Iterator[Scored]:
    samplings = [distribution.sampling(sequence) for sequence in group]
    try:
        scores = score_plain(policy, group, samplings, micro_batch_tokens=micro_batch_tokens)
    except ValueError:
        # one that doesn't fit the model: find it, and compare the others
        for sequence, sampling in zip(group, samplings, strict=True):
            try:
                scores = score_plain(policy, [sequence], [sampling], micro_batch_tokens=micro_batch_tokens)
                yield Scored(sequence, scores[0])
            except ValueError as error:
                yield Scored(sequence, None, str(error))
        return
    yield from map(Scored, group, scores)


def score_plain(
    policy: Policy, sequences: list[DumpSequence], samplings: list[SamplingParams], *, micro_batch_tokens: int
) -> list[np.ndarray]:
    """Log-probs float32 [L] per sequence, from token ids and sampling parameters alone, by the trainer's forward.

    Raises ValueError naming the sequence for what the model can't take: ids outside its vocabulary, too many tokens, no
    prompt.
    """
    import torch

    from rlalign.trainer.packing import TokenPair, pack
    from rlalign.trainer.step import score

    pairs = [
        TokenPair(sequence.prompt_token_ids, sequence.token_ids, sampling, sequence.source)
        for sequence, sampling in zip(sequences, samplings, strict=True)
        if len(sequence.token_ids)
    ]
    found = [np.zeros(0, np.float32) for _ in pairs]
    with torch.no_grad():
        for batch in pack(
            pairs,
            micro_batch_tokens=micro_batch_tokens,
            vocab_size=policy.vocab_size,
            max_positions=policy.max_positions,
            device=policy.device,
        ):
            batch.scatter(score(policy, batch).logprob, found)
    scores = iter(found)
    return [next(scores) if len(sequence.token_ids) else np.zeros(0, np.float32) for sequence in sequences]
