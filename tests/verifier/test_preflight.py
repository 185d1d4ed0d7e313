"""Each cause in a configuration of each framework, and that nothing in a file passes without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from rlalign.config import config_from_dict, config_to_dict
from rlalign.verifier.preflight import check, not_stated, read_sides, with_requests

# an engine and a trainer between which no rule finds anything but their operators
VLLM = {
    "model": "m", "dtype": "bfloat16", "seed": 0, "enforce_eager": True, "enable_prefix_caching": False,
    "enable_chunked_prefill": False, "logprobs_mode": "processed_logprobs", "max_model_len": 4096,
    "generation_config": "vllm",
}  # fmt: skip
TRL = {"model_name_or_path": "m", "bf16": True, "use_vllm": True, "num_generations": 8}


def sides(tmp_path: Path, rollout: dict[str, Any], train: dict[str, Any]) -> tuple[Any, Any]:
    for name, values in (("rollout", rollout), ("train", train)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    ours, theirs = (read_sides(tmp_path / f"{name}.yaml") for name in ("rollout", "train"))
    return with_requests(ours["rollout"], theirs["rollout"]), theirs["train"]


def found(tmp_path: Path, rollout: dict[str, Any], train: dict[str, Any]) -> set[tuple[str, str]]:
    return {(one.severity, one.setting) for one in check(*sides(tmp_path, rollout, train))}


OPERATORS = {("differs", "numerics")}


def test_the_quiet_pair_differs_only_in_its_operators(tmp_path: Path) -> None:
    assert found(tmp_path, VLLM, TRL) == OPERATORS


@pytest.mark.parametrize("requests", [{}, {"temperature": 1.0}])
def test_vllm_takes_the_checkpoints_sampling_parameters_unless_told_otherwise(
    tmp_path: Path, requests: dict[str, float]
) -> None:
    told = {name: value for name, value in VLLM.items() if name != "generation_config"} | requests
    # TRL's own requests leave nothing out
    assert found(tmp_path, told, TRL) - OPERATORS == ({("note", "sampling_defaults")} if requests else set())


@pytest.mark.parametrize(("rollout", "train", "expected"), [
    ({"model": "other"}, {}, {("wrong", "model")}),
    ({"dtype": "half"}, {}, {("wrong", "dtype")}),
    ({}, {"bf16": False, "model_init_kwargs": {"torch_dtype": "float32"}}, {("wrong", "dtype")}),
    ({"quantization": "fp8"}, {}, {("wrong", "quantization")}),
    ({"kv-cache-dtype": "fp8_e5m2"}, {}, {("wrong", "kv_cache_dtype")}),
    ({"temperature": 0.7}, {}, {("wrong", "temperature")}),
    ({"temperature": 0.7}, {"temperature": 0.7}, set()),
    ({"temperature": 0.7, "logprobs_mode": "raw_logprobs"}, {"temperature": 0.7}, {("wrong", "temperature")}),
    ({"attention_backend": "FLASHINFER"}, {"model_init_kwargs": {"attn_implementation": "sdpa"}},
     {("differs", "attention")}),
    ({"sampling_params": {"top_p": 0.9}}, {}, {("wrong", "top_p")}),
    ({"top_p": 0.9, "logprobs_mode": "raw_logprobs"}, {}, {("note", "top_p")}),
    ({"top_k": -1, "min_p": 0.1}, {}, {("wrong", "min_p")}),
    ({"repetition_penalty": 1.1, "presence_penalty": 0}, {}, {("wrong", "penalties")}),
    ({"logit_bias": {5: -100}}, {}, {("wrong", "logit_edits")}),
    ({"generation_config": "auto", "top_p": 1}, {}, {("note", "sampling_defaults")}),
    ({"enable_chunked_prefill": True}, {}, {("differs", "chunked_prefill")}),
    ({"enable_prefix_caching": True}, {}, {("differs", "prefix_cache")}),
    ({"enforce_eager": False}, {}, {("differs", "cuda_graphs")}),
    ({"speculative_config": {"method": "ngram"}}, {}, {("differs", "speculative")}),
    ({"tensor-parallel-size": 2}, {}, {("differs", "tensor_parallel")}),
    ({"attention_backend": "FLASHINFER"}, {"attn_implementation": "sdpa"}, {("differs", "attention")}),
    ({}, {"cast_lm_head_to_fp32": True}, {("note", "logits_dtype")}),
    ({}, {"use_liger_kernel": True}, {("differs", "fused_kernels")}),
    ({}, {"torch_compile": True}, {("differs", "compile")}),
    ({"hf_overrides": {"rope_scaling": {"factor": 2}}}, {}, {("wrong", "model_overrides")}),
    ({"hf-overrides": {"rope_parameters": {"rope_theta": 5000000}}}, {}, {("wrong", "model_overrides")}),
    ({"hf_overrides": '{"rope_theta": 5e6}'}, {"model_init_kwargs": {"rope_theta": "5e6"}}, set()),
    ({"hf_overrides": {"rope_theta": 5e6}}, {"model_init_kwargs": {"rope_theta": 1e6}}, {("wrong", "model_overrides")}),
    ({"hf_overrides": {"head_dtype": "float32"}}, {}, {("note", "model_overrides")}),
    ({"hf_overrides": {"head_dtype": "float32", "num_hidden_layers": 2}}, {}, {("wrong", "model_overrides")}),
    ({"hf_overrides": {}}, {}, set()),
    ({"logprobs_mode": "processed_logits"}, {}, {("wrong", "logprobs")}),
    ({"logprobs_mode": "raw_logits"}, {}, {("wrong", "logprobs")}),
    ({}, {"num_iterations": 1, "steps_per_generation": 4}, {("note", "updates_per_sync")}),
    ({}, {"vllm_importance_sampling_correction": True}, {("note", "correction")}),
    ({"enable_lora": True}, {}, {("differs", "lora")}),
    ({"seed": None}, {}, {("note", "seed")}),
])  # fmt: skip
def test_each_cause_is_found_alone(
    tmp_path: Path, rollout: dict[str, Any], train: dict[str, Any], expected: set[tuple[str, str]]
) -> None:
    assert found(tmp_path, VLLM | rollout, TRL | train) == OPERATORS | expected


@pytest.mark.parametrize(("rollout", "train", "words"), [
    (0.7, 0.9, "raw log-probs are of a third one"),
    (0.7, 1.0, "raw log-probs, which are those at temperature 1, agree with it"),
    (0.7, 0.7, "raw log-probs are those at temperature 1, the trainer divides"),
    (1.0, 0.7, "the trainer scores another distribution"),
    (0, 0.7, "greedy"),
])  # fmt: skip
def test_a_difference_of_temperatures_is_one_line(tmp_path: Path, rollout: float, train: float, words: str) -> None:
    raw = VLLM | {"temperature": rollout, "logprobs_mode": "raw_logprobs"}
    [line] = [one for one in check(*sides(tmp_path, raw, TRL | {"temperature": train})) if one.setting == "temperature"]
    assert words in line.why


def test_what_a_trl_file_says_of_its_model_and_its_batches_is_known(tmp_path: Path) -> None:
    """Without a word of generation too: no other framework has these names."""
    content = {"model_name_or_path": "m", "attn_implementation": "sdpa", "num_iterations": 2,
               "per_device_train_batch_size": 4, "gradient_checkpointing": True}  # fmt: skip
    (tmp_path / "trl.yaml").write_text(yaml.safe_dump(content))
    train = read_sides(tmp_path / "trl.yaml")["train"]
    assert (train.get("model"), train.get("attention"), train.get("updates_per_sync")) == ("m", "sdpa", 2)
    assert train.not_judged == ()
    assert set(train.harmless) == {"per_device_train_batch_size", "gradient_checkpointing"}


@pytest.mark.parametrize(("content", "updates"), [
    ({"gradient_accumulation_steps": 8, "steps_per_generation": 8, "num_iterations": 1}, 1),
    ({"gradient_accumulation_steps": 8, "steps_per_generation": 32, "num_iterations": 4}, 16),
    ({"gradient_accumulation_steps": 8, "num_iterations": 2}, 2),  # steps_per_generation is the accumulation's
    ({"gradient_accumulation_steps": 8, "steps_per_generation": 12}, 2),
    ({"gradient_accumulation_steps": 8}, 1),
    ({"generation_batch_size": 64, "num_iterations": 2}, None),  # for that, the processes must be known
])  # fmt: skip
def test_trls_updates_are_counted_in_what_one_update_accumulates(
    tmp_path: Path, content: dict[str, int], updates: int | None
) -> None:
    (tmp_path / "trl.yaml").write_text(yaml.safe_dump(TRL | content))
    train = read_sides(tmp_path / "trl.yaml")["train"]
    assert train.get("updates_per_sync") == updates
    assert set(train.not_judged) == (set(content) if updates is None else set())


def test_batch_invariance_silences_the_schedule_but_not_the_other_kernels(tmp_path: Path) -> None:
    invariant = VLLM | {"enforce_eager": False, "enable_prefix_caching": True, "env": {"VLLM_BATCH_INVARIANT": 1}}
    (finding,) = check(*sides(tmp_path, invariant, TRL))
    assert (finding.setting, finding.rollout, finding.train) == (
        "numerics",
        "vLLM, batch-invariant",
        "native (default)",
    )


VERL = {
    "actor_rollout_ref": {
        "model": {"path": "m"},
        "actor": {"fsdp_config": {"dtype": "bfloat16"}},
        "rollout": {"name": "vllm", "temperature": 0.8, "enforce_eager": True, "enable_prefix_caching": False,
                    "enable_chunked_prefill": False, "seed": 1, "logprobs_mode": "processed_logprobs"},
    },
}  # fmt: skip


@pytest.mark.parametrize(("key", "value", "expected"), [
    ("rollout.dtype", "float16", ("wrong", "dtype")),
    ("rollout.top_p", 0.9, ("wrong", "top_p")),
    ("rollout.logprobs_mode", "raw_logprobs", ("wrong", "temperature")),
    ("rollout.engine_kwargs", {"vllm": {"kv_cache_dtype": "fp8"}}, ("wrong", "kv_cache_dtype")),
    ("rollout.tensor_model_parallel_size", 2, ("differs", "tensor_parallel")),
    ("actor.ulysses_sequence_parallel_size", 4, ("differs", "sequence_parallel")),
    ("actor.ppo_epochs", 2, ("note", "updates_per_sync")),
    ("model.override_config", {"rope_theta": 1e6}, ("wrong", "model_overrides")),
    ("model.override_config", {"attention_dropout": 0.1}, None),
    ("rollout.engine_kwargs", {"vllm": {"hf_overrides": {"rope_theta": 1e6}}}, ("wrong", "model_overrides")),
    ("rollout.max_model_len", None, None),  # null leaves it to the framework
    ("rollout.logprobs_mode", None, None),  # verl asks for processed ones where nobody says
])  # fmt: skip
def test_one_file_of_verl_is_both_sides(tmp_path: Path, key: str, value: Any, expected: tuple[str, str] | None) -> None:
    values = yaml.safe_load(yaml.safe_dump(VERL))
    group, name = key.split(".")
    values["actor_rollout_ref"][group][name] = value
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    both = read_sides(tmp_path / "a.yaml")
    findings = {(one.severity, one.setting) for one in check(both["rollout"], both["train"])}
    assert findings == OPERATORS | ({expected} if expected else set())


def test_the_engines_changes_of_verls_model_may_be_the_trainers_too(tmp_path: Path) -> None:
    values = yaml.safe_load(yaml.safe_dump(VERL))
    values["actor_rollout_ref"]["model"]["override_config"] = {"rope_scaling": {"type": "yarn", "factor": 4}}
    same = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    values["actor_rollout_ref"]["rollout"]["engine_kwargs"] = {"vllm": {"hf_overrides": same}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    both = read_sides(tmp_path / "a.yaml")
    assert {(one.severity, one.setting) for one in check(both["rollout"], both["train"])} == OPERATORS


def test_the_dtype_of_verls_master_weights_is_known_to_be_harmless(tmp_path: Path) -> None:
    values = yaml.safe_load(yaml.safe_dump(VERL))
    values["actor_rollout_ref"]["actor"]["fsdp_config"]["model_dtype"] = "fp32"
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    train = read_sides(tmp_path / "a.yaml")["train"]
    assert (train.not_judged, train.get("dtype")) == ((), "bfloat16")
    assert "actor_rollout_ref.actor.fsdp_config.model_dtype" in train.harmless


def test_verls_trainer_computes_in_bfloat16_where_nobody_says(tmp_path: Path) -> None:
    values = {"actor_rollout_ref": {"actor": {"fsdp_config": {"model_dtype": "fp32"}}, "rollout": {"dtype": "float16"}}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    both = read_sides(tmp_path / "a.yaml")
    found = {one.setting: (one.rollout, one.train) for one in check(both["rollout"], both["train"])}
    assert found["dtype"] == ("float16", "bfloat16 (default)")
    assert "dtype" not in dict(not_stated(both["rollout"], both["train"]))


@pytest.mark.parametrize(("data", "limit", "train"), [
    ({"max_prompt_length": 1024, "max_response_length": 2048}, None, 3072),
    ({"max_prompt_length": 1024, "max_response_length": 2048}, 2000, 3072),
    ({"max_prompt_length": 1024, "max_response_length": 2048}, 9000, 3072),
    ({"max_prompt_length": 1024}, 2000, None),
    ({"max_prompt_length": 1024, "max_response_length": None}, None, None),
])  # fmt: skip
def test_verls_lengths_of_prompts_and_responses_add_up(
    tmp_path: Path, data: dict[str, int | None], limit: int | None, train: int | None
) -> None:
    values = {"data": data, "actor_rollout_ref": {"rollout": {"max_model_len": limit}}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    both = read_sides(tmp_path / "a.yaml")
    limits = [one for one in (limit, train) if one is not None]
    assert both["rollout"].get("max_length") == min(limits, default=None)
    assert both["train"].get("max_length") == train
    assert both["train"].not_judged == (("data.max_prompt_length",) if train is None else ())
    assert "max_length" not in {one.setting for one in check(both["rollout"], both["train"])}


def test_an_engine_that_goes_beyond_verls_lengths_is_found(tmp_path: Path) -> None:
    lengths = {"data": {"max_prompt_length": 1024, "max_response_length": 2048}}
    engine, trainer = sides(tmp_path, VLLM, VERL | lengths)
    (finding,) = [one for one in check(engine, trainer) if one.setting == "max_length"]
    assert (finding.severity, finding.rollout, finding.train) == ("wrong", "4096", "3072")
    assert finding.keys == ("max_model_len", "data.max_prompt_length, data.max_response_length")


def test_staleness_is_told_from_numerics(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(VERL | {"async_training": {"staleness_threshold": 0.5}}))
    both = read_sides(tmp_path / "a.yaml")
    finding = check(both["rollout"], both["train"])[0]
    assert (finding.setting, finding.train) == ("staleness", "0.5")
    assert "a share of 0.5 of those between two syncs" in finding.why  # no versions: verl bounds how many, not how old


@pytest.mark.parametrize(("batch", "actor", "asynchronous", "updates"), [
    (256, {"ppo_mini_batch_size": 64}, None, 4),
    (256, {"ppo_mini_batch_size": 64, "ppo_epochs": 3}, None, 12),
    (256, {"ppo_mini_batch_size": 256, "ppo_epochs": 1}, None, 1),
    (256, {}, None, None),
    (0, {"ppo_mini_batch_size": 64}, {"trigger_parameter_sync_step": 4, "require_batches": 2}, 8),
    (256, {"ppo_mini_batch_size": 64, "ppo_epochs": 2}, {"trigger_parameter_sync_step": 4}, 8),
])  # fmt: skip
def test_verls_updates_are_the_mini_batches_between_two_syncs(
    tmp_path: Path, batch: int, actor: dict[str, int], asynchronous: dict[str, int] | None, updates: int | None
) -> None:
    values = {"data": {"train_batch_size": batch}, "actor_rollout_ref": {"actor": actor or {"grad_clip": 1}}}
    values |= {"async_training": asynchronous} if asynchronous else {}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    train = read_sides(tmp_path / "a.yaml")["train"]
    assert train.get("updates_per_sync") == updates
    assert train.not_judged == (("data.train_batch_size",) if updates is None else ())


def test_our_settings_have_no_findings_and_native_ones_have(tmp_path: Path) -> None:
    for numerics in ("invariant", "native"):
        values = config_to_dict(
            config_from_dict({"numerics": numerics, "sampling": {"top_p": 0.9, "temperature": 0.7}})
        )
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
        both = read_sides(tmp_path / "config.yaml")
        settings = {one.setting for one in check(both["rollout"], both["train"])}
        assert settings == (set() if numerics == "invariant" else {"numerics", "chunked_prefill", "prefix_cache"})
        assert both["rollout"].not_judged == ()
        assert not_stated(both["rollout"], both["train"]) == []


def test_no_key_passes_without_a_word(tmp_path: Path) -> None:
    keys = {"brand_new_setting": 1, "port": 8000}
    rollout, train = sides(tmp_path, VLLM | keys, TRL | {"something": {"else": 1}})
    assert (rollout.not_judged, rollout.harmless) == (("brand_new_setting",), ("port", "generation_config"))
    assert train.not_judged == ("something.else",)
    stated = {setting.key for setting in rollout.settings.values() if not setting.is_default}
    assert stated | {*rollout.not_judged, *rollout.harmless} == {*VLLM, *keys}


def test_an_automatic_dtype_is_the_checkpoints_and_therefore_not_stated(tmp_path: Path) -> None:
    rollout, train = sides(tmp_path, VLLM | {"dtype": "auto"}, TRL)
    assert {(one.severity, one.setting) for one in check(rollout, train)} == OPERATORS
    assert dict(not_stated(rollout, train))["dtype"] == "rollout"


def test_what_nobody_states_is_listed(tmp_path: Path) -> None:
    silent = dict(not_stated(*sides(tmp_path, VLLM, TRL)))
    assert silent["max_length"] == "train"
    assert silent["attention"] == "rollout and train"
    assert "dtype" not in silent


@pytest.mark.parametrize(("content", "message"), [
    ("a: [1", "not readable as YAML"),
    ("- 1\n", "is a mapping of settings, this is list"),
    ("", "is a mapping of settings, this file is empty"),
    ("{}", "is a mapping of settings"),
    ("color: red\n", "not recognised as rlalign, verl, trl, vllm"),
    ("use_vllm: true\ntemperature: 0.7\ntemperature: 1.0\n", "temperature stands twice"),
    ("use_vllm: true\ntemperature: .nan\n", "temperature=nan: must be a finite number"),
    ("temperature: 0.7\nbeta: 0.1\ncolor: red\n", "--train-format: 2 of its 3 settings are also trl's"),
    ("enforce_eager: maybe\n", "enforce_eager='maybe': must be true or false"),
    ("use_vllm: true\ngradient_accumulation_steps: 0\n", "gradient_accumulation_steps=0: must be at least 1"),
    ("tensor_parallel_size: 1.5\n", "tensor_parallel_size=1.5: must be a whole number"),
    ("logprobs_mode: cooked\n", "logprobs_mode='cooked': must be raw_logprobs"),
    ("numerics: exact\n", "Input should be 'invariant' or 'native'"),
    ("numerics: native\nengin: {}\n", "engin: no such setting; did you mean engine"),
    ("numerics: native\ndefaults: [model]\n", "a page that hydra composes"),
])  # fmt: skip
def test_unusable_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"a\.yaml") as caught:
        read_sides(tmp_path / "a.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize(("content", "format", "message"), [
    # three names that vLLM has too, and defaults for what it calls otherwise
    ("temperature: 0.7\ntop_p: 0.9\nseed: 1\nuse_vllm: true\nmodel_name_or_path: m\nbf16: true\nbeta: 0\n", "vllm",
     "of its 7 settings vllm has 3, trl 7: read it as trl"),
    ("actor_rollout_ref:\n  rollout:\n    temperature: 1.0\n", "rlalign", "rlalign has 0, verl 1: read it as verl"),
    ("numerics: invariant\nsampling:\n  temperature: 0.7\n", "trl", "trl has 0, rlalign 2: read it as rlalign"),
    ("hf_overrides:\n  rope_theta: 1.0\nenforce_eager: true\noutput_dir: x\n", "verl", "vllm 2: read it as vllm"),
    ("color: red\n", "verl", "none of its settings is one of verl's: color"),
])  # fmt: skip
def test_a_file_is_not_read_as_what_it_is_not(tmp_path: Path, content: str, format: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(ValueError) as refusal:
        read_sides(tmp_path / "c.yaml", format=format)
    assert message in str(refusal.value)
