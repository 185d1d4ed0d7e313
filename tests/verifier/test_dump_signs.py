"""What is said of log-probs that are none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from rlalign.verifier.dumps import MISSING, DumpSequence
from rlalign.verifier.dumps.signs import Signs

LOGPROBS = -np.random.default_rng(0).exponential(1.0, 400).astype(np.float32)


def note(logprobs: np.ndarray, mask: np.ndarray | None = None) -> str | None:
    signs = Signs()
    for part in np.array_split(np.arange(len(logprobs)), 4):
        ids = np.zeros(len(part), np.int64)
        signs.add(DumpSequence("a", ids, ids, logprobs[part].astype(np.float32), None if mask is None else mask[part]))
    return signs.note


@pytest.mark.parametrize(("change", "words"), [
    (np.exp, "of 400 finite log-probs of the dump 0 are below 0, and most lie between 0 and 1: probabilities, "),
    (lambda values: np.append(np.exp(values), MISSING), "probabilities, not log-probs?"),
    (np.negative, "of 400 finite log-probs of the dump 0 are below 0: negated log-probs?"),
])  # fmt: skip
def test_probabilities_and_negated_log_probs_are_guessed(
    change: Callable[[np.ndarray], np.ndarray], words: str
) -> None:
    assert words in (note(change(LOGPROBS)) or "")


@pytest.mark.parametrize("values", [
    LOGPROBS, np.zeros(400), np.full(400, MISSING), np.zeros(0), np.where(LOGPROBS < -1, LOGPROBS, 1e-6),
    np.where(LOGPROBS > -0.01, 1e-7, 0),
], ids=["plain", "greedy", "missing", "none", "rounded above 0", "greedy, rounded above 0"])  # fmt: skip
def test_log_probs_are_left_alone(values: np.ndarray) -> None:
    assert note(values) is None


def test_only_tokens_that_count_are_looked_at() -> None:
    values, keep = np.concatenate([LOGPROBS, np.exp(LOGPROBS)]), np.arange(800) >= 400
    assert note(values) is None
    assert note(values, keep) is not None
