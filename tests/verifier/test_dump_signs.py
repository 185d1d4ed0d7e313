"""What is said of log-probs that are none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from rlalign.verifier.dumps import MISSING, DumpSequence
from rlalign.verifier.dumps.signs import Signs, Zeros

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


def zeros(reported: np.ndarray, other: np.ndarray, keep: np.ndarray | None = None) -> str | None:
    found = Zeros()
    for part in np.array_split(np.arange(len(other)), 4):
        found.add(reported[part].astype(np.float32), other[part], None if keep is None else keep[part])
    return found.note


def test_zeros_that_are_not_the_models_are_noted() -> None:
    other = LOGPROBS - np.float32(0.2)
    words = "400 log-probs of the dump are exactly 0 where the model's are below -0.1: padding, never reported, "
    assert f"400 of {words}" in (zeros(np.zeros(400), other) or "")
    assert f"100 of {words}" in (zeros(np.where(np.arange(400) % 4 == 3, 0, other), other) or "")
    assert zeros(np.zeros(400), other, np.zeros(400, np.bool_)) is None


@pytest.mark.parametrize(("reported", "other"), [
    (np.zeros(400), np.full(400, np.float32(-1e-7))),
    (np.round(LOGPROBS / 20, 1), LOGPROBS / 20),
    (np.where(np.arange(400) == 7, 0, LOGPROBS), LOGPROBS - 1),
    (np.zeros(400), np.where(np.arange(400) % 4 == 3, LOGPROBS - 1, np.float32(-1e-7))),
    (np.zeros(0), LOGPROBS[:0]), (np.zeros(400), np.full(400, MISSING)),
], ids=["sure", "one decimal", "one", "most are the model's", "none", "missing"])  # fmt: skip
def test_zeros_of_a_sure_model_are_left_alone(reported: np.ndarray, other: np.ndarray) -> None:
    assert zeros(reported, other) is None
