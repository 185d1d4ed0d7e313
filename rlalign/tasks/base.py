"""What a task is: prompts of two disjoint splits, and a reward that can be checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, Literal, Protocol

from rlalign.records import Prompt, Sample

Split = Literal["train", "eval"]

RewardFunction = Callable[..., float]
"""``f(*, data_source: str, solution_str: str, ground_truth: str, extra_info: dict) -> float``."""


class RewardError(ValueError):
    """A reward could not be computed; the message names the sample."""


class Task(Protocol):
    """Prompts with a verifiable reward.

    A new task implements these methods and is listed in ``rlalign.tasks``.
    """

    def prompts(self, split: Split) -> list[Prompt]:
        """All prompts of a split, always the same ones in the same order; ids are unique over both splits."""
        ...

    def reward(self, prompt: Prompt, completion_text: str) -> float:
        """Finite reward of one completion. Raises RewardError."""
        ...

    def solution(self, prompt: Prompt) -> str:
        """Text of a completion that earns the full reward."""
        ...

    def demonstration(self, prompt: Prompt) -> str:
        """Text that a supervised warm start imitates; it need not earn the reward."""
        ...


def score_samples(task: Task, samples: Sequence[Sample]) -> list[Sample]:
    """The samples with their rewards, in order. Raises RewardError naming (step, prompt, sample)."""
    return [replace(sample, reward=_score(task, sample)) for sample in samples]


def check_reward(value: Any, source: str) -> float:
    """``value`` as a finite float. Raises RewardError for anything that isn't a number, NaN and inf included."""
    # a bool is a number too: exact-match rewards are naturally written as a comparison
    if not isinstance(value, Real):
        raise RewardError(f"{source} returned {type(value).__name__} {value!r:.80}; a reward is a number")
    if not math.isfinite(value):
        raise RewardError(f"{source} returned {value!r}; a reward is finite")
    return float(value)


def call_reward(function: RewardFunction, source: str, prompt: Prompt, completion_text: str) -> float:
    """Call a user's reward on one completion. Raises RewardError naming the prompt for any exception inside it."""
    where = f"prompt {prompt.prompt_id} {_short(prompt.text)}, completion {_short(completion_text)}"
    try:
        value = function(
            data_source=prompt.data_source,
            solution_str=completion_text,
            ground_truth=prompt.ground_truth,
            extra_info=dict(prompt.extra_info),
        )
    except Exception as error:
        raise RewardError(f"{source} raised {type(error).__name__}: {error} ({where})") from error
    return check_reward(value, f"{source} ({where})")


def _score(task: Task, sample: Sample) -> float:
    name = "step {}, prompt {}, sample {}".format(*sample.key)
    if sample.completion.text is None:
        raise RewardError(f"{name}: the completion has no text to score; the engine needs a tokenizer")
    try:
        return check_reward(task.reward(sample.prompt, sample.completion.text), type(task).__name__)
    except RewardError as error:
        raise RewardError(f"{name}: {error}") from error


def _short(text: str, limit: int = 60) -> str:
    return repr(text if len(text) <= limit else f"{text[: limit - 1]}…")
