"""GSM8K and data of verl's schema: a worded problem, scored by its final number.

Two kinds of row are told apart by their fields:

- GSM8K's own: ``question``, ``answer`` (worked solution, then ``#### 72``);
- verl's: ``prompt`` (chat messages), ``reward_model.ground_truth``, optional ``data_source`` and ``extra_info``.

A ground truth that is no number (a fraction, a formula) is compared by ``math-verify``, the extra ``math``.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlalign.config import TaskConfig
from rlalign.records import Prompt
from rlalign.tasks.base import Split
from rlalign.tasks.numbers import final_number, parse_number
from rlalign.tasks.rows import Message, Row, messages_of, read_rows, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlalign.tasks.plugin import PluggedReward

INSTRUCTION = 'Reason step by step, then give the answer alone on the last line, written as "#### N".'

_LOG = logging.getLogger(__name__)
_CALCULATOR = re.compile(r"<<[^>]*>>")
_MAX_EVAL_SHARE = 10
_MATH_SECONDS = 5


class Gsm8kTask:
    """Problems from a file, in the file's order."""

    def __init__(
        self, config: TaskConfig, tokenizer: PreTrainedTokenizerBase, *, reward: PluggedReward | None = None
    ) -> None:
        """Raises FileNotFoundError, or ValueError naming file, line and field of a row that can't be used."""
        if config.path is None:
            raise ValueError("task.path must name a JSONL or parquet file for task=gsm8k")
        self._plugged = reward
        train = _prompts_of(config.path, config, tokenizer, first_id=0, numeric=reward is None)
        if config.eval_path is None:
            train, held_out = split_by_hash(train, config.num_eval)
        else:
            held_out = _prompts_of(config.eval_path, config, tokenizer, first_id=len(train), numeric=reward is None)
        self._prompts: dict[Split, list[Prompt]] = {
            "train": train[: config.num_train],
            "eval": held_out[: config.num_eval],
        }

    def prompts(self, split: Split) -> list[Prompt]:
        return self._prompts[split]

    def reward(self, prompt: Prompt, completion_text: str) -> float:
        """1 if the final answer equals the ground truth, else 0; or the plugged-in reward."""
        if self._plugged is not None:
            return self._plugged(prompt, completion_text)
        return float(answers_match(prompt.ground_truth, completion_text))

    def solution(self, prompt: Prompt) -> str:
        """The row's worked solution without its calculator marks; the bare answer if it has none."""
        answer = prompt.extra_info.get("answer")
        return _CALCULATOR.sub("", answer) if isinstance(answer, str) else f"#### {prompt.ground_truth}"

    def demonstration(self, prompt: Prompt) -> str:
        return self.solution(prompt)


def answers_match(ground_truth: str, completion_text: str) -> bool:
    """Whether a completion's final answer equals ``ground_truth``: exact decimals, or math-verify for the rest."""
    expected = parse_number(ground_truth)
    if expected is not None and _is_plain(ground_truth):
        return final_number(completion_text) == expected
    return _math_verify(ground_truth, completion_text)


def split_by_hash(prompts: Sequence[Prompt], num_eval: int) -> tuple[list[Prompt], list[Prompt]]:
    """(train, held out), disjoint also by text. Held out are the smallest hashes, a tenth of the prompts at most.

    Depends on the prompts alone, so that every run on a file holds out the same ones.
    """
    if len(prompts) < 2:
        raise ValueError("one prompt can't be split into train and held-out ones; give task.eval_path")
    ranked = sorted(prompts, key=lambda prompt: hashlib.blake2b(prompt.text.encode()).digest())
    held_out = ranked[: min(num_eval, max(1, len(prompts) // _MAX_EVAL_SHARE))]
    texts = {prompt.text for prompt in held_out}
    train = [prompt for prompt in prompts if prompt.text not in texts]
    if not train:
        raise ValueError("all prompts are the same: none is left to train on; give task.eval_path")
    return train, sorted(held_out, key=lambda prompt: prompt.prompt_id)


def row_messages(row: Row) -> list[Message]:
    """Chat messages of a row of either kind. Raises ValueError naming line and field."""
    if "question" in row.values and "prompt" not in row.values:
        return [{"role": "user", "content": f"{row.text('question')}\n{INSTRUCTION}\n"}]
    return messages_of(row)


def _prompts_of(
    path: Path, config: TaskConfig, tokenizer: PreTrainedTokenizerBase, *, first_id: int, numeric: bool
) -> list[Prompt]:
    rows = read_rows(path)
    prompts = [_prompt(row, first_id + index, tokenizer, numeric=numeric) for index, row in enumerate(rows)]
    fitting = [prompt for prompt in prompts if len(prompt.token_ids) <= config.max_prompt_tokens]
    if not fitting:
        raise ValueError(f"{path}: every prompt is longer than task.max_prompt_tokens={config.max_prompt_tokens}")
    if dropped := len(prompts) - len(fitting):
        _LOG.warning(
            "%s: left out %d of %d prompts, longer than task.max_prompt_tokens=%d",
            path, dropped, len(prompts), config.max_prompt_tokens,
        )  # fmt: skip
    return fitting


def _prompt(row: Row, prompt_id: int, tokenizer: PreTrainedTokenizerBase, *, numeric: bool) -> Prompt:
    text, token_ids = render(row_messages(row), tokenizer)
    extra_info = row.values.get("extra_info") or {}
    if not isinstance(extra_info, dict):
        raise row.error(f"field 'extra_info' must be an object, is {extra_info!r:.60}")
    if "question" in row.values:
        extra_info = {**extra_info, "answer": row.values.get("answer")}
    return Prompt(
        prompt_id=prompt_id,
        token_ids=np.array(token_ids, np.int64),
        text=text,
        ground_truth=_ground_truth(row, numeric=numeric),
        data_source=str(row.values.get("data_source") or ""),
        extra_info=extra_info,
    )


def _ground_truth(row: Row, *, numeric: bool) -> str:
    """The expected answer as text. numeric: it will be scored here, so it must be something that can be."""
    truth = _gsm8k_answer(row) if "question" in row.values and "prompt" not in row.values else _verl_answer(row)
    if numeric and not _is_plain(truth) and importlib.util.find_spec("math_verify") is None:
        raise row.error(f"ground truth {truth!r:.60} is not a number; comparing it needs pip install 'rlalign[math]'")
    return truth


def _gsm8k_answer(row: Row) -> str:
    _, marker, answer = row.text("answer").rpartition("####")
    if not marker or parse_number(answer) is None:
        raise row.error("field 'answer' does not end in '#### ' and a number")
    return answer.strip()


def _verl_answer(row: Row) -> str:
    model: Any = row.values.get("reward_model")
    truth = model.get("ground_truth") if isinstance(model, dict) else None
    if isinstance(truth, int | float) and not isinstance(truth, bool):
        return repr(truth)
    return row.text("reward_model.ground_truth").strip()


def _is_plain(text: str) -> bool:
    r"""True for a number by itself: 72, $1,200, 50%; not for \frac{1}{2}, 3x or 2^10."""
    return parse_number(text) is not None and re.fullmatch(r"[-−\s$€£\d,.%]+", text) is not None


def _math_verify(ground_truth: str, completion_text: str) -> bool:
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ValueError(f"ground truth {ground_truth!r:.60} needs pip install 'rlalign[math]'") from error
    # its timeouts are signals, which only a main thread may set
    timeout = _MATH_SECONDS if threading.current_thread() is threading.main_thread() else None
    expected = parse(f"\\boxed{{{ground_truth}}}", parsing_timeout=timeout)
    return bool(verify(expected, parse(completion_text, parsing_timeout=timeout), timeout_seconds=timeout))
