from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlalign.config import SamplingParams, TaskConfig
from rlalign.records import Completion, Prompt, Sample
from rlalign.tasks import RewardError, Task, make_task, score_samples
from rlalign.tasks.plugin import load_reward
from rlalign.tasks.sort import make_sort_tokenizer

GOOD = """
def reward(*, data_source, solution_str, ground_truth, extra_info):
    assert data_source == "sort" and extra_info == {}
    return len(solution_str.split()) / len(ground_truth.split())

def fails(**_): raise ZeroDivisionError("by zero")
def text(**_): return "0.5"
def nothing(**_): return None
def nan(**_): return float("nan")
def yes(**_): return True
def numpy_value(**_):
    import numpy
    return numpy.float32(0.5)
def positional(prompt, completion): return 1.0
def one_more(*, weight, **_): return 1.0
constant = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(GOOD)
    return path


def task(file: Path, name: str) -> Task:
    config = TaskConfig(num_train=4, num_eval=2, reward=f"{file}:{name}")
    return make_task(config, make_sort_tokenizer(max_value=9), seed=0)


def sample(prompt: Prompt, text: str | None) -> Sample:
    completion = Completion("r", 5, prompt.token_ids, np.zeros(1, np.int64), np.zeros(1, np.float32), None,
                            np.zeros(1, np.int32), 0, 0, "stop", text=text)  # fmt: skip
    return Sample(step=3, prompt=prompt, completion=completion, sampling=SamplingParams())


def test_a_users_reward_replaces_the_tasks_own(file: Path) -> None:
    made = task(file, "reward")
    prompt = made.prompts("train")[1]
    scored = score_samples(made, [sample(prompt, "9 9"), sample(prompt, "9")])
    assert [s.reward for s in scored] == [0.4, 0.2]


@pytest.mark.parametrize(("name", "value"), [("yes", 1.0), ("numpy_value", 0.5)])
def test_any_number_is_a_reward(file: Path, name: str, value: float) -> None:
    made = task(file, name)
    result = made.reward(made.prompts("train")[0], "x")
    assert (result, type(result)) == (value, float)


@pytest.mark.parametrize(("name", "message"), [
    ("fails", "fails raised ZeroDivisionError: by zero"),
    ("text", "text .* returned str '0.5'"),
    ("nothing", "nothing .* returned NoneType"),
    ("nan", "nan .* returned nan; a reward is finite"),
])  # fmt: skip
def test_a_bad_reward_names_the_sample(file: Path, name: str, message: str) -> None:
    made = task(file, name)
    prompt = made.prompts("train")[1]
    with pytest.raises(RewardError, match=message) as caught:
        score_samples(made, [sample(prompt, "4 5")])
    assert str(caught.value).startswith(f"step 3, prompt {prompt.prompt_id}, sample 5: ")
    assert "'4 5'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_completion_without_text_is_refused(file: Path) -> None:
    made = task(file, "reward")
    with pytest.raises(RewardError, match="no text to score"):
        score_samples(made, [sample(made.prompts("train")[0], None)])


@pytest.mark.parametrize(("spec", "error", "message"), [
    ("{file}", ValueError, "is not of the form FILE.py:function"),
    ("{file}:not a name", ValueError, "is not of the form"),
    ("{file}:absent", ValueError, r"has no function 'absent'; needed is def absent\(\*, data_source: str"),
    ("{file}:positional", ValueError, r"'prompt'; needed is def positional\(.* extra_info: dict\) -> float$"),
    ("{file}:one_more", ValueError, "can't be called: missing a required .*'weight'"),
    ("{file}:constant", ValueError, "has no function 'constant'"),
    ("{file}x.py:reward", FileNotFoundError, "no such file"),
])  # fmt: skip
def test_bad_specs(file: Path, spec: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_reward(spec.format(file=file))


def test_a_file_that_cannot_be_loaded(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import nothing_of_this_name\n")
    with pytest.raises(ValueError, match=r"broken\.py raised ModuleNotFoundError"):
        load_reward(f"{path}:reward")


def test_loading_leaves_sys_modules_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json
    import sys

    path: Any = tmp_path / "json.py"
    path.write_text("def reward(**_): return 1")
    load_reward(f"{path}:reward")
    assert sys.modules["json"] is json
