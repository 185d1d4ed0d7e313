"""The supervised recipe: whose settings it follows, and what it refuses to score."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sft
from common import evaluate
from support.runs import summary, tiny_run

from rlalign.actors import process
from rlalign.config import Config
from rlalign.modeling import load_policy


@pytest.fixture(autouse=True)
def threads_as_they_are(monkeypatch):
    monkeypatch.setattr(sft, "set_up", lambda threads: None)


def warm_weights(folder: Path, **sections: Any) -> str:
    sft.warm_start(tiny_run(folder, **sections), folder, say=lambda text: None)
    return load_policy(folder).weights_hash()


def test_it_learns_and_leaves_a_checkpoint(tmp_path):
    sft.train(tiny_run(tmp_path, run={"steps": 2}))
    assert summary(tmp_path)["steps"] == 2
    assert load_policy(tmp_path / "checkpoints" / "last").vocab_size > 0


def test_settings_of_rl_do_not_reach_the_warm_start(tmp_path):
    of_rl = {"lr": 0.5, "warmup_steps": 2, "weight_decay": 0.3, "grad_clip": 1e-4, "schedule": "cosine", "beta1": 0.5}
    plain = warm_weights(tmp_path / "a")
    assert warm_weights(tmp_path / "b", trainer=of_rl) == plain
    assert warm_weights(tmp_path / "c", model={"warm_start_lr": 0.1}) != plain


def test_a_refused_prompt_is_an_error_not_a_wrong_answer(tmp_path):
    with pytest.raises(ValueError, match=r"held-out prompt \d+: the prompt has \d+ tokens"):
        sft.train(tiny_run(tmp_path, engine={"max_model_len": 3}))


def test_the_device_is_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "device_of", lambda config: "meta")
    devices = []
    monkeypatch.setattr(sft, "load_policy", lambda path, **settings: devices.append(settings["device"]))
    sft._fresh_policy(tiny_run(tmp_path), tmp_path)
    assert devices == ["meta"]


def test_more_held_out_prompts_than_there_are_is_an_error(tmp_path):
    class Three:
        def prompts(self, split: str) -> list[str]:
            return ["a", "b", "c"]

    config: Config = tiny_run(tmp_path, eval={"num_prompts": 4}, task={"num_eval": 3})
    with pytest.raises(ValueError, match=r"eval\.num_prompts=4, .* only 3 .*task\.num_eval=3"):
        evaluate(None, Three(), SimpleNamespace(config=config))
    assert sft.held_out(Three(), tiny_run(tmp_path, eval={"num_prompts": 2})) == ["a", "b"]
