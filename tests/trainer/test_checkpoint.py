"""A resumed run ends with the masters of an uninterrupted one; a checkpoint is whole, or it isn't there."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.samples import make_sample
from support.trainers import GAE, make_trainer, ppo_step
from transformers import AutoModelForCausalLM

from rlalign.algorithms import ppo
from rlalign.trainer import Trainer
from rlalign.trainer.checkpoint import atomic_folder

SETTINGS = {"warmup_steps": 2, "schedule": "cosine", "weight_decay": 0.1, "lr": 1e-2}


def steps(trainer: Trainer, numbers: range) -> None:
    for step in numbers:
        ppo_step(trainer, [make_sample(i, 0, 3, 2 + step, step=step) for i in range(4)], step)


@pytest.fixture
def noisy_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own policy loss, which draws from every global generator."""
    policy_loss = ppo.policy_loss

    def noisy(*args: Any, **settings: Any) -> Any:
        loss, metrics = policy_loss(*args, **settings)
        return loss * (1 + random.random() + np.random.random() + torch.rand(())), metrics

    monkeypatch.setattr(ppo, "policy_loss", noisy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_resumed_equals_uninterrupted(dtype: torch.dtype, tmp_path: Path, noisy_loss: None) -> None:
    whole = make_trainer(algorithm=GAE, dtype=dtype, **SETTINGS)
    steps(whole, range(3))

    first = make_trainer(algorithm=GAE, dtype=dtype, **SETTINGS)
    steps(first, range(1))
    position = {"step": 1, "epoch": [1, 2], "seed": 2**63}
    first.save(tmp_path / "last", data_state=position)
    steps(first, range(1, 2))  # what happens after the save must not matter

    second = make_trainer(algorithm=GAE, dtype=dtype, **SETTINGS)
    assert second.load(tmp_path / "last") == position
    assert second.version == 4
    random.seed(4)  # nor what others draw
    steps(second, range(1, 3))
    assert second.masters_sha256() == whole.masters_sha256()
    assert second.critic_sha256() == whole.critic_sha256()
    assert second.weights()[1:] == whole.weights()[1:]


def test_is_an_ordinary_hugging_face_folder_without_pickles(tmp_path: Path) -> None:
    trainer = make_trainer(dtype=torch.bfloat16)
    trainer.save(tmp_path / "last")
    assert {file.suffix for file in (tmp_path / "last").rglob("*") if file.is_file()} == {".json", ".safetensors"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "last", dtype="auto", attn_implementation="eager")
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.dtype == torch.bfloat16
    for name, weight in model.named_parameters():
        assert torch.equal(weight, trainer.policy.named_weights()[name])


def test_a_failed_save_leaves_the_previous_one(tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.save(tmp_path / "last", data_state={"step": 1})
    with pytest.raises(TypeError):
        trainer.save(tmp_path / "last", data_state={"step": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
    assert trainer.load(tmp_path / "last") == {"step": 1}
    trainer.save(tmp_path / "last", data_state={"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["last"]
    assert trainer.load(tmp_path / "last") == {"step": 2}


def test_a_death_between_the_renames_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer()
    trainer.save(tmp_path / "last", data_state={"step": 1})
    rename = Path.rename

    def dies_on_the_second(self: Path, target: Path) -> Path:
        if target == tmp_path / "last":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", dies_on_the_second)
    with pytest.raises(KeyboardInterrupt):
        trainer.save(tmp_path / "last", data_state={"step": 2})
    monkeypatch.undo()
    assert trainer.load(tmp_path / "last") == {"step": 1}
    trainer.save(tmp_path / "last", data_state={"step": 3})
    assert trainer.load(tmp_path / "last") == {"step": 3}


def test_damage_and_misfits_are_named(tmp_path: Path) -> None:
    trainer = make_trainer()
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        trainer.load(tmp_path / "nowhere")
    path = tmp_path / "last"
    trainer.save(path)
    with pytest.raises(ValueError, match=r"the optimizers \['optimizer'\], this run has \['critic', 'optimizer'\]"):
        make_trainer(algorithm=GAE).load(path)
    with pytest.raises(ValueError, match=r"another model\.dtype"):
        make_trainer(dtype=torch.bfloat16).load(path)
    file = path / "trainer" / "optimizer.safetensors"
    tensors = load_file(file)
    next(tensor for name, tensor in tensors.items() if name.startswith("master/")).view(torch.int32).view(-1)[0] ^= 1
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"optimizer\.safetensors is damaged"):
        trainer.load(path)
    state = json.loads((path / "trainer" / "state.json").read_text())
    (path / "trainer" / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(ValueError, match="format 99 is not supported"):
        trainer.load(path)


def test_a_save_between_accumulate_and_update_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer()
    sample = make_sample(0, 0, 3, 4)
    trainer.accumulate([sample], [sample.completion.logprobs], old_logprobs=[sample.completion.logprobs])
    with pytest.raises(RuntimeError, match="between updates"):
        trainer.save(tmp_path / "last")
    assert list(tmp_path.iterdir()) == []


def test_atomic_folder_vanishes_on_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "a" / "b") as folder:
        (folder / "file").write_text("x")
        raise ZeroDivisionError
    assert list((tmp_path / "a").iterdir()) == []


def test_discarded_gradients_take_their_random_numbers_with_them(noisy_loss: None) -> None:
    plain, stopped = (make_trainer(algorithm=GAE) for _ in range(2))
    samples = [make_sample(i, 0, 3, 4) for i in range(4)]
    zeros = [np.zeros(4, np.float32)] * 4
    stopped.accumulate(samples, zeros, old_logprobs=zeros, values=zeros, returns=zeros)
    stopped.discard()
    for trainer in (plain, stopped):
        ppo_step(trainer, samples)
    assert plain.masters_sha256() == stopped.masters_sha256()
