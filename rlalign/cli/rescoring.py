"""Log-probs by the trainer's forward, of samples or of whatever else was packed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from rlalign.modeling import Policy
from rlalign.records import Sample
from rlalign.trainer.packing import PackedBatch, pack_samples
from rlalign.trainer.step import score


def rescore(policy: Policy, samples: Sequence[Sample], *, micro_batch_tokens: int) -> list[np.ndarray]:
    """Train log-probs float32 [L] per sample, from token ids and sampling parameters alone."""
    batches = pack_samples(
        samples,
        micro_batch_tokens=micro_batch_tokens,
        vocab_size=policy.vocab_size,
        max_positions=policy.max_positions,
        device=policy.device,
    )
    return score_batches(policy, batches, len(samples))


@torch.no_grad()
def score_batches(policy: Policy, batches: Iterable[PackedBatch], count: int) -> list[np.ndarray]:
    """Log-probs float32 [L] of the ``count`` sequences that ``batches`` are made of, in their order."""
    found = [np.zeros(0, np.float32) for _ in range(count)]
    for batch in batches:
        batch.scatter(score(policy, batch).logprob, found)
    return found
