from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rlalign.config import TaskConfig
from rlalign.tasks import make_task
from rlalign.tasks.base import Task
from rlalign.tasks.gsm8k import INSTRUCTION, answers_match
from rlalign.tasks.sort import make_sort_tokenizer

SHARED = Path(os.environ.get("RLALIGN_SHARED", Path(__file__).parents[2].parent / "shared"))
needs_gsm8k = pytest.mark.skipif(
    not (SHARED / "data/gsm8k/train.jsonl").is_file(), reason="GSM8K not found: set RLALIGN_SHARED to its folder"
)
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}{% if add_generation_prompt %}->{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_sort_tokenizer(max_value=9)


def gsm(question: str = "How many?", answer: str = "It is 70 + 2 = <<70+2=72>>72.\n#### 72") -> dict[str, Any]:
    return {"question": question, "answer": answer}


def verl(truth: Any = "72", **more: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": "sort 1"}, {"role": "user", "content": "sort 2"}]
    return {"prompt": messages, "reward_model": {"style": "rule", "ground_truth": truth}, "data_source": "openai/gsm8k",
            "extra_info": {"index": 3}} | more  # fmt: skip


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(tokenizer: PreTrainedTokenizerFast, path: Path, **more: Any) -> Task:
    return make_task(TaskConfig(name="gsm8k", path=path, **{"eval_path": path} | more), tokenizer, seed=0)


def test_own_rows(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    task = load(tokenizer, write(tmp_path / "a.jsonl", [gsm(), "\n", gsm(answer="#### 1,080")]))
    first, second = task.prompts("train")
    assert first.text == f"How many?\n{INSTRUCTION}\n"
    assert first.token_ids.tolist() == tokenizer(first.text)["input_ids"]
    assert (first.ground_truth, second.ground_truth) == ("72", "1,080")
    assert task.reward(first, "so it is $72.00.") == 1.0
    assert task.reward(first, "so it is 73") == 0.0
    assert task.reward(second, "#### 1080") == 1.0
    assert task.solution(first) == "It is 70 + 2 = 72.\n#### 72"
    assert task.reward(first, task.solution(first)) == 1.0


def test_a_string_with_a_line_separator_stays_one_row(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    row = json.dumps(gsm(question="one\u2028two"), ensure_ascii=False) + "\n"
    assert len(load(tokenizer, write(tmp_path / "a.jsonl", [row])).prompts("train")) == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_verl_rows(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, suffix: str) -> None:
    path, rows = tmp_path / f"a{suffix}", [verl(), verl(truth="-1.5")]
    if suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        write(path, rows)
    task = load(tokenizer, path)
    first, second = task.prompts("train")
    assert first.text == "sort 1\n\nsort 2"
    assert (first.data_source, first.extra_info) == ("openai/gsm8k", {"index": 3})
    assert second.ground_truth == "-1.5"
    assert task.reward(second, r"\boxed{-1.50}") == 1.0


def test_a_number_as_ground_truth_is_accepted(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    assert load(tokenizer, write(tmp_path / "a.jsonl", [verl(truth=72)])).prompts("train")[0].ground_truth == "72"


def test_chat_template_is_applied_once(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.chat_template = TEMPLATE
    task = load(tokenizer, write(tmp_path / "a.jsonl", [verl(), gsm()]))
    first, second = task.prompts("train")
    assert first.text == "[system] sort 1 [user] sort 2 ->"
    assert first.token_ids.tolist() == tokenizer(first.text, add_special_tokens=False)["input_ids"]
    assert second.text.startswith("[user] How many?")
    assert second.text.endswith("->")


@pytest.mark.parametrize(("rows", "message"), [
    ([], "the file is empty"),
    (["\n \n"], "the file is empty"),
    ([gsm(), "{\"question\": \n"], "a.jsonl, line 2: not valid JSON"),
    ([gsm(), "[1, 2]\n"], "a.jsonl, line 2: a row must be an object, is list"),
    ([gsm(), {"question": "x"}], "a.jsonl, line 2: field 'answer' is missing"),
    ([gsm(), {"answer": "#### 1"}], "a.jsonl, line 2: field 'prompt' is missing"),
    ([gsm(question=" ")], "line 1: field 'question' must be non-empty text"),
    ([gsm(answer="no marker 7")], "line 1: field 'answer' does not end in"),
    ([gsm(answer="#### seven")], "line 1: field 'answer' does not end in"),
    ([verl(), {"prompt": "x"}], "line 2: field 'reward_model.ground_truth' is missing"),
    ([verl(truth=None)], "line 1: field 'reward_model.ground_truth' is missing"),
    ([verl(truth=[1])], "line 1: field 'reward_model.ground_truth' must be non-empty text"),
    ([verl(prompt=[{"role": "user"}])], r"line 1: field 'prompt\[0\]' must have text in 'role' and 'content'"),
    ([verl(prompt=[])], "line 1: field 'prompt' has no message"),
    ([verl(extra_info="x")], "line 1: field 'extra_info' must be an object"),
])  # fmt: skip
def test_bad_rows_name_line_and_field(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, rows: list[Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(tokenizer, write(tmp_path / "a.jsonl", rows))
    assert "\n" not in str(caught.value)


def test_bad_files(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        load(tokenizer, tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"unknown suffix '\.csv'"):
        load(tokenizer, write(tmp_path / "a.csv", ["x"]))
    with pytest.raises(ValueError, match=r"task\.path must name"):
        make_task(TaskConfig(name="gsm8k"), tokenizer, seed=0)
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not UTF-8"):
        load(tokenizer, tmp_path / "b.jsonl")
    (tmp_path / "c.parquet").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not a readable parquet"):
        load(tokenizer, tmp_path / "c.parquet")


def test_long_prompts_are_left_out_aloud(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.jsonl", [verl(), verl(prompt="1 " * 50), verl()])
    with caplog.at_level(logging.WARNING):
        assert len(load(tokenizer, path, max_prompt_tokens=20).prompts("train")) == 2
    assert "left out 1 of 3" in caplog.text
    with pytest.raises(ValueError, match=r"longer than task\.max_prompt_tokens=1"):
        load(tokenizer, path, max_prompt_tokens=1)


def test_held_out_without_a_file_of_its_own(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [gsm(question=f"q{i % 90}") for i in range(100)])
    task = load(tokenizer, path, eval_path=None)
    train, held_out = task.prompts("train"), task.prompts("eval")
    assert len(held_out) == 10
    assert not {p.text for p in train} & {p.text for p in held_out}
    assert [p.text for p in held_out] == [p.text for p in load(tokenizer, path, eval_path=None).prompts("eval")]
    with pytest.raises(ValueError, match=r"task\.eval_path"):
        load(tokenizer, write(tmp_path / "b.jsonl", [gsm()]), eval_path=None)


def test_num_train_and_num_eval_are_bounds(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [gsm(question=f"q{i}") for i in range(30)])
    task = load(tokenizer, path, num_train=7, num_eval=3)
    assert (len(task.prompts("train")), len(task.prompts("eval"))) == (7, 3)
    assert len({p.prompt_id for split in ("train", "eval") for p in task.prompts(split)}) == 10


def test_ground_truth_that_is_no_number(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", [verl(truth=r"\frac{1}{2}")])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"line 1: ground truth .* is not a number"):
        load(tokenizer, path)


def test_math_verify_compares_the_rest() -> None:
    pytest.importorskip("math_verify")
    assert answers_match(r"\frac{1}{2}", r"so it is \boxed{0.5}")
    assert not answers_match(r"\frac{1}{2}", r"so it is \boxed{0.25}")


@needs_gsm8k
def test_the_real_files(tokenizer: PreTrainedTokenizerFast) -> None:
    folder = SHARED / "data/gsm8k"
    config = TaskConfig(name="gsm8k", path=folder / "train.jsonl", eval_path=folder / "test.jsonl", num_eval=2000)
    task = make_task(config, tokenizer, seed=0)
    train, held_out = task.prompts("train"), task.prompts("eval")
    assert (len(train), len(held_out)) == (7473, 1319)
    for prompt in train[::50] + held_out[::20]:
        assert task.reward(prompt, task.solution(prompt)) == 1.0
    constant = max(sum(task.reward(p, f"#### {n}") for p in train) for n in (10, 20, 50, 100))
    assert constant / len(train) < 0.3
