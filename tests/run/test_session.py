"""Beginning, stopping and going on, with a trainer that only writes down what it is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.runs import summary, tiny_run

from rlalign.config import Config
from rlalign.run import Run, resumed_config


class FakeTrainer:
    """Keeps the caller's data state, as a checkpoint does."""

    def save(self, path: Path, data_state: dict[str, Any]) -> None:
        (path / "trainer").mkdir(parents=True, exist_ok=True)
        (path / "trainer" / "state.json").write_text(json.dumps(data_state))

    def resume(self, path: Path) -> dict[str, Any]:
        return json.loads((path / "trainer" / "state.json").read_text())

    def discard(self) -> None: ...


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_once(config: Config) -> int:
    """A run whose steps do nothing; returns how many were done before it."""
    trainer = FakeTrainer()
    with Run("grpo", config) as run:
        done = run.restore(trainer)
        run.evaluated(0.5, trainer)
        run.totals.steps, run.totals.reward_first, run.totals.reward_last = config.run.steps, 0.0, 1.0
        run.evaluated(0.75, trainer)
        run.save(trainer)
        run.finish({"policy": "abc", "critic": None})
    return done


def test_a_finished_run_is_refused_and_left_as_it_is(tmp_path):
    run_once(tiny_run(tmp_path))
    before = files(tmp_path)
    with pytest.raises(ValueError, match="has finished 3 steps already"):
        run_once(resumed_config(tmp_path, ["run.seed=7"]))
    assert files(tmp_path) == before


def test_a_run_that_cannot_be_restored_is_left_as_it_is(tmp_path):
    run_once(tiny_run(tmp_path))
    before = files(tmp_path)

    class Broken(FakeTrainer):
        def resume(self, path: Path) -> dict[str, Any]:
            raise ValueError(f"{path} is damaged")

    with pytest.raises(ValueError, match="damaged"), Run("grpo", resumed_config(tmp_path, ["run.steps=9"])) as run:
        run.restore(Broken())
    assert files(tmp_path) == before


def test_a_finished_run_can_be_made_longer(tmp_path):
    run_once(tiny_run(tmp_path))
    assert run_once(resumed_config(tmp_path, ["run.steps=5"])) == 3
    assert summary(tmp_path)["steps"] == 5 and summary(tmp_path)["status"] == "finished"
    assert resumed_config(tmp_path, []).run.steps == 5
