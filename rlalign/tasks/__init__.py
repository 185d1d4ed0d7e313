"""Prompts and verifiable rewards. One task per file; ``make_task`` picks by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlalign.config import TaskConfig
from rlalign.tasks.base import RewardError, Split, Task, score_samples
from rlalign.tasks.gsm8k import Gsm8kTask
from rlalign.tasks.plugin import load_reward
from rlalign.tasks.sort import SortTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["RewardError", "Split", "Task", "make_task", "score_samples"]


def make_task(config: TaskConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> Task:
    """The configured task, with the user's own reward if ``task.reward`` names one.

    ``seed`` draws the problems of a task that makes its own; a file's are the same for every seed.

    Raises ValueError or FileNotFoundError for data or a reward that can't be used.
    """
    reward = None if config.reward is None else load_reward(config.reward)
    if config.name == "sort":
        return SortTask(config, tokenizer, seed=seed, reward=reward)
    return Gsm8kTask(config, tokenizer, reward=reward)
