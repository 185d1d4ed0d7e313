"""Which prompts a step gets: a function of seed and step alone, so that a resumed run goes on where it was."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from rlalign.records import Prompt, derive_seed


def prompts_of_step(prompts: Sequence[Prompt], *, step: int, count: int, seed: int) -> list[Prompt]:
    """``count`` different prompts for ``step`` (from 1), in order of id; each pass over the data is shuffled anew.

    A pass leaves out what doesn't fill a step. Raises ValueError when there are fewer prompts than ``count``.
    """
    if count > len(prompts):
        raise ValueError(f"a step takes {count} prompts, but the task has only {len(prompts)} training prompts")
    epoch, place = divmod(step - 1, len(prompts) // count)
    order = _shuffled(len(prompts), seed, epoch)[place * count : (place + 1) * count]
    return sorted((prompts[index] for index in order), key=lambda prompt: prompt.prompt_id)


@lru_cache(maxsize=2)
def _shuffled(size: int, seed: int, epoch: int) -> tuple[int, ...]:
    # by hashes, not by a generator: nothing to store in a checkpoint, the same on every machine
    return tuple(sorted(range(size), key=lambda index: (derive_seed(seed, epoch, index), index)))
