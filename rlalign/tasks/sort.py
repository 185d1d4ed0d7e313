"""The built-in task: sort a few numbers. ``sort 7 3 9 1 ->`` wants ``1 3 7 9``, all of it, in order.

Small enough for a model of a few hundred thousand parameters, large enough that no constant answer earns anything:
with five digits the best one is right for 0.12% of the problems.
"""

from __future__ import annotations

import hashlib
import math
from random import Random
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlalign.config import TaskConfig
from rlalign.records import Prompt, derive_seed
from rlalign.tasks.base import Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlalign.tasks.plugin import PluggedReward

_SPECIALS = ("<pad>", "<eos>", "<unk>")
_DEFAULT_TRAIN = 4096
_EVAL_SHARE = 8
_MAX_CONSTANT_REWARD = 0.3
_FRUITLESS_DRAWS = 2000


class SortTask:
    """Numbers to sort, drawn by ``seed``; a hash of the problem decides its split, whatever the seed."""

    def __init__(
        self, config: TaskConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int, reward: PluggedReward | None = None
    ) -> None:
        """Raises ValueError if a constant answer would score, or there aren't enough different problems.

        So does a prompt longer than ``max_prompt_tokens``: they are made to measure, and none is left out.
        """
        if config.path is not None or config.eval_path is not None:
            raise ValueError("task.path and task.eval_path mean nothing to task=sort, which makes its own prompts")
        constant = best_constant_reward(config.num_items, config.max_value)
        if constant >= _MAX_CONSTANT_REWARD:
            raise ValueError(
                f"task.num_items={config.num_items} with task.max_value={config.max_value} lets a constant answer earn "
                f"{constant:.2f}; choose larger ones"
            )
        self._tokenizer, self._plugged = tokenizer, reward
        num_train = config.num_train or _DEFAULT_TRAIN
        self._prompts: dict[Split, list[Prompt]] = {
            "train": self._make(config, "train", num_train, seed, first_id=0),
            "eval": self._make(config, "eval", config.num_eval, seed, first_id=num_train),
        }
        longest = max(len(prompt.token_ids) for split in self._prompts.values() for prompt in split)
        if longest > config.max_prompt_tokens:
            raise ValueError(
                f"task.max_prompt_tokens={config.max_prompt_tokens}, but a prompt to sort task.num_items="
                f"{config.num_items} numbers has {longest} tokens: allow more, or sort fewer"
            )

    def prompts(self, split: Split) -> list[Prompt]:
        return self._prompts[split]

    def reward(self, prompt: Prompt, completion_text: str) -> float:
        """1 if the numbers are exactly the sorted ones, else 0; or the plugged-in reward."""
        if self._plugged is not None:
            return self._plugged(prompt, completion_text)
        return float(completion_text.split() == prompt.ground_truth.split())

    def solution(self, prompt: Prompt) -> str:
        return prompt.ground_truth

    def demonstration(self, prompt: Prompt) -> str:
        """The numbers ascending, descending, as given or reversed, as a hash of the prompt decides.

        A model that imitates this can sort, but sorts only a quarter of the time: the reward has to tell it which of
        four habits is wanted, which is what reinforcement learning is for.
        """
        values = [int(word) for word in prompt.text.split()[1:-1]]
        habits = (sorted(values), sorted(values, reverse=True), values, values[::-1])
        return _join(habits[derive_seed(prompt.prompt_id) % len(habits)])

    def _make(self, config: TaskConfig, split: Split, count: int, seed: int, *, first_id: int) -> list[Prompt]:
        problems = _draw(config, split, count, Random(derive_seed(seed, int(split == "eval"))))
        return [self._prompt(first_id + index, values) for index, values in enumerate(problems)]

    def _prompt(self, prompt_id: int, values: tuple[int, ...]) -> Prompt:
        text = f"sort {_join(values)} ->"
        token_ids = np.array(self._tokenizer(text)["input_ids"], np.int64)
        return Prompt(prompt_id, token_ids, text, ground_truth=_join(sorted(values)), data_source="sort")


def make_sort_tokenizer(*, max_value: int) -> PreTrainedTokenizerFast:
    """An ordinary word-level tokenizer for this task: one id per number, saved and loaded like any other."""
    words = (*_SPECIALS, "sort", "->", *map(str, range(max_value + 1)))
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, eos, unk = _SPECIALS
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=pad, eos_token=eos, unk_token=unk)


def best_constant_reward(num_items: int, max_value: int) -> float:
    """Mean reward of the best single answer: the chance of the multiset that is drawn most often."""
    count, rest = divmod(num_items, max_value + 1)
    # most often drawn: values repeated as evenly as possible
    repeats = math.factorial(count + 1) ** rest * math.factorial(count) ** (max_value + 1 - rest)
    return math.factorial(num_items) / repeats / (max_value + 1) ** num_items


def _draw(config: TaskConfig, split: Split, count: int, rng: Random) -> list[tuple[int, ...]]:
    """``count`` different problems of a split, in the order drawn."""
    found: dict[tuple[int, ...], None] = {}
    fruitless = 0
    while len(found) < count:
        values = tuple(rng.randint(0, config.max_value) for _ in range(config.num_items))
        fruitless += 1
        if _split_of(values) == split and values not in found:
            found[values] = None
            fruitless = 0
        if fruitless > _FRUITLESS_DRAWS:
            raise ValueError(
                f"task.num_{split}={count} is more than the different problems that task.num_items={config.num_items} "
                f"and task.max_value={config.max_value} give: found {len(found)}"
            )
    return list(found)


def _split_of(values: tuple[int, ...]) -> Split:
    digest = hashlib.blake2b(_join(values).encode(), digest_size=8).digest()
    return "eval" if int.from_bytes(digest, "little") % _EVAL_SHARE == 0 else "train"


def _join(values: tuple[int, ...] | list[int]) -> str:
    return " ".join(map(str, values))
