"""Which key of which framework says what. Each table reads from top to bottom: rollout, train, both."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlalign.verifier.preflight.side import Name, Setting

BOTH = "both"
_ROLLOUT, _ACTOR, _MODEL = (f"actor_rollout_ref.{part}." for part in ("rollout", "actor", "model"))
Read = Callable[[str, Any], Any]
Found = dict[str, dict[Name, Setting]]


def as_is(key: str, value: Any) -> Any:
    """An object in JSON or YAML is shown as its JSON."""
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else value


def flag(key: str, value: Any) -> bool:
    """True, false, 1, 0 and their words."""
    text = str(value).strip().lower()
    if text not in ("true", "false", "1", "0", "yes", "no", "on", "off"):
        raise ValueError("must be true or false")
    return text in ("true", "1", "yes", "on")


def negated(key: str, value: Any) -> bool:
    return not flag(key, value)


def number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("must be a number")
    if not math.isfinite(float(value)):
        raise ValueError("must be a finite number")
    return float(value)


def count(key: str, value: Any) -> int:
    if number(key, value) != int(float(value)):
        raise ValueError("must be a whole number")
    return int(float(value))


def positive(key: str, value: Any) -> int:
    if count(key, value) < 1:
        raise ValueError("must be at least 1")
    return count(key, value)


def top_k(key: str, value: Any) -> int:
    """-1, 0 and nothing all mean: keep everything."""
    return max(0, count(key, value)) if value is not None else 0


def dtype(key: str, value: Any) -> str | None:
    """``auto`` is the checkpoint's, which the file doesn't tell."""
    names = {"bf16": "bfloat16", "half": "float16", "fp16": "float16", "fp32": "float32", "float": "float32"}
    text = str(value).removeprefix("torch.").lower()
    return None if text == "auto" else names.get(text, text)


def dtype_if(name: str) -> Read:
    """For switches such as ``bf16: true``; false says nothing."""
    return lambda key, value: name if flag(key, value) else None


def named(key: str, value: Any) -> tuple[str, ...]:
    """A transform that only exists on one side, with its name, if it is on."""
    neutral = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0}
    last = key.replace("-", "_").rpartition(".")[2]
    off = value in (None, "", False, [], {}) or (last in neutral and float(value) == neutral[last])
    return () if off else (f"{last}={as_is(key, value)}",)


def logprobs(key: str, value: Any) -> str:
    text = str(value)
    if text.partition("_")[0] not in ("raw", "processed"):
        raise ValueError("must be raw_logprobs, processed_logprobs, raw_logits or processed_logits")
    return text if text.endswith("_logits") else text.partition("_")[0]


def invariant_flag(key: str, value: Any) -> str | None:
    return "vLLM, batch-invariant" if flag(key, value) else None


def present(key: str, value: Any) -> bool:
    return value not in (None, "", False, 0, {}, [])


def trl_updates(parts: Mapping[str, float]) -> tuple[float | None, set[str]]:
    """Micro-steps that one generation serves, over those that one update takes.

    A generation_batch_size says the same as steps_per_generation only with the number of processes, which isn't told.
    """
    accumulation = parts.get("gradient_accumulation_steps", 1)
    if "generation_batch_size" in parts and "steps_per_generation" not in parts:
        return None, set()
    steps = parts.get("steps_per_generation", accumulation) * parts.get("num_iterations", 1)
    return math.ceil(steps / accumulation), set(parts)


def verl_updates(parts: Mapping[str, float]) -> tuple[float | None, set[str]]:
    """Mini-batches of one batch, or those between two syncs of the fully asynchronous trainer, by the epochs."""
    used = parts.keys() & {"ppo_epochs"}
    updates = parts.get("ppo_epochs", 1)
    batch, mini = (parts.get(name, 0) for name in ("train_batch_size", "ppo_mini_batch_size"))
    if "trigger_parameter_sync_step" in parts:  # that trainer's batches are require_batches mini-batches each
        updates *= parts["trigger_parameter_sync_step"] * math.ceil(parts.get("require_batches", 1))
        used = set(parts)
    elif batch and mini:
        updates *= math.ceil(batch / mini)
        used |= {"train_batch_size", "ppo_mini_batch_size"}
    return (updates, set(used)) if used else (None, set())


def verl_idle(key: str, values: Mapping[str, Any]) -> bool:
    """What is there for engines other than ``rollout.name``."""
    engine = str(values.get(f"{_ROLLOUT}name") or "vllm")
    block = f"{_ROLLOUT}engine_kwargs."
    if key.startswith(block):
        return key != f"{block}{engine}" and not key.startswith(f"{block}{engine}.")
    return engine != "vllm" and key.rpartition(".")[2].startswith("VLLM_")


@dataclass(frozen=True)
class Format:
    """keys: dotted key to (side, setting, how to read it). marks: keys that only this framework has. harmless: patterns
    of keys that change no log-prob. defaults: of settings that its documentation gives one. updates: how many updates
    there are between two syncs of weights, by the last words of the keys of ``updates_per_sync``, and which of them
    tell it. overrides: where a trainer changes fields of the checkpoint's config.json. length: keys of a prompt's and a
    response's limit, which add up to a sequence's on either side. idle: whether a key, by the values of all, belongs to
    an engine that isn't used."""

    name: str
    roles: tuple[str, ...]
    marks: tuple[str, ...]
    keys: Mapping[str, tuple[str, Name, Read]]
    defaults: Mapping[str, Mapping[Name, Any]] = field(default_factory=dict)
    harmless: tuple[str, ...] = ()
    overrides: str | None = None
    length: tuple[str, ...] = ()
    updates: Callable[[Mapping[str, float]], tuple[float | None, set[str]]] = lambda parts: (None, set())
    idle: Callable[[str, Mapping[str, Any]], bool] = lambda key, values: False

    def finish(self, found: Found) -> None:
        """A value of None says nothing; a reader gives it for a switch that is off."""
        for settings in found.values():
            for name in [name for name, setting in settings.items() if setting.value is None]:
                del settings[name]


def _engine(prefix: str = "", *, role: str = "rollout") -> dict[str, tuple[str, Name, Read]]:
    """vLLM's arguments, wherever a framework passes them on."""
    table: dict[str, tuple[Name, Read]] = {
        "model": ("model", as_is), "tokenizer": ("tokenizer", as_is), "chat_template": ("chat_template", as_is),
        "dtype": ("dtype", dtype), "quantization": ("quantization", as_is), "kv_cache_dtype": ("kv_cache_dtype", as_is),
        "tensor_parallel_size": ("tensor_parallel", count), "pipeline_parallel_size": ("pipeline_parallel", count),
        "enable_expert_parallel": ("expert_parallel", flag), "enforce_eager": ("cuda_graphs", negated),
        "enable_chunked_prefill": ("chunked_prefill", flag), "enable_prefix_caching": ("prefix_cache", flag),
        "speculative_config": ("speculative", present), "speculative_model": ("speculative", present),
        "attention_backend": ("attention", as_is), "logprobs_mode": ("logprobs", logprobs),
        "max_model_len": ("max_length", count), "seed": ("seed", as_is), "enable_lora": ("lora", flag),
        "rope_scaling": ("rope_scaling", as_is), "rope_parameters": ("rope_scaling", as_is),
        "rope_theta": ("rope_theta", number),
        "hf_overrides": ("model_overrides", as_is), "generation_config": ("sampling_defaults", as_is),
        "override_generation_config": ("sampling_defaults", as_is),
    }  # fmt: skip
    return {f"{prefix}{key}": (role, name, read) for key, (name, read) in table.items()}


def _sampling(prefix: str = "", *, role: str = "rollout") -> dict[str, tuple[str, Name, Read]]:
    numbers: dict[str, tuple[Name, Read]] = {
        "temperature": ("temperature", number), "top_p": ("top_p", number), "top_k": ("top_k", top_k),
        "min_p": ("min_p", number),
    }  # fmt: skip
    edits = ("logit_bias", "bad_words", "allowed_token_ids", "min_tokens", "guided_decoding", "structured_outputs")
    table = {key: (role, name, read) for key, (name, read) in numbers.items()}
    table |= {f"{kind}_penalty": (role, "penalties", named) for kind in ("presence", "frequency", "repetition")}
    table |= {key: (role, "logit_edits", named) for key in edits}
    return {f"{prefix}{key}": value for key, value in table.items()}


_ENGINE_DEFAULTS: dict[Name, Any] = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "logprobs": "raw", "chunked_prefill": True,
    "prefix_cache": True, "cuda_graphs": True, "tensor_parallel": 1, "numerics": "native",
}  # fmt: skip
_TRAIN_DEFAULTS: dict[Name, Any] = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "numerics": "native", "tensor_parallel": 1,
}  # fmt: skip
_ENVIRONMENT: dict[str, tuple[str, Name, Read]] = {
    f"{prefix}{key}": ("rollout", name, read)
    for prefix in ("", "env.", "environment.", "env_vars.")
    for key, name, read in (
        ("VLLM_BATCH_INVARIANT", "numerics", invariant_flag),
        ("VLLM_ATTENTION_BACKEND", "attention", as_is),
    )
}  # type: ignore[assignment]

_VLLM_HARMLESS = """
    gpu_memory_utilization port host served_model_name download_dir disable_log_* swap_space api_key max_logprobs
    uvicorn_log_level trust_remote_code distributed_executor_backend n max_tokens logprobs stop* tokenizer_mode
    sampling_params.n sampling_params.max_tokens sampling_params.logprobs sampling_params.seed sampling_params.stop*
    enable_sleep_mode data_parallel_size
"""
_TRL_HARMLESS = """
    output_dir run_name logging_* save_* report_to push_to_hub hub_* log_completions num_completions_to_print
    num_generations max_prompt_length max_completion_length vllm_gpu_memory_utilization vllm_server_* vllm_mode use_vllm
    vllm_enable_sleep_mode learning_rate max_steps num_train_epochs warmup_* lr_scheduler_* beta epsilon* loss_type
    per_device_*_batch_size gradient_checkpointing* scale_rewards reward_* dataset_* eval_* do_* weight_decay
    max_grad_norm adam_* optim*
"""
_VERL_HARMLESS = """
    trainer.* data.train_* data.val_* data.prompt_key data.return_* data.shuffle critic.* reward_model.*
    custom_reward_function.* actor_rollout_ref.ref.* actor_rollout_ref.actor.optim.* actor_rollout_ref.actor.clip_*
    actor_rollout_ref.actor.*kl_* actor_rollout_ref.actor.entropy_coeff actor_rollout_ref.actor.grad_clip
    actor_rollout_ref.actor.checkpoint.* actor_rollout_ref.actor.fsdp_config.model_dtype
    actor_rollout_ref.rollout.gpu_memory_utilization actor_rollout_ref.rollout.n
    actor_rollout_ref.rollout.name actor_rollout_ref.rollout.mode actor_rollout_ref.rollout.val_kwargs.*
    actor_rollout_ref.rollout.free_cache_engine actor_rollout_ref.rollout.calculate_log_probs
    actor_rollout_ref.rollout.prompt_length actor_rollout_ref.rollout.response_length algorithm.adv_estimator
    algorithm.gamma algorithm.lam algorithm.*kl* algorithm.norm_adv*
"""

VLLM = Format(
    name="vLLM",
    roles=("rollout",),
    marks=("gpu_memory_utilization", "max_model_len", "enforce_eager", "tensor_parallel_size", "enable_prefix_caching",
           "logprobs_mode", "max_num_seqs"),
    keys={**_engine(), **_sampling(), **_sampling("sampling_params."), **_ENVIRONMENT},
    # verl and TRL name all settings in every request; others' requests get the checkpoint's
    defaults={"rollout": _ENGINE_DEFAULTS | {"sampling_defaults": "auto"}},
    harmless=tuple(_VLLM_HARMLESS.split()),
)  # fmt: skip

TRL = Format(
    name="TRL",
    roles=("rollout", "train"),
    marks=("use_vllm", "vllm_*", "num_generations", "max_completion_length", "steps_per_generation", "loss_type",
           "model_name_or_path", "per_device_train_batch_size", "num_iterations"),
    keys={
        "vllm_tensor_parallel_size": ("rollout", "tensor_parallel", count),
        "vllm_max_model_length": ("rollout", "max_length", count),
        "vllm_logprobs_mode": ("rollout", "logprobs", logprobs),
        **_sampling("generation_kwargs."),
        **{key: value for key, value in _sampling().items() if key not in ("temperature", "min_tokens")},
        "bf16": ("train", "dtype", dtype_if("bfloat16")),
        "fp16": ("train", "dtype", dtype_if("float16")),
        "model_init_kwargs.dtype": ("train", "dtype", dtype),
        "model_init_kwargs.torch_dtype": ("train", "dtype", dtype),
        "dtype": ("train", "dtype", dtype),
        "torch_dtype": ("train", "dtype", dtype),
        "cast_lm_head_to_fp32": ("train", "logits_dtype", dtype_if("float32")),
        "model_init_kwargs.attn_implementation": ("train", "attention", as_is),
        "model_init_kwargs.rope_scaling": ("train", "rope_scaling", as_is),
        "model_init_kwargs.rope_parameters": ("train", "rope_scaling", as_is),
        "model_init_kwargs.rope_theta": ("train", "rope_theta", number),
        "attn_implementation": ("train", "attention", as_is),
        "torch_compile": ("train", "compile", flag),
        "use_liger_kernel": ("train", "fused_kernels", flag),
        "use_liger_loss": ("train", "fused_kernels", flag),
        "load_in_4bit": ("train", "quantization", dtype_if("4bit")),
        "load_in_8bit": ("train", "quantization", dtype_if("8bit")),
        "use_peft": ("train", "lora", flag),
        "steps_per_generation": ("train", "updates_per_sync", count),
        "num_iterations": ("train", "updates_per_sync", count),
        "gradient_accumulation_steps": ("train", "updates_per_sync", positive),
        "generation_batch_size": ("train", "updates_per_sync", count),
        "vllm_importance_sampling_correction": ("train", "correction", flag),
        "model_name_or_path": (BOTH, "model", as_is),
        "temperature": (BOTH, "temperature", number),
        "chat_template_path": (BOTH, "chat_template", as_is),
        "seed": (BOTH, "seed", as_is),
    },
    # TRL asks its vLLM for processed log-probs, and divides its own logits by the temperature
    defaults={
        "rollout": _ENGINE_DEFAULTS | {"logprobs": "processed"},
        "train": _TRAIN_DEFAULTS,
    },
    harmless=tuple(_TRL_HARMLESS.split()),
    overrides="model_init_kwargs.",
    updates=trl_updates,
)  # fmt: skip

VERL = Format(
    name="verl",
    roles=("rollout", "train"),
    marks=("actor_rollout_ref.*",),
    keys={
        **_engine(f"{_ROLLOUT}engine_kwargs.vllm."),
        **_sampling(_ROLLOUT),
        f"{_ROLLOUT}dtype": ("rollout", "dtype", dtype),
        f"{_ROLLOUT}tensor_model_parallel_size": ("rollout", "tensor_parallel", count),
        f"{_ROLLOUT}pipeline_model_parallel_size": ("rollout", "pipeline_parallel", count),
        f"{_ROLLOUT}enforce_eager": ("rollout", "cuda_graphs", negated),
        f"{_ROLLOUT}enable_chunked_prefill": ("rollout", "chunked_prefill", flag),
        f"{_ROLLOUT}enable_prefix_caching": ("rollout", "prefix_cache", flag),
        f"{_ROLLOUT}logprobs_mode": ("rollout", "logprobs", logprobs),
        f"{_ROLLOUT}quantization": ("rollout", "quantization", as_is),
        f"{_ROLLOUT}max_model_len": ("rollout", "max_length", count),
        f"{_ROLLOUT}seed": ("rollout", "seed", as_is),
        f"{_ROLLOUT}mtp.enable": ("rollout", "speculative", flag),
        f"{_ACTOR}fsdp_config.dtype": ("train", "dtype", dtype),
        f"{_ACTOR}fsdp_config.mixed_precision.param_dtype": ("train", "dtype", dtype),
        f"{_ACTOR}megatron.dtype": ("train", "dtype", dtype),
        f"{_ACTOR}megatron.tensor_model_parallel_size": ("train", "tensor_parallel", count),
        f"{_ACTOR}megatron.pipeline_model_parallel_size": ("train", "pipeline_parallel", count),
        f"{_ACTOR}ulysses_sequence_parallel_size": ("train", "sequence_parallel", count),
        f"{_ACTOR}use_torch_compile": ("train", "compile", flag),
        f"{_MODEL}use_fused_kernels": ("train", "fused_kernels", flag),
        f"{_MODEL}use_liger": ("train", "fused_kernels", flag),
        f"{_MODEL}override_config.attn_implementation": ("train", "attention", as_is),
        f"{_MODEL}override_config.rope_scaling": ("train", "rope_scaling", as_is),
        f"{_MODEL}override_config.rope_parameters": ("train", "rope_scaling", as_is),
        f"{_MODEL}override_config.rope_theta": ("train", "rope_theta", number),
        f"{_MODEL}lora_rank": (BOTH, "lora", present),
        f"{_MODEL}path": (BOTH, "model", as_is),
        f"{_MODEL}tokenizer_path": (BOTH, "tokenizer", as_is),
        f"{_MODEL}custom_chat_template": (BOTH, "chat_template", as_is),
        f"{_ROLLOUT}temperature": (BOTH, "temperature", number),
        "data.train_batch_size": ("train", "updates_per_sync", count),
        f"{_ACTOR}ppo_mini_batch_size": ("train", "updates_per_sync", positive),
        f"{_ACTOR}ppo_epochs": ("train", "updates_per_sync", count),
        "async_training.staleness_threshold": ("train", "staleness", number),
        "async_training.trigger_parameter_sync_step": ("train", "updates_per_sync", count),
        "async_training.require_batches": ("train", "updates_per_sync", number),
        "algorithm.rollout_correction.rollout_is": ("train", "correction", present),
        "algorithm.rollout_is": ("train", "correction", present),
        **{f"{where}.{key}": value for where in ("env", "ray_init.runtime_env.env_vars",
                                                 "ray_kwargs.ray_init.runtime_env.env_vars")
           for key, value in _ENVIRONMENT.items() if "." not in key},
    },
    # verl's actor divides its logits by the rollout's temperature
    defaults={
        # RolloutConfig.logprobs_mode, which verl hands on to its vLLM
        "rollout": _ENGINE_DEFAULTS | {"dtype": "bfloat16", "logprobs": "processed"},
        # FSDP's and Megatron's forward, whatever fsdp_config.model_dtype keeps the weights in between
        "train": _TRAIN_DEFAULTS | {"dtype": "bfloat16"},
    },
    harmless=tuple(_VERL_HARMLESS.split()),
    overrides=f"{_MODEL}override_config.",
    length=("data.max_prompt_length", "data.max_response_length"),
    updates=verl_updates,
    idle=verl_idle,
)  # fmt: skip

FORMATS: dict[str, Format] = {"verl": VERL, "trl": TRL, "vllm": VLLM}
"""More particular ones first."""
