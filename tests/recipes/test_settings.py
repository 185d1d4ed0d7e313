"""The YAML files against the dataclasses they mirror, and how a command line is answered."""

from __future__ import annotations

import json
import logging
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from rlalign.cli import launch
from rlalign.config import Config, ModelConfig, TaskConfig, config_from_dict, config_to_dict
from rlalign.modeling import make_inner_attention, make_tiny_model
from rlalign.run import resumed_config
from rlalign.tasks import make_task
from rlalign.tasks.sort import make_sort_tokenizer

ROOT = Path(__file__).resolve().parents[2]
CONF, RECIPES = ROOT / "conf", ROOT / "recipes"
REWARDS = ROOT / "tests" / "support" / "rewards.py"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
# decided by the controller: samples are algorithm.group_size, seeds follow from run.seed
NOT_SETTINGS = {"n", "seed", "raw_logprobs"}


def composed(recipe: str, *overrides: str) -> dict:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose(recipe, list(overrides)), resolve=True, throw_on_missing=True)


def test_yaml_and_dataclass_agree_on_every_default():
    assert config_from_dict(composed("grpo")) == Config()


def test_yaml_names_every_field_and_no_other():
    wanted = config_to_dict(Config())
    wanted["sampling"] = {name: value for name, value in wanted["sampling"].items() if name not in NOT_SETTINGS}
    assert _keys(composed("grpo")) == _keys(wanted)


def test_ppo_differs_from_grpo_in_its_algorithm_only():
    grpo, ppo = composed("grpo"), composed("ppo")
    assert {name for name in grpo if grpo[name] != ppo[name]} == {"algorithm"}
    assert config_from_dict(ppo).algorithm.adv_estimator == "gae"


def test_sft_is_a_part_of_it():
    assert _keys(composed("sft")) <= _keys(composed("grpo"))
    config_from_dict(composed("sft"))


@pytest.mark.parametrize("recipe", ["grpo", "ppo"])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_change_something_and_are_valid(recipe, name):
    given = {"gsm8k": ("model.path=a", "task.path=b"), "one_gpu": ("task.path=b",)}.get(name, ())
    experiment = composed(recipe, f"experiment={name}", *given)
    config_from_dict(experiment)
    assert experiment != composed(recipe, *given)


def test_an_experiment_gives_way_to_the_command_line():
    assert composed("grpo", "experiment=smoke", "run.steps=7")["run"]["steps"] == 7
    assert composed("grpo", "experiment=smoke")["run"]["steps"] == 2


def test_every_group_file_says_what_it_is():
    for path in CONF.rglob("*.yaml"):
        assert path.read_text(encoding="utf-8").startswith("#"), f"{path} has no comment at its top"


@pytest.mark.parametrize("recipe", ["grpo", "ppo", "sft"])
@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "attention").glob("*.yaml")))
def test_an_inner_attention_is_chosen_by_name_and_recorded(recipe, name):
    config = config_from_dict(composed(recipe, f"attention={name}"))
    assert config.attention == yaml.safe_load((CONF / "attention" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert config_from_dict(config_to_dict(config)) == config
    make_inner_attention(config.attention)
    assert config_from_dict(composed(recipe)).attention is None


def test_an_option_of_an_inner_attention_is_a_setting():
    config = config_from_dict(composed("grpo", "attention=flex", "+attention.kernel_options.BLOCK_M=64"))
    assert make_inner_attention(config.attention).kernel_options == {"BLOCK_M": 64}


def test_unknown_keys_are_errors():
    with pytest.raises(ConfigCompositionException):
        composed("grpo", "engine.no_such_field=1")
    with pytest.raises(ValueError, match=r"engine\.no_such_field"):
        config_from_dict(composed("grpo", "+engine.no_such_field=1"))


def test_the_resolved_page_is_a_page():
    assert len(yaml.safe_dump(composed("grpo")).splitlines()) < 130


def test_a_resumed_run_keeps_its_settings_but_for_those_given(tmp_path):
    config = config_from_dict(composed("grpo", "trainer.lr=0.5", "run.seed=3"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config_to_dict(config)))
    resumed = resumed_config(tmp_path, [f"run.resume={tmp_path}", "run.steps=9", "trainer.eps=1e-4"])
    assert (resumed.trainer.lr, resumed.run.seed, resumed.run.steps, resumed.trainer.eps) == (0.5, 3, 9, 1e-4)
    assert resumed.run.dir == resumed.run.resume == tmp_path


@pytest.mark.parametrize(
    ("override", "message"),
    [("task=gsm8k", "single fields"), ("nothing.at_all=1", "single fields"), ("run.dir=x", "own folder"),
     ("run.no_such=1", "no_such")],
)  # fmt: skip
def test_what_a_resumed_run_refuses(tmp_path, override, message):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config_to_dict(Config())))
    with pytest.raises(ValueError, match=message):
        resumed_config(tmp_path, [override])


@pytest.fixture
def recipe(monkeypatch, capfd):
    """Runs a recipe's command line in this process: (exit code, stdout, stderr)."""

    def run(name: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # so that it is put back afterwards
        monkeypatch.setattr(sys, "argv", [str(RECIPES / f"{name}.py"), *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(sys.argv[0], run_name="__main__")
        return (ended.value.code, *capfd.readouterr())

    return run


@pytest.mark.parametrize("name", ["grpo", "ppo", "sft"])
def test_help_explains_itself(recipe, name):
    code, out, _ = recipe(name, "--help")
    assert code == 0
    assert f"python recipes/{name}.py [setting=value ...]" in out
    mentioned = re.findall(r"^  ([a-z_.]+)=", out, re.MULTILINE)
    assert len(mentioned) >= 4
    settings = composed(name)
    for setting in mentioned:
        group = setting.split(".")[0]
        assert group in settings or group == "experiment", f"--help names {setting}, which is no setting"


def test_cfg_job_prints_the_settings(recipe):
    code, out, _ = recipe("grpo", "--cfg", "job", "run.steps=17")
    assert code == 0 and yaml.safe_load(out) == composed("grpo", "run.steps=17")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["engine.no_such=1"], "engine.no_such: no such setting"),
        (["+engine.no_such=1"], "engine.no_such: no such setting"),
        (["engine.pagesize=8"], "engine.pagesize: no such setting; did you mean engine.page_size?"),
        (["lr=0.1"], "lr: no such setting; did you mean trainer.lr?"),
        (["modle=checkpoint"], "modle: no such setting; did you mean model?"),
        (["sampling.temperature=-1"], "sampling.temperature"),
        (["sampling.temperature=1e-6"], "use 0 (greedy) or at least 1e-05"),
        (["sampling.top_k=9223372036854775808"], "sampling.top_k"),
        (["algorithm.group_size=1"], "group_size=1"),
        (["algorithm.minibatches=257"], "minibatches=257"),
        (["+sampling.n=4"], "algorithm.group_size"),
        (["task=gsm8k"], "error: task.path is required with task=gsm8k"),
        (["task=gsm8k", "task.path=no.jsonl", "model.path=x"], "model.path=x"),
        (["task=gsm8k", "task.path=no.jsonl"], "no.jsonl"),
        (["task=gsm8k", f"task.path={REWARDS}"], "task=gsm8k needs model.path, or model.vocab_size"),
        (["model.vocab_size=300"], "model.vocab_size=300 means nothing to task=sort"),
        (["experiment=one_gpu"], "task.path is required with task=gsm8k"),
        (["model=checkpoint"], "error: model.path is required with model=checkpoint"),
        (["experiment=gsm8k"], "model.path is required with model=checkpoint; task.path is required with task=gsm8k"),
        (["engine.max_model_len=1024"], "engine.max_model_len=1024: the model has 512 positions"),
        ([f"task.reward={REWARDS}:no_such"], "has no function 'no_such'; needed is def no_such(*, data_source: str"),
        ([f"task.reward={REWARDS.with_name('runs.py')}:summary"], "can't be called"),
        (["run.resume=no/such/run"], "no/such/run"),
        (["run.steps=abc"], "run.steps"),
        (["attention=sdpa"], "numerics=invariant"),
        (["attention=varlen", "numerics=native", "cluster.device=cpu"], "attention=varlen"),
        (["attention=flex", "numerics=native", "+attention.kernel_options.BLOCK=1"], "'BLOCK' is unknown"),
        (["+attention.fast=true"], "_target_"),
        (["align.fault.kind=position", "align.fault.step=61"], "align.fault.step=61"),
        (["align.fault.kind=kv_page", "sampling.max_tokens=1"], "align.fault.kind=kv_page"),
        pytest.param(
            ["cluster.device=cuda"],
            "cluster.device=cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, so it is no error"),
        ),
    ],
)
def test_bad_settings_are_one_line_and_exit_2(recipe, arguments, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = recipe("grpo", *arguments)
    assert code == 2
    assert named in err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err
    assert not list(tmp_path.iterdir()), "a run that can't start leaves no folder behind"


@pytest.mark.parametrize("name", ["grpo", "sft"])
def test_a_limit_beyond_a_checkpoints_positions_is_named_before_anything_starts(name, recipe, tmp_path, monkeypatch):
    made, cwd = tmp_path / "model", tmp_path / "cwd"
    make_tiny_model(ModelConfig(max_position_embeddings=64), make_sort_tokenizer(max_value=9), made, seed=0)
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    code, _, err = recipe(name, f"model.path={made}", "++engine.max_model_len=65")
    assert code == 2 and "engine.max_model_len=65: the model has 64 positions" in err
    assert not list(cwd.iterdir())


def test_a_setting_that_only_this_recipe_lacks_keeps_hydras_hint(recipe):
    code, _, err = recipe("sft", "cluster.num_rollout_actors=2")
    assert code == 2 and "+cluster.num_rollout_actors=2" in err and "no such setting" not in err


def test_a_reward_is_looked_at_before_a_supervised_run_has_a_folder(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = recipe("sft", f"task.reward={REWARDS}:no_such")
    assert code == 2 and "has no function 'no_such'" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["grpo", "sft"])  # ppo.yaml is grpo.yaml but for the algorithm
def test_hydra_does_not_silence_our_warnings(name, recipe, tmp_path, monkeypatch):
    """Instead of the recipe's own part, once hydra has set up what it sets up, a prompt that is too long is read."""
    file = tmp_path / "train.jsonl"
    rows = [{"prompt": f"sort {'7 ' * n}->", "reward_model": {"ground_truth": n}} for n in (2, 3, 30)]
    file.write_text("\n".join(map(json.dumps, rows)))
    task = TaskConfig(name="gsm8k", path=file, max_prompt_tokens=8)

    def only_the_task(job):
        make_task(task, make_sort_tokenizer(max_value=9), seed=0)
        sys.exit(0)

    monkeypatch.setattr(launch, "finish", only_the_task)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # without pytest's own, as in a process of its own
    code, _, err = recipe(name)
    assert code == 0 and f"{file}: left out 1 of 3 prompts" in err


def _keys(values: dict, prefix: str = "") -> set[str]:
    found = set()
    for name, value in values.items():
        found |= _keys(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name}
    return found
