from __future__ import annotations

from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlalign.config import TaskConfig
from rlalign.tasks import make_task
from rlalign.tasks.sort import SortTask, best_constant_reward, make_sort_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_sort_tokenizer(max_value=9)


def task(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **more: Any) -> SortTask:
    return SortTask(TaskConfig(**{"num_train": 200, "num_eval": 50} | more), tokenizer, seed=seed)


def test_tokenizer_survives_a_checkpoint_folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "sort 7 3 9 1 -> 1 3 7 9"
    ids = again(text)["input_ids"]
    assert ids == tokenizer(text)["input_ids"]
    assert again.decode(ids) == text
    assert (again.pad_token_id, again.eos_token_id, again.unk_token_id) == (0, 1, 2)
    assert max(again.get_vocab().values()) < len(again) == 3 + 2 + 10
    assert again.unk_token_id not in ids
    assert again.decode([*ids, again.eos_token_id], skip_special_tokens=True) == text


def test_prompts_are_deterministic_distinct_and_disjoint(tokenizer: PreTrainedTokenizerFast) -> None:
    first, second, other = task(tokenizer), task(tokenizer), task(tokenizer, seed=1)
    texts = {split: [p.text for p in first.prompts(split)] for split in ("train", "eval")}
    assert texts["train"] == [p.text for p in second.prompts("train")]
    assert texts["train"] != [p.text for p in other.prompts("train")]
    assert len(set(texts["train"])) == 200
    assert not set(texts["train"]) & set(texts["eval"])
    # the split is a property of the problem: no seed trains on what another one holds out
    assert not {p.text for p in other.prompts("train")} & set(texts["eval"])
    ids = [p.prompt_id for split in ("train", "eval") for p in first.prompts(split)]
    assert len(set(ids)) == 250


def test_a_prompt_longer_than_the_limit_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(task(tokenizer, max_prompt_tokens=7).prompts("train")) == 200
    with pytest.raises(ValueError, match=r"task\.max_prompt_tokens=6, but a prompt .*num_items=5 numbers has 7 tokens"):
        task(tokenizer, max_prompt_tokens=6)


def test_reward_wants_exactly_the_sorted_numbers(tokenizer: PreTrainedTokenizerFast) -> None:
    made = task(tokenizer)
    for prompt in made.prompts("train")[:20]:
        assert made.reward(prompt, made.solution(prompt)) == 1.0
        assert made.reward(prompt, made.solution(prompt) + " 1") == 0.0
        assert made.reward(prompt, made.solution(prompt)[:-2]) == 0.0
        values = sorted(map(int, prompt.text.split()[1:-1]))
        assert list(map(int, made.solution(prompt).split())) == values


def test_no_constant_answer_scores(tokenizer: PreTrainedTokenizerFast) -> None:
    truths = Counter(prompt.ground_truth for prompt in task(tokenizer, num_train=4096).prompts("train"))
    assert max(truths.values()) / 4096 < 0.01


@pytest.mark.parametrize(("num_items", "max_value"), [(2, 1), (3, 1), (4, 2), (5, 3), (3, 5)])
def test_best_constant_answer_by_counting_all_problems(num_items: int, max_value: int) -> None:
    counts = Counter(tuple(sorted(values)) for values in product(range(max_value + 1), repeat=num_items))
    assert best_constant_reward(num_items, max_value) == pytest.approx(max(counts.values()) / counts.total())


@pytest.mark.parametrize(("values", "message"), [
    ({"num_items": 2, "max_value": 1}, "constant answer"),
    ({"num_items": 2, "max_value": 9}, "task.num_train=200 is more than the different problems"),
    ({"path": Path("x.jsonl")}, "task.path"),
])  # fmt: skip
def test_unusable_settings(tokenizer: PreTrainedTokenizerFast, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(tokenizer, **values)


def test_make_task_takes_the_builtin_by_default(tokenizer: PreTrainedTokenizerFast) -> None:
    made = make_task(TaskConfig(), tokenizer, seed=0)
    assert len(made.prompts("train")) == 4096
    assert len(made.prompts("eval")) == 128


def test_demonstrations_show_four_habits_equally_often_and_one_is_rewarded(tokenizer: PreTrainedTokenizerFast) -> None:
    made = task(tokenizer, num_train=2000)
    prompts = made.prompts("train")
    shown = [made.demonstration(prompt) for prompt in prompts]
    assert shown == [made.demonstration(prompt) for prompt in prompts]
    for prompt, text in zip(prompts, shown, strict=True):
        assert sorted(text.split()) == sorted(prompt.ground_truth.split())
    rewarded = sum(made.reward(prompt, text) for prompt, text in zip(prompts, shown, strict=True)) / len(prompts)
    assert 0.2 < rewarded < 0.3
