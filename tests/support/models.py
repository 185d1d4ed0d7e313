"""Tiny random models of the families that align() must handle, for every room's tests."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoConfig,
    OlmoeConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    Starcoder2Config,
)

_COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def _configs() -> dict[str, PreTrainedConfig]:
    partial = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return {
        "llama": LlamaConfig(**_COMMON, attention_bias=True, rope_parameters=llama3),
        "qwen2": Qwen2Config(**_COMMON),
        "qwen3": Qwen3Config(**_COMMON, head_dim=32, tie_word_embeddings=True),
        "mistral": MistralConfig(**_COMMON, sliding_window=7),
        "gemma2": Gemma2Config(
            **_COMMON,
            head_dim=32,
            sliding_window=8,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0,
            query_pre_attn_scalar=16,
        ),
        "phi3": Phi3Config(**_COMMON, rope_parameters=partial),
        "smollm3": SmolLM3Config(**_COMMON),
        "olmo2": Olmo2Config(**_COMMON),
        "starcoder2": Starcoder2Config(**_COMMON, sliding_window=9),
        "olmo": OlmoConfig(**_COMMON, clip_qkv=1.0),
        "phi": PhiConfig(**_COMMON, qk_layernorm=True),
        "gpt_neox": GPTNeoXConfig(**{k: v for k, v in _COMMON.items() if k != "num_key_value_heads"}),
    }


def _mixtures() -> dict[str, PreTrainedConfig]:
    """Mixtures of experts, which numerics=native takes and numerics=invariant refuses."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    return {
        "mixtral": MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2),
        "qwen3_moe": Qwen3MoeConfig(**_COMMON, **experts, head_dim=16, moe_intermediate_size=32),
        "olmoe": OlmoeConfig(**_COMMON, **experts),
    }


def _several_rotary_tables() -> dict[str, PreTrainedConfig]:
    """Refused by numerics=invariant too. As many heads as a test has prompts, so that rows may be taken for heads."""
    return {"gemma3": Gemma3TextConfig(**_COMMON, head_dim=16, sliding_window=8, query_pre_attn_scalar=16)}


FAMILIES = tuple(_configs())
MIXTURES = tuple(_mixtures())


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random model whose norm weights are random too, so that none of them can be mistaken for another."""
    config = (_configs() | _mixtures() | _several_rotary_tables())[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                scale = 0.3 if parameter.dim() == 1 else 0.15
                parameter.add_(torch.randn_like(parameter) * scale) if "bias" not in name else parameter.normal_()
    return model
