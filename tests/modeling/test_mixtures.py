"""What is refused, and in which words: mixtures of experts by our operators, and some models by any.

test_align.py has what mixtures of experts compute on PyTorch's operators.
"""

from __future__ import annotations

import pytest
import torch
from support.models import MIXTURES, tiny_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV2Config,
    GptOssConfig,
    Llama4TextConfig,
    MambaConfig,
    MiniMaxConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from rlalign.engine import Engine
from rlalign.modeling import AuditError, Policy, align, audit, load_policy

SIZES = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "pad_token_id": None, "bos_token_id": None,
         "eos_token_id": None}  # fmt: skip
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "max_position_embeddings": 256}


def model_of(config: PreTrainedConfig) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("mixture", MIXTURES)
def test_invariant_is_refused_by_name_with_what_works(mixture: str, tmp_path) -> None:
    model = tiny_model(mixture)
    model.save_pretrained(tmp_path)
    refusal = r"model\.layers\.0\.mlp is a mixture of experts, .*mlp\.experts.*numerics=native takes mixtures"
    with pytest.raises(AuditError, match=refusal):
        load_policy(tmp_path)
    with pytest.raises(AuditError, match=refusal):
        Engine(model, None)
    assert load_policy(tmp_path, numerics="native").backend == "native"


class MeanFree(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(-1, keepdim=True)


def test_what_is_found_beside_a_mixture_is_named_too() -> None:
    model = align(tiny_model("mixtral"), backend="reference")
    model.model.layers[0].input_layernorm = MeanFree()
    with pytest.raises(AuditError, match=r"mlp is a mixture .*; elsewhere aten\.mean in model\.layers\.0\.input_layer"):
        audit(model)


def test_a_block_beside_the_experts_is_not_called_a_mixture() -> None:
    model = align(tiny_model("mixtral"), backend="reference")
    for layer in model.model.layers:
        layer.mlp = MeanFree()
    with pytest.raises(AuditError, match=r"not exact: aten\.mean in model\.layers\.0\.mlp") as refused:
        audit(model)
    assert "mixture" not in str(refused.value)


def test_complex_rotary_tables_are_left_to_the_audit() -> None:
    config = DeepseekV2Config(
        **SIZES, **HEADS | {"num_key_value_heads": 4}, moe_intermediate_size=32, n_routed_experts=4, n_shared_experts=1,
        num_experts_per_tok=2, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=16, qk_nope_head_dim=16,
        qk_rope_head_dim=8, v_head_dim=16,
    )  # fmt: skip
    with pytest.raises(AuditError, match=r"model\.layers\.1\.mlp is a mixture of experts"):
        audit(align(model_of(config), backend="reference"))


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_keyword_that_attention_depends_on_is_refused_with_any_numerics(backend: str) -> None:
    config = GptOssConfig(**SIZES, **HEADS, head_dim=16, num_local_experts=4, num_experts_per_tok=2)
    with pytest.raises(ValueError, match=r"GptOssAttention passes s_aux=… to attention.*not supported, with any num"):
        model = align(model_of(config), backend=backend)
        audit(model, strict=False)
        Policy(model)


@pytest.mark.parametrize(
    ("config", "refusal"),
    [
        (MambaConfig(**SIZES), r"0 of 2 layers call the attention that we replace \(layer_idx \[\]\)"),
        (BloomConfig(**SIZES | {"n_head": 4}), "0 of 2 layers"),  # its own attention would see all packed sequences
        (MiniMaxConfig(**SIZES, **HEADS, num_local_experts=4), r"1 of 2 layers .*\(layer_idx \[0\]\)"),
        (Llama4TextConfig(**SIZES, **HEADS, num_local_experts=2), "no decoder of its own under 'language_model'"),
    ],
    ids=["mamba", "bloom", "minimax", "llama4"],
)
def test_native_refuses_what_it_would_compute_wrongly(config: PreTrainedConfig, refusal: str) -> None:
    with pytest.raises(ValueError, match=refusal + ".*not supported, with any numerics"):
        Policy(align(model_of(config), backend="native"))
