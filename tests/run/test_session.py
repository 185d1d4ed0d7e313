"""Beginning, stopping and going on, with a trainer that only writes down what it is given."""

from __future__ import annotations

import contextlib
import gc
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.runs import summary, tiny_run
from support.samples import make_samples

from rlalign.config import Config
from rlalign.dashboards import NullSink, read_metrics
from rlalign.dashboards.run_report import read_run
from rlalign.run import Run, resumed_config
from rlalign.trainer.checkpoint import existing_folder
from rlalign.verifier.bisect import Recording, Site
from rlalign.verifier.decide import MismatchHalt
from rlalign.verifier.metrics import Provenance
from rlalign.verifier.periodic import SiteDigests


class FakeTrainer:
    """Keeps the caller's data state, as a checkpoint does."""

    def save(self, path: Path, data_state: dict[str, Any]) -> None:
        (path / "trainer").mkdir(parents=True, exist_ok=True)
        (path / "trainer" / "state.json").write_text(json.dumps(data_state))

    def resume(self, path: Path) -> dict[str, Any]:
        return json.loads((existing_folder(path) / "trainer" / "state.json").read_text())

    def discard(self) -> None: ...


def make_run(config: Config) -> Run:
    return Run("grpo", config, find_checkpoint=existing_folder)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run_once(config: Config, *, stop_evaluation_after: int | None = None) -> int:
    """A recipe's loop whose steps do nothing; returns how many were done before it."""
    trainer = FakeTrainer()

    def evaluate(run: Run) -> float:
        if run.totals.steps == stop_evaluation_after:
            raise KeyboardInterrupt
        return run.totals.steps / 10

    with make_run(config) as run:
        done = run.restore(trainer)
        with run.saved_on_interrupt(trainer):
            if run.evaluation_due():
                run.evaluated(evaluate(run), trainer)
                if done > 0:
                    run.save(trainer)
            for step in range(done + 1, config.run.steps + 1):
                run.totals.steps, run.totals.reward_first, run.totals.reward_last = step, 0.0, 1.0
                if run.evaluation_due():
                    run.evaluated(evaluate(run), trainer)
                if step == config.run.steps or step % config.run.save_every == 0:
                    run.save(trainer)
        run.finish({"policy": "abc", "critic": None})
    return done


def evaluated_steps(folder: Path) -> list[int]:
    return [row["step"] for row in read_metrics(folder / "metrics.jsonl") if "eval/accuracy" in row]


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

    with pytest.raises(ValueError, match="damaged"), make_run(resumed_config(tmp_path, ["run.steps=9"])) as run:
        run.restore(Broken())
    assert files(tmp_path) == before


@pytest.mark.parametrize("named", ["unknown field 'joules'", "missing field 'tokens'"])
def test_totals_of_another_version_are_refused_by_name(named, tmp_path):
    run_once(tiny_run(tmp_path))
    file = tmp_path / "checkpoints" / "last" / "trainer" / "state.json"
    state = json.loads(file.read_text())
    if "unknown" in named:
        state["totals"]["joules"] = 1.0
    else:
        del state["totals"]["tokens"]
    file.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=rf"another version of rlalign: {named}$"):
        run_once(resumed_config(tmp_path, ["run.steps=5"]))


def test_a_finished_run_can_be_made_longer(tmp_path):
    run_once(tiny_run(tmp_path))
    assert run_once(resumed_config(tmp_path, ["run.steps=5"])) == 3
    assert summary(tmp_path)["steps"] == 5 and summary(tmp_path)["status"] == "finished"
    assert resumed_config(tmp_path, []).run.steps == 5


def test_a_fault_in_a_step_that_is_done_is_refused(tmp_path):
    run_once(tiny_run(tmp_path))
    before = files(tmp_path)
    planted = ["run.steps=5", "align.fault.kind=position"]
    with pytest.raises(ValueError, match=r"align\.fault\.step=3: .* finished 3 steps already"):
        run_once(resumed_config(tmp_path, [*planted, "align.fault.step=3"]))
    assert files(tmp_path) == before
    assert run_once(resumed_config(tmp_path, [*planted, "align.fault.step=4"])) == 3


@pytest.mark.parametrize("step", [0, 2, 4])
def test_an_evaluation_that_was_interrupted_is_made_up_for(step, tmp_path):
    sections = {"run": {"steps": 4, "save_every": 3}, "eval": {"every": 2}}
    with pytest.raises(KeyboardInterrupt):
        run_once(tiny_run(tmp_path, **sections), stop_evaluation_after=step)
    assert summary(tmp_path)["status"] == "interrupted"
    assert run_once(resumed_config(tmp_path, [])) == step
    found = summary(tmp_path)
    assert found["status"] == "finished" and found["steps"] == found["last_eval_step"] == 4
    assert (found["eval_first"], found["eval_last"]) == (0.0, 0.4)
    assert evaluated_steps(tmp_path) == [0, 2, 4]
    with pytest.raises(ValueError, match="has finished 4 steps already"):
        run_once(resumed_config(tmp_path, []))


def test_an_evaluation_is_not_repeated_when_step_1_was_interrupted(tmp_path):
    config, trainer = tiny_run(tmp_path), FakeTrainer()
    with pytest.raises(KeyboardInterrupt), make_run(config) as run:
        run.restore(trainer)
        with run.saved_on_interrupt(trainer):
            run.evaluated(0.0, trainer)
            raise KeyboardInterrupt
    run_once(resumed_config(tmp_path, []))
    assert evaluated_steps(tmp_path) == [0, 3]


def test_a_checkpoint_that_was_being_replaced_is_found(tmp_path):
    run_once(tiny_run(tmp_path))
    last = tmp_path / "checkpoints" / "last"
    last.rename(last.with_name(".last.old"))
    assert run_once(resumed_config(tmp_path, ["run.steps=5"])) == 3


def test_without_a_checkpoint_nothing_goes_on(tmp_path):
    with pytest.raises(OSError, match="broken"), make_run(tiny_run(tmp_path)):
        raise OSError("broken")
    before = files(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"run\.resume={tmp_path}: .*last does not exist.*delete the folder"):
        run_once(resumed_config(tmp_path, []))
    assert files(tmp_path) == before
    with pytest.raises(ValueError, match="delete this one to start over"):
        run_once(tiny_run(tmp_path))


SAMPLES = make_samples([(3, 4), (3, 6)])


def verify(run: Run, *, shift: float = 0.0) -> None:
    logprobs = [sample.completion.logprobs for sample in SAMPLES]
    run.verify(
        SAMPLES,
        [each + np.float32(shift) for each in logprobs],
        advantages=[np.ones_like(each) for each in logprobs],
        provenance=Provenance(),
        decode=str,
    )


def test_tokens_of_an_unfinished_step_are_not_counted(tmp_path):
    trainer = FakeTrainer()
    with pytest.raises(KeyboardInterrupt), make_run(tiny_run(tmp_path)) as run:
        run.restore(trainer)
        with run.saved_on_interrupt(trainer):
            for name in ("rollout", "train"):
                with run.phase(name):
                    pass
            verify(run)
            run.end_step(1, SAMPLES, rollout_stats={})
            verify(run)
            raise KeyboardInterrupt
    assert summary(tmp_path)["tokens"] == 10
    assert trainer.resume(tmp_path / "checkpoints" / "last")["totals"]["tokens"] == 10


def test_a_run_that_learns_nothing_says_so_once(tmp_path, capsys):
    with make_run(tiny_run(tmp_path)) as run:
        run.restore(FakeTrainer())
        for share, lines in ((0.5, 0), (1.0, 1), (1.0, 0)):
            run.note_signal(share)
            assert run.metrics["reward/no_signal_frac"] == share
            assert capsys.readouterr().out.count("nothing to learn from in this step") == lines


def test_the_step_that_halts_a_run_is_counted(tmp_path):
    with pytest.raises(MismatchHalt), make_run(tiny_run(tmp_path)) as run:
        run.restore(FakeTrainer())
        verify(run, shift=0.5)
    found = summary(tmp_path)
    assert (found["status"], found["steps"], found["tokens"], found["mismatch_count"]) == ("halted", 0, 10, 10)


def test_a_mismatch_that_lasts_is_one_alert(tmp_path):
    class Watching(NullSink):
        def alert(self, alert):
            alerts.append((alert.kind, alert.level, alert.text))

    alerts = []
    with make_run(tiny_run(tmp_path, align={"on_mismatch": "log"})) as run:
        run.restore(FakeTrainer())
        run.sink = Watching()
        for step in (1, 2, 3):
            for name in ("rollout", "train"):
                with run.phase(name):
                    pass
            verify(run, shift=0.5 if step > 1 else 0.0)
            run.end_step(step, SAMPLES, rollout_stats={})
    kinds = [kind for kind, _, _ in alerts]
    assert kinds == ["mismatch", "mult_prob_error"]
    assert alerts[0][1] == "ERROR" and alerts[0][2].startswith("step 2: 10 tokens. rollout and trainer differ on 10 of")


def test_a_run_leaves_no_file_open(tmp_path):
    gc.collect()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        run_once(tiny_run(tmp_path))
        gc.collect()
    assert [str(one.message) for one in caught if str(tmp_path) in str(one.message)] == []


class Side:
    """Gives the same numbers whatever it is asked."""

    def __init__(self, shift: float = 0.0) -> None:
        self.asked: list[str] = []
        self.logits = np.arange(4, dtype=np.float32) + np.float32([shift, 0, 0, 0])
        self.sites = (Site(0, 0, "model.layers.0", "residual sum"),)

    def logit_digests(self, excerpts):
        self.asked.append("logit_digests")
        return np.full(sum(len(e.response_ids) for e in excerpts), int(self.logits[0] * 1000))

    def logits_at(self, excerpts, places):
        self.asked.append("logits_at")
        return np.stack([self.logits] * len(places))

    def site_digests(self, excerpts):
        rows = sum(len(e.prompt_ids) + len(e.response_ids) - 1 for e in excerpts)
        return SiteDigests(self.sites, np.full((1, rows), int(self.logits[0] * 1000)))

    def site_values(self, excerpts, orders, rows):
        return [Recording(self.sites[order], np.stack([self.logits] * len(rows))) for order in orders]


@pytest.mark.parametrize("shift", [0.0, 0.25])
def test_a_difference_beyond_the_sampled_tokens_stops_a_run_too(shift, tmp_path):
    config = tiny_run(tmp_path, align={"full_vocab_every": 2, "bisect_every": 2})
    rollout, train, told = Side(), Side(shift), []

    def sides(wanted, excerpts):
        told.append((wanted, len(excerpts)))
        return rollout, train

    expected = pytest.raises(MismatchHalt, match=r"logits over the whole .*; outputs differ first at layer 0, mod")
    with expected if shift else contextlib.nullcontext(), make_run(config) as run:
        run.restore(FakeTrainer())
        for step in (1, 2):
            for name in ("rollout", "train"):
                with run.phase(name):
                    pass
            run.totals.steps = step  # the next one is 2, then 3: the second is not due
            run.check(SAMPLES, sides)
            verify(run)
            run.end_step(step + 1, SAMPLES, rollout_stats={})
    [(wanted, num_excerpts)] = told  # before either is asked, so that both may begin
    assert wanted == ["logit_digests", "site_digests"] and num_excerpts > 0
    assert rollout.asked == (["logit_digests", "logits_at"] if shift else ["logit_digests"])
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "align/full_vocab/tokens" in row]
    assert len(rows) == 1 and (rows[0]["align/full_vocab/kl/mean"] > 0) == (shift > 0)
    (snapshot,) = [one for one in read_run(tmp_path).snapshots.values() if one.layers is not None]
    # float32 values from 0 up to 0.25
    assert snapshot.layers.difference == ((1048576000.0,) if shift else (0.0,))


def test_dump_keeps_the_first_steps_that_differ(tmp_path, capsys):
    config = tiny_run(tmp_path, align={"on_mismatch": "dump", "max_dumps": 2})
    with make_run(config) as run:
        run.restore(FakeTrainer())
        for step in (1, 2, 3):
            for name in ("rollout", "train"):
                with run.phase(name):
                    pass
            verify(run, shift=0.5)
            run.end_step(step, SAMPLES, rollout_stats={})
    assert sorted(path.name for path in (tmp_path / "mismatches").iterdir()) == ["step_00001", "step_00002"]
    assert capsys.readouterr().out.count("replay it with: rlalign-verify replay") == 2
    assert json.loads((tmp_path / "mismatches" / "step_00001" / "replay.json").read_text())["weights"] is None
