"""Whole runs through Ray: what may not change the result, what must be noticed, and what is left behind."""

from __future__ import annotations

import json

import grpo
import numpy as np
import ppo
import pytest
import sft
import yaml
from support.actors import kill
from support.runs import summary, tiny_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlalign.actors import Controller
from rlalign.cli.verify import main as verify_main
from rlalign.config import config_from_dict
from rlalign.dashboards.jsonl import read_metrics
from rlalign.dashboards.run_report import read_run
from rlalign.modeling import load_policy
from rlalign.run import resumed_config
from rlalign.verifier.decide import MismatchHalt

pytestmark = pytest.mark.usefixtures("shared_ray")


def test_a_run_agrees_bit_for_bit_and_says_so(plain_run):
    found = summary(plain_run)
    assert found["status"] == "finished" and found["steps"] == 3
    assert found["mismatch_count"] == 0 and found["logp_abs_diff_max"] == 0.0
    assert len(found["final_weights_sha256"]) == 64 and found["critic_sha256"] is None
    assert found["seed"] == 0 and found["versions"]["torch"] and found["plan_fingerprint"]
    assert {"rollout", "reward", "train", "verify", "update", "sync"} <= set(found["seconds"])
    assert found["reward_first"] is not None and found["reward_last"] is not None
    rows = [row for row in read_metrics(plain_run / "metrics.jsonl") if "align/mismatch_count" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["align/bitwise_match_frac"] == 1.0 and row["align/weights_equal"] == 1.0 for row in rows)
    assert [row["align/weights_version"] for row in rows] == [0, 1, 2]
    assert all(row["align/policy_age/max"] == 0 and row["align/adv_skew"] == 0 for row in rows)
    assert all(row["align/ratio_frac_modified"] == 0 for row in rows)
    # without this, equal weights at the end of two runs would prove nothing
    assert all(row["grad_norm"] > 0 and row["lr"] > 0 and row["weights_changed_frac"] > 0 for row in rows)
    initial, last = (load_policy(plain_run / "checkpoints" / name).weights_hash() for name in ("initial", "last"))
    assert initial != last
    # every logit and every layer's output too, where that was due: in the first step
    assert "align/full_vocab/kl/mean" not in rows[1] and "align/bisect/sites_differ" not in rows[1]
    assert rows[0]["align/full_vocab/hash_match_frac"] == 1.0 and rows[0]["align/full_vocab/kl/max"] == 0.0
    assert rows[0]["align/full_vocab/tokens"] > 2 and rows[0]["align/bisect/sites_differ"] == 0
    # counted per step: 4 prompts of 7 tokens, prefilled once each for their 4 samples
    assert all(row["perf/engine/prefill_tokens"] == 28 for row in rows)
    assert all(row["perf/engine/tokens_per_forward"] > 4 for row in rows)


def test_every_step_leaves_its_pictures(plain_run):
    run = read_run(plain_run)
    assert list(run.snapshots) == [1, 2, 3]
    for one in run.snapshots.values():
        assert (one.histogram.zero, one.worst) == (one.num_tokens, ())
        assert one.positions.max_abs.max() == 0
        assert (one.layers is None) == (one is not run.snapshots[1])
        assert np.array_equal(one.trace.rollout, one.trace.train) and len(one.trace.tokens) > 1


def test_the_folder_holds_what_is_needed_to_look_at_it_again(plain_run):
    config = config_from_dict(yaml.safe_load((plain_run / "config.yaml").read_text()))
    assert config.run.dir == plain_run
    lines = (plain_run / "samples" / "step_00002.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert len(samples) == 16 and len({(s["prompt_id"], s["sample"]) for s in samples}) == 16
    assert all(s["completion"] is not None and s["seed"] > 0 for s in samples)
    assert list((plain_run / "wandb").glob("offline-run-*/*.wandb"))
    assert list((plain_run / "wandb").glob("offline-run-*/files/media/images/where/layer_heat_map_*.png"))
    for name in ("initial", "last", "best"):
        AutoModelForCausalLM.from_pretrained(plain_run / "checkpoints" / name)
        AutoTokenizer.from_pretrained(plain_run / "checkpoints" / name)


def test_engine_settings_and_actors_do_not_reach_the_weights(plain_run, tmp_path):
    engine = {"page_size": 4, "num_pages": 40, "max_batch_tokens": 24, "max_num_seqs": 5, "prefill_chunk": 3,
              "prefix_cache": False}  # fmt: skip
    grpo.train(tiny_run(tmp_path, engine=engine, cluster={"num_rollout_actors": 2}))
    assert summary(tmp_path)["final_weights_sha256"] == summary(plain_run)["final_weights_sha256"]
    for step in (1, 2, 3):
        name = f"samples/step_0000{step}.jsonl"
        assert (tmp_path / name).read_text() == (plain_run / name).read_text()


def test_another_seed_gives_other_weights(plain_run, tmp_path):
    grpo.train(tiny_run(tmp_path, run={"seed": 1, "steps": 1}))
    first = (tmp_path / "samples" / "step_00001.jsonl").read_text()
    assert first != (plain_run / "samples" / "step_00001.jsonl").read_text()


def test_a_resumed_run_ends_with_the_same_weights_and_numbers(plain_run, tmp_path):
    grpo.train(tiny_run(tmp_path, run={"steps": 2}))
    grpo.train(resumed_config(tmp_path, ["run.steps=3"]))
    whole, parts = summary(plain_run), summary(tmp_path)
    for name in ("final_weights_sha256", "steps", "tokens", "mismatch_count", "reward_first", "reward_last"):
        assert parts[name] == whole[name], name
    rows = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl") if "reward/mean" in row]
    assert rows == [1, 2, 3]


def test_a_reward_that_draws_random_numbers_goes_on_with_the_next_ones(tmp_path):
    noise = "random.random() + np.random.random() + float(torch.rand(()))"
    (tmp_path / "noisy.py").write_text(f"import random, torch, numpy as np\ndef reward(**_): return {noise}\n")
    task = {"reward": f"{tmp_path}/noisy.py:reward"}
    grpo.train(tiny_run(tmp_path / "whole", task=task, run={"steps": 2}))
    grpo.train(tiny_run(tmp_path / "parts", task=task, run={"steps": 1}))
    grpo.train(resumed_config(tmp_path / "parts", ["run.steps=2"]))
    whole, parts = summary(tmp_path / "whole"), summary(tmp_path / "parts")
    for name in ("final_weights_sha256", "reward_first", "reward_last", "eval_last"):
        assert parts[name] == whole[name], name
    assert whole["reward_first"] != whole["reward_last"]


def test_a_rollout_actor_that_dies_is_replaced_and_reaches_nothing(plain_run, tmp_path, monkeypatch):
    generate = Controller.generate

    def kill_then_generate(self, *args, **kwargs):
        if kwargs["step"] == 2:
            kill(self._rollouts[0])
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(Controller, "generate", kill_then_generate)
    grpo.train(tiny_run(tmp_path))
    assert summary(tmp_path)["rollout_restarts"] == 1
    assert summary(tmp_path)["final_weights_sha256"] == summary(plain_run)["final_weights_sha256"]


def test_native_operators_differ_and_the_run_goes_on(tmp_path):
    grpo.train(tiny_run(tmp_path, numerics={"numerics": "native"}, align={"full_vocab_every": 1, "bisect_every": 2}))
    found = summary(tmp_path)
    assert found["status"] == "finished" and found["mismatch_count"] > 0
    assert 0 < found["logp_abs_diff_max"] < 1e-3
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "ratio/max" in row]
    # the loss measures from the trainer's own log-probs: what differs is the rollout's, and shows under align/
    assert len(rows) == 3 and all(row["ratio/min"] == row["ratio/max"] == 1.0 for row in rows)
    assert any(row["align/ratio_raw/max"] > 1.0 for row in rows)
    assert all(0 < row["align/full_vocab/kl/mean"] < 1e-6 for row in rows)
    assert all(row["align/full_vocab/hash_match_frac"] < 1 for row in rows)
    layers = {step: one.layers for step, one in read_run(tmp_path).snapshots.items() if one.layers is not None}
    assert list(layers) == [1, 2] and layers[1].names[-2:] == ("model.layers.0", "model.norm")
    assert all(row.difference[0] == 0 and row.difference[-1] >= 1 for row in layers.values())


def test_a_correction_changes_no_bit_of_a_run_that_agrees(plain_run, tmp_path):
    grpo.train(tiny_run(tmp_path, align={"on_mismatch": "correct", "reject_beyond": 1.0001, "veto_below": 0.9}))
    assert summary(tmp_path)["final_weights_sha256"] == summary(plain_run)["final_weights_sha256"]
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "correction/is/mean" in row]
    assert len(rows) == 3 and all(row["correction/is/mean"] == row["correction/is/max"] == 1.0 for row in rows)
    assert all(row[f"correction/rs/{name}_frac"] == 0.0 for row in rows for name in ("token", "sequence", "veto"))


def test_a_correction_of_a_run_that_differs(tmp_path):
    algorithm = {"adv_estimator": "gae", "epochs": 2, "minibatches": 2}
    align = {"on_mismatch": "correct", "correction_cap": 1.0, "reject_beyond": 1.0000001, "veto_below": 0.9999999}
    ppo.train(tiny_run(tmp_path, numerics={"numerics": "native"}, algorithm=algorithm, align=align, run={"steps": 2}))
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "correction/is/mean" in row]
    # rounding goes both ways: with a cap of 1, about half of what differs is cut
    assert len(rows) == 2 and any(0 < row["correction/is/truncated_frac"] < 1 for row in rows)
    for row in rows:
        assert 1 - 1e-3 < row["correction/is/mean"] <= row["correction/is/max"] == 1.0
        assert 0 < row["correction/rs/token_frac"] <= row["correction/rs/sequence_frac"] <= 1
        assert row["correction/is/truncated_frac"] <= row["align/ratio_frac_modified"] < 1


@pytest.mark.parametrize(("kind", "replayed"), [
    ("trainer_weight", "the trainer's weights were not those that the engines were given"),
    ("kv_page", "the fault was the rollout's"),
    ("position", "the fault was the trainer's"),
])  # fmt: skip
def test_a_planted_fault_stops_the_run_and_names_the_token(kind, replayed, tmp_path, capsys):
    config = tiny_run(tmp_path, align={"fault": {"kind": kind, "step": 2}, "full_vocab_every": 2, "bisect_every": 2})
    with pytest.raises(MismatchHalt, match=r"worst: step 2 prompt \d+ sample \d position \d, token \d+") as halted:
        grpo.train(config)
    worst = json.loads((tmp_path / "mismatch.json").read_text())["worst_tokens"][0]
    assert worst["key"].startswith("2/") and worst["rollout"] != worst["train"]
    assert halted.value.report.worst[0].position == worst["position"]
    # the other two faults are over when a few sequences are computed once more
    named = "; outputs differ first at model.norm (norm), on" in str(halted.value)
    assert named == (kind == "trainer_weight") == ("logits over the whole vocabulary differ" in str(halted.value))
    found = summary(tmp_path)
    assert found["status"] == "halted" and found["steps"] == 1 and found["mismatch_count"] > 0
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if "align/mismatch_count" in row]
    assert [row["align/mismatch_count"] > 0 for row in rows] == [False, True]
    capsys.readouterr()
    # computed once more without the fault, from what the run kept, both sides agree: this names the side that was wrong
    assert verify_main(["replay", str(tmp_path / "mismatches" / "step_00002")]) == 0
    assert replayed in capsys.readouterr().out


def test_ppo_updates_several_times_per_batch_and_still_agrees(tmp_path, monkeypatch):
    steps, merged = [], ppo.merge_updates
    monkeypatch.setattr(ppo, "merge_updates", lambda updates: merged(steps.append(updates) or updates))
    algorithm = {"adv_estimator": "gae", "group_size": 2, "epochs": 2, "minibatches": 2, "kl_coef": 0.05}
    ppo.train(tiny_run(tmp_path / "whole", algorithm=algorithm))
    found = summary(tmp_path / "whole")
    assert found["mismatch_count"] == 0 and len(found["critic_sha256"]) == 64
    rows = [row for row in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "critic/loss" in row]
    assert [row["align/weights_version"] for row in rows] == [0, 4, 8]
    for row, updates in zip(rows, steps, strict=True):
        for name in ("loss", "critic/loss"):
            assert row[name] == pytest.approx(sum(update[name].value for update in updates) / 4)
    ppo.train(tiny_run(tmp_path / "parts", algorithm=algorithm, run={"steps": 2}))
    ppo.train(resumed_config(tmp_path / "parts", ["run.steps=3"]))
    for name in ("final_weights_sha256", "critic_sha256"):
        assert summary(tmp_path / "parts")[name] == found[name]


def test_truncated_sampling_with_several_updates_agrees(tmp_path):
    sampling = {"temperature": 0.8, "top_k": 6, "top_p": 0.9, "min_p": 0.02}
    algorithm = {"epochs": 2, "minibatches": 2, "kl_coef": 0.1}
    grpo.train(tiny_run(tmp_path, sampling=sampling, algorithm=algorithm, model={"dtype": "bfloat16"}))
    assert summary(tmp_path)["mismatch_count"] == 0


def test_sft_alone(tmp_path):
    sft.train(tiny_run(tmp_path, run={"steps": 4}))
    found = summary(tmp_path)
    assert found["steps"] == 4 and 0 <= found["eval_last"] <= 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoints" / "last")


def test_a_folder_that_holds_a_run_is_not_overwritten(plain_run):
    with pytest.raises(ValueError, match=r"run\.resume"):
        grpo.train(tiny_run(plain_run))


def test_users_model_data_and_reward(plain_run, tmp_path):
    rows = [{"prompt": f"sort {'7 ' * n}->", "reward_model": {"ground_truth": n}} for n in (2, 3, 4, 5, 6, 30)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "eval.jsonl").write_text(json.dumps(rows[0]))
    (tmp_path / "reward.py").write_text("def one(*, ground_truth, **_): return int(ground_truth) * 10")
    task = {"name": "gsm8k", "path": str(tmp_path / "train.jsonl"), "eval_path": str(tmp_path / "eval.jsonl"),
            "reward": f"{tmp_path}/reward.py:one", "num_train": None}  # fmt: skip
    grpo.train(
        tiny_run(
            tmp_path / "run",
            model={"path": str(plain_run / "checkpoints" / "initial")},
            task=task,
            engine={"max_model_len": 24},
            eval={"num_prompts": 1},
            algorithm={"prompts_per_step": 6, "group_size": 2},
            run={"steps": 1},
        )
    )
    found = summary(tmp_path / "run")
    assert found["eval_first"] == 20 and found["reward_first"] == 40  # the mean of 20 ... 60: the long one is left out
    (row,) = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "rollout/failed" in row]
    assert row["rollout/failed"] == 1 and row["align/mismatch_count"] == 0


def test_a_rewards_exception_names_the_sample(plain_run, tmp_path):
    (tmp_path / "reward.py").write_text("def broken(**_): raise KeyError('oops')")
    with pytest.raises(ValueError, match=r"step 0, prompt \d+, sample 0.*broken raised KeyError: 'oops'"):
        grpo.train(tiny_run(tmp_path / "run", task={"reward": f"{tmp_path}/reward.py:broken"}))
    assert summary(tmp_path / "run")["status"] == "failed"


def test_a_cache_that_cannot_hold_one_request_is_an_error_at_the_start(tmp_path):
    with pytest.raises(ValueError, match=r"num_pages=2 with page_size=4 hold 8 tokens.* needs num_pages=16"):
        grpo.train(tiny_run(tmp_path, engine={"num_pages": 2, "page_size": 4}))
    assert not list(tmp_path.iterdir()), "not even a model was made"
