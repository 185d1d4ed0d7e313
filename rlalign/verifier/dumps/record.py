"""One sequence of a dump, whatever engine wrote it.

Legend: P prompt tokens, L response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlalign.config import SamplingParams

# a NaN of its own, so that "the engine reported none" and "the engine reported NaN" stay two things
_MISSING_BITS = 0x7FC04D49
MISSING = np.array([_MISSING_BITS], np.uint32).view(np.float32)[0]
"""Stands in ``DumpSequence.logprobs`` for a log-prob that the dump doesn't have; a NaN to everyone else."""


def missing(logprobs: np.ndarray) -> np.ndarray:
    """bool [L]: which log-probs (float32 [L]) the dump doesn't have. A NaN that it does have is not missing."""
    return logprobs.view(np.uint32) == _MISSING_BITS


@dataclass(frozen=True, slots=True)
class DumpSequence:
    """Token ids and the log-probs that were reported for them.

    prompt_token_ids: int64 [P]. token_ids: int64 [L]. logprobs: float32 [L], NaN (``MISSING``) where missing. mask:
    bool [L] of the tokens that the loss sees, None for all. sampling: None where the dump doesn't say. processed:
    whether the log-probs are those after temperature, top-k, top-p and min-p; None where the dump doesn't say.
    unmodelled: what else the request asked for that moves processed log-probs, and that scoring can't apply: (field,
    value in words). source: "file:line". numbered: the dump names no id, ``id`` is the sequence's number from 0.

    Raises ValueError naming ``source`` and the field if a shape or dtype is another one.
    """

    id: str
    prompt_token_ids: np.ndarray
    token_ids: np.ndarray
    logprobs: np.ndarray
    mask: np.ndarray | None = None
    sampling: SamplingParams | None = None
    processed: bool | None = None
    unmodelled: tuple[tuple[str, str], ...] = ()
    weights_version: int | None = None
    finish_reason: str | None = None
    text: str | None = None
    source: str = ""
    numbered: bool = False

    def __post_init__(self) -> None:
        length = len(self.token_ids)
        self._check("prompt_token_ids", self.prompt_token_ids, np.int64, None)
        self._check("token_ids", self.token_ids, np.int64, length)
        self._check("logprobs", self.logprobs, np.float32, length)
        if self.mask is not None:
            self._check("mask", self.mask, np.bool_, length)

    @property
    def num_tokens(self) -> int:
        """P + L."""
        return len(self.prompt_token_ids) + len(self.token_ids)

    @property
    def name(self) -> str:
        """What people are shown: the id, or the place of a sequence that has none of its own. Lines count from 1, and
        numbers from 0: beside each other they would mislead."""
        return self.source if self.numbered and self.source else self.id

    def _check(self, field: str, values: np.ndarray, dtype: type, length: int | None) -> None:
        if values.dtype != dtype or values.ndim != 1:
            what = f"{values.dtype} of shape {values.shape}"
            raise ValueError(f"{self.source}: field '{field}' is {what}, must be {np.dtype(dtype)} of one dimension")
        if length is not None and len(values) != length:
            raise ValueError(f"{self.source}: field '{field}' has {len(values)} values for {length} token ids")
