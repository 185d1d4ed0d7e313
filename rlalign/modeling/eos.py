"""Which ids end a sequence: engine and trainer must know the same ones, since ``min_tokens`` bans them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def eos_ids(tokenizer: Any | None, model: Any | None) -> frozenset[int]:
    """End-of-sequence ids: the tokenizer's, and those of the model's generation config or config."""
    found: set[int] = set()
    for holder in (tokenizer, getattr(model, "generation_config", None), getattr(model, "config", None)):
        found.update(_as_ids(getattr(holder, "eos_token_id", None)))
    return frozenset(found)


def _as_ids(value: int | Iterable[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)
