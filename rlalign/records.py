"""What flows through one step, as frozen slotted records. Imports nothing of ours but config.

Legend: P prompt tokens, L response tokens, N samples of a batch. Log-probs are float32 numpy arrays, so that their
32 bits survive every hop; token ids are int64 numpy arrays.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from rlalign.config import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


def derive_seed(*parts: int) -> int:
    """64-bit seed as a hash of integers: seeds never depend on order of arrival, timing or placement.

    Example:
        >>> derive_seed(0, 3, 17) == derive_seed(0, 3, 17)
        True
    """
    text = ",".join(str(int(part)) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem: token ids [P] and what its reward needs."""

    prompt_id: int
    token_ids: np.ndarray
    text: str
    ground_truth: str
    data_source: str = ""
    extra_info: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished sample of one request, as the engine reports it.

    token_ids: int64 [L]. logprobs: float32 [L], under the distribution each token was drawn from (greedy: untruncated,
    temperature 1). raw_logprobs: float32 [L] or None. batch_sizes: int32 [L], sequences in the forward that drew it.
    """

    request_id: str
    sample_index: int
    prompt_ids: np.ndarray
    token_ids: np.ndarray
    logprobs: np.ndarray
    raw_logprobs: np.ndarray | None
    batch_sizes: np.ndarray
    seed: int
    weights_version: int
    finish_reason: FinishReason
    text: str | None = None
    error: str | None = None
    """Why a request failed (finish_reason "error"); None otherwise."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A completion tied to its prompt: the unit that is rewarded, verified and trained on."""

    step: int
    prompt: Prompt
    completion: Completion
    sampling: SamplingParams
    reward: float = float("nan")

    @property
    def key(self) -> tuple[int, int, int]:
        """(step, prompt, sample): the only order in which samples are packed."""
        return (self.step, self.prompt.prompt_id, self.completion.sample_index)

    @property
    def num_tokens(self) -> int:
        return len(self.completion.prompt_ids) + len(self.completion.token_ids)
