"""What one file says of the other's side, and what a file says of an engine that isn't used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlalign.verifier.preflight import Finding, check, not_stated, read_sides, with_requests

SERVER = {"model": "m", "dtype": "bfloat16", "seed": 0, "enforce_eager": True, "logprobs_mode": "processed_logprobs"}
TRL = {"model_name_or_path": "m", "bf16": True, "use_vllm": True}
OURS = {"numerics": "native", "sampling": {"temperature": 0.7}}
SAMPLING = {"temperature", "top_p", "top_k", "min_p", "penalties", "logit_edits", "sampling_defaults"}


def sides(tmp_path: Path, rollout: dict[str, Any], train: dict[str, Any]) -> tuple[Any, Any]:
    for name, values in (("rollout", rollout), ("train", train)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    ours = read_sides(tmp_path / "rollout.yaml", format="vllm")["rollout"]
    theirs = read_sides(tmp_path / "train.yaml")
    return with_requests(ours, theirs["rollout"]), theirs["train"]


def verl(rollout: dict[str, Any], model: dict[str, Any] | None = None) -> dict[str, Any]:
    changed = {"override_config": model} if model else {}
    return {"actor_rollout_ref": {"rollout": {"seed": 0, **rollout}, "model": {"path": "m", **changed}}}


def of(names: set[str], findings: list[Finding]) -> dict[str, Finding]:
    return {one.setting: one for one in findings if one.setting in names}


def test_a_server_samples_as_its_clients_requests_say(tmp_path: Path) -> None:
    """A temperature that TRL sends is its trainer's too; a penalty that it sends is not."""
    train = TRL | {"temperature": 0.7, "repetition_penalty": 1.1}
    found = of(SAMPLING, check(*sides(tmp_path, SERVER, train)))
    assert {name: (one.severity, one.rollout, one.train) for name, one in found.items()} == {
        "penalties": ("wrong", "repetition_penalty=1.1", "not stated")
    }


@pytest.mark.parametrize("train", [TRL, verl({})], ids=["trl", "verl"])
@pytest.mark.parametrize(("sent", "expected"), [
    ({"temperature": 0.7}, {}),
    ({"top_p": 0.9}, {"top_p": "wrong"}),
    ({"top_k": 20, "min_p": 0.1}, {"top_k": "wrong", "min_p": "wrong"}),
    ({"presence_penalty": 0.5, "temperature": 0.7}, {"penalties": "wrong"}),
])  # fmt: skip
def test_each_parameter_is_the_clients(
    tmp_path: Path, train: dict[str, Any], sent: dict[str, float], expected: dict[str, str]
) -> None:
    train = TRL | sent if train is TRL else verl(sent)
    found = of(SAMPLING, check(*sides(tmp_path, SERVER, train)))
    assert {name: one.severity for name, one in found.items()} == expected


def test_raw_log_probs_of_a_server_are_not_at_its_clients_temperature(tmp_path: Path) -> None:
    raw = {name: value for name, value in SERVER.items() if name != "logprobs_mode"}
    found = of(SAMPLING, check(*sides(tmp_path, raw, TRL | {"temperature": 0.7, "repetition_penalty": 1.1})))
    assert found["temperature"].remedy == "logprobs_mode: processed_logprobs, or temperature 1"
    assert (found["penalties"].severity, found.keys()) == ("note", {"temperature", "penalties"})
    assert "raw log-probs are from before them" in found["penalties"].why


@pytest.mark.parametrize("requests", [{"temperature": 1.0}, {"sampling_params": {"top_p": 1.0}}])
def test_an_engines_file_that_names_sampling_describes_its_requests(tmp_path: Path, requests: dict[str, Any]) -> None:
    found = of(SAMPLING, check(*sides(tmp_path, SERVER | requests, TRL | {"temperature": 0.7})))
    assert {name: one.severity for name, one in found.items()} == {"temperature": "wrong", "sampling_defaults": "note"}


def test_where_nobody_sends_sampling_is_not_compared(tmp_path: Path) -> None:
    """Our engine isn't vLLM's client."""
    rollout, train = sides(tmp_path, SERVER, OURS)
    assert of(SAMPLING, check(rollout, train)).keys() == {"sampling_defaults"}
    assert dict(not_stated(rollout, train))["temperature"] == "rollout"


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize("fields", [
    {"rope-theta": 500000},
    {"rope_theta": "5e5"},
    {"rope-scaling": YARN},
    {"rope_scaling": '{"type": "yarn", "factor": 4}'},
    {"rope-parameters": YARN | {"rope_theta": 500000}},
    {"hf-overrides": {"rope_parameters": YARN}},
    {"hf_overrides": '{"rope_theta": 500000}', "rope_scaling": YARN},
])  # fmt: skip
def test_ropes_fields_on_one_side_only_are_another_model(tmp_path: Path, fields: dict[str, Any]) -> None:
    found = of({"model_overrides"}, check(*sides(tmp_path, SERVER | fields, TRL)))
    assert (found["model_overrides"].severity, found["model_overrides"].train) == ("wrong", "not stated")
    assert set(found["model_overrides"].keys) == set(fields)


def test_all_of_ropes_fields_are_shown(tmp_path: Path) -> None:
    (found,) = of({"model_overrides"}, check(*sides(tmp_path, SERVER | {"rope-scaling": YARN}, TRL))).values()
    assert found.rollout == "factor=4.0, original_max_position_embeddings=32768, rope_type=yarn"
    assert found.why.startswith("the engine runs another model")


@pytest.mark.parametrize(("rollout", "train"), [
    ({"rope-theta": 500000}, TRL | {"model_init_kwargs": {"rope_theta": 5e5}}),
    ({"rope-scaling": YARN}, verl({}, {"rope_scaling": {"type": "yarn", **YARN}})),
    ({"rope-parameters": {"rope_theta": 5e5}}, TRL | {"model_init_kwargs": {"rope_parameters": '{"rope_theta": 5e5}'}}),
    ({}, TRL),
])  # fmt: skip
def test_ropes_fields_may_be_the_same_on_both_sides(
    tmp_path: Path, rollout: dict[str, Any], train: dict[str, Any]
) -> None:
    engine, trainer = sides(tmp_path, SERVER | rollout, train)
    assert of({"model_overrides"}, check(engine, trainer)) == {}
    assert trainer.not_judged == ()


def test_ropes_fields_of_the_trainer_alone_are_the_engines_to_set(tmp_path: Path) -> None:
    train = TRL | {"model_init_kwargs": {"rope_theta": 500000, "use_cache": False}}
    engine, trainer = sides(tmp_path, SERVER, train)
    (found,) = of({"model_overrides"}, check(engine, trainer)).values()
    assert (found.severity, found.rollout, found.train) == ("wrong", "not stated", "rope_theta=500000")
    assert (found.why.split()[1], found.remedy) == ("trainer", "the same overrides in the engine, or none")
    assert trainer.not_judged == ("model_init_kwargs.use_cache",)


@pytest.mark.parametrize(("engine", "wrong"), [({"name": "sglang"}, set()), ({"name": "vllm"}, {"model_overrides"}),
                                               ({}, {"model_overrides"})])  # fmt: skip
def test_only_the_engine_that_verl_runs_counts(tmp_path: Path, engine: dict[str, str], wrong: set[str]) -> None:
    kwargs = {"vllm": {"hf_overrides": {"rope_theta": 500000}, "odd": 1}, "sglang": {"odd": 1}}
    values = verl({**engine, "engine_kwargs": kwargs}) | {"env": {"VLLM_BATCH_INVARIANT": 1}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    both = read_sides(tmp_path / "a.yaml")
    findings = check(both["rollout"], both["train"])
    assert {one.setting for one in findings if one.severity == "wrong"} == wrong
    idle, used = ("vllm", "sglang") if engine.get("name") == "sglang" else ("sglang", "vllm")
    keys = "actor_rollout_ref.rollout.engine_kwargs"
    assert any(key.startswith(f"{keys}.{idle}.") for key in both["rollout"].harmless)
    assert [key.split(".")[3] for key in both["rollout"].not_judged] == [used]
    assert both["rollout"].get("numerics") == ("native" if used == "sglang" else "vLLM, batch-invariant")
