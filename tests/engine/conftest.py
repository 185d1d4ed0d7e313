"""A tiny aligned policy, a character tokenizer, and the trainer's way of scoring what an engine drew."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.engines import character_tokenizer, tiny_policy
from transformers import PreTrainedTokenizerFast

from rlalign.modeling import Policy


@pytest.fixture(scope="session")
def policy() -> Policy:
    """A 2-layer Qwen3 with hidden size 64; tests must leave its weights as they are."""
    return tiny_policy("qwen3")


@pytest.fixture
def own_policy() -> Callable[..., Policy]:
    """Makes policies whose weights a test may change."""
    return tiny_policy


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer()
