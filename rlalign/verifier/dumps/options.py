"""What a reader may be told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """logprobs: the field to take log-probs from, for formats that hold several, None for the rollout's.

    pad_token_id: of padded batches without an attention mask. prompt: read the log-probs of the prompt instead of the
    response's.
    """

    logprobs: str | None = None
    pad_token_id: int | None = None
    prompt: bool = False
