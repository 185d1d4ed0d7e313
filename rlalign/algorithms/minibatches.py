"""Splits a batch into shuffled minibatches by hashing: no generator, no state, the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from rlalign.config import AlgorithmConfig
from rlalign.records import derive_seed


def minibatches_of_step(num_samples: int, algorithm: AlgorithmConfig, *, seed: int, step: int) -> Iterator[list[int]]:
    """Indices of each minibatch of one step, epoch after epoch. ``seed``: of the run. ValueError as below."""
    for epoch in range(algorithm.epochs):
        yield from split_minibatches(num_samples, algorithm.minibatches, seed=derive_seed(seed, step, epoch))


def split_minibatches(num_samples: int, num_minibatches: int, *, seed: int) -> list[list[int]]:
    """Indices of each minibatch into the batch ordered by sample key; sizes differ by at most 1.

    The shuffle sorts by ``derive_seed(seed, index)``; give each (run seed, step, epoch) its own seed.
    ``num_minibatches=1`` is the whole batch in order. Raises ValueError when a minibatch would be empty.
    """
    if not 1 <= num_minibatches <= num_samples:
        raise ValueError(f"minibatches={num_minibatches} of {num_samples} samples: need 1 <= minibatches <= samples")
    order = list(range(num_samples))
    if num_minibatches > 1:
        order.sort(key=lambda index: (derive_seed(seed, index), index))
    bounds = [num_samples * part // num_minibatches for part in range(num_minibatches + 1)]
    # Ascending within a minibatch: packing sorts by key anyway, and the eye can check it.
    return [sorted(order[low:high]) for low, high in pairwise(bounds)]
