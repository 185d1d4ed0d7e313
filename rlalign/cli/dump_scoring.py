"""Sequences of a dump through the trainer's forward, a micro-batch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rlalign.config import SamplingParams
from rlalign.verifier.dumps import DumpSequence
from rlalign.verifier.dumps.distribution import Distribution

if TYPE_CHECKING:
    from rlalign.modeling import Policy
    from rlalign.trainer.packing import PackedBatch


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
    from rlalign.cli.rescoring import score_batches

    batches, count = _packed(policy, sequences, samplings, micro_batch_tokens)
    scores = iter(score_batches(policy, batches, count))
    return [next(scores) if len(sequence.token_ids) else np.zeros(0, np.float32) for sequence in sequences]


Failed = dict[str, str]
"""A sequence that the model can't take: ``id``, and why as ``error``."""


def can_take(sequences: Sequence[DumpSequence], *policies: Policy) -> tuple[list[int], list[Failed]]:
    """Places of the sequences that every policy can take; and the others, in the words of ``score_plain``."""
    places, failed = [], []
    for place, sequence in enumerate(sequences):
        try:
            for policy in policies:
                _packed(policy, [sequence], [SamplingParams()], 1)
            places.append(place)
        except ValueError as error:
            failed.append({"id": sequence.id, "error": str(error)})
    return places, failed


def _packed(
    policy: Policy, sequences: list[DumpSequence], samplings: list[SamplingParams], micro_batch_tokens: int
) -> tuple[list[PackedBatch], int]:
    """Micro-batches of the sequences that have a response, and how many those are."""
    from rlalign.trainer.packing import TokenPair, pack

    pairs = [
        TokenPair(sequence.prompt_token_ids, sequence.token_ids, sampling, sequence.source)
        for sequence, sampling in zip(sequences, samplings, strict=True)
        if len(sequence.token_ids)
    ]
    batches = pack(
        pairs,
        micro_batch_tokens=micro_batch_tokens,
        vocab_size=policy.vocab_size,
        max_positions=policy.max_positions,
        device=policy.device,
    )
    return batches, len(pairs)
