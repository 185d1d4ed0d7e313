"""Rotations and gates that align() fuses: where the model's own code does the same, nowhere else, with its bits."""

from __future__ import annotations

import copy

import pytest
import torch
from rlalign_kernels import dispatch
from support.models import tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CohereConfig, GlmConfig, PreTrainedModel

from rlalign.modeling import PackedContext, Policy, align, audit, layers, rotation

SMALL = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
# rotate channels that are neighbours, not halves
INTERLEAVED = {"glm": GlmConfig(**SMALL, head_dim=16), "cohere": CohereConfig(**SMALL)}


def counts(model: PreTrainedModel) -> tuple[int, int]:
    """Aligned attentions and gates of an aligned model."""
    kinds = [type(module).__mro__[1].__name__ for module in model.modules()]
    return kinds.count("AlignedAttention"), kinds.count("AlignedGatedMLP")


def hidden(model: PreTrainedModel) -> Tensor:
    tokens = torch.arange(30) * 7 % 97
    context = PackedContext(torch.tensor([0, 11, 30], dtype=torch.int32))
    positions = torch.cat([torch.arange(11), torch.arange(19)])
    return Policy(model).hidden(tokens, positions, context)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_families_have_the_bits_of_their_own_code(family: str, dtype: torch.dtype, monkeypatch) -> None:
    original = tiny_model(family, dtype)
    fused = align(copy.deepcopy(original), backend="reference")
    assert counts(fused) == (2, 0 if family == "phi3" else 2)  # whose gate and up are one product
    audit(fused)
    found = hidden(fused)
    monkeypatch.setattr(rotation, "_rotation_of", lambda module: None)
    for kind in (layers.AlignedSiLU, layers.AlignedGELU):
        monkeypatch.delattr(kind, "gated")
    plain = align(original, backend="reference")
    assert counts(plain) == (0, 0)
    expected = hidden(plain)
    assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", INTERLEAVED)
def test_another_rotation_stays_the_models_own(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(INTERLEAVED[name], attn_implementation="eager").eval()
    tokens = torch.arange(12).unsqueeze(0)
    expected = model(tokens).logits[0]
    aligned = align(model, backend="reference")
    assert counts(aligned)[0] == 0
    context = PackedContext(torch.tensor([0, 12], dtype=torch.int32))
    ids = {"input_ids": tokens, "position_ids": torch.arange(12).unsqueeze(0), "use_cache": False}
    torch.testing.assert_close(aligned(**ids, attention_context=context).logits[0], expected, rtol=0, atol=1e-4)


def test_a_rotation_of_the_same_name_that_does_something_else_is_left_alone(monkeypatch) -> None:
    from transformers.models.llama import modeling_llama

    real = modeling_llama.apply_rotary_pos_emb

    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        return real(q, k, cos, -sin, unsqueeze_dim)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", apply_rotary_pos_emb)
    assert counts(align(tiny_model("llama"), backend="reference")) == (0, 2)


def test_native_numerics_keep_the_models_own_code() -> None:
    assert counts(align(tiny_model("llama"), backend="native")) == (0, 0)


@torch.no_grad()
def test_an_mlp_that_multiplies_otherwise_is_left_alone() -> None:
    model = tiny_model("llama")
    mlp = model.model.layers[1].mlp

    class Shifted(type(mlp)):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 1))

    mlp.__class__ = Shifted
    assert counts(align(model, backend="reference")) == (2, 1)
    assert type(model.model.layers[1].mlp) is Shifted


@torch.no_grad()
def test_hooks_on_the_activation_are_called_and_change_no_bit() -> None:
    model = align(tiny_model("llama"), backend="reference")
    expected, heard = hidden(model), []
    handles = [m.register_forward_hook(lambda *_: heard.append(1)) for m in model.modules() if _is_activation(m)]
    assert torch.equal(hidden(model), expected)
    assert heard
    heard.clear()
    for handle in handles:
        handle.remove()
    before = [m.register_forward_pre_hook(lambda *_: heard.append(1)) for m in model.modules() if _is_activation(m)]
    assert torch.equal(hidden(model), expected)
    assert len(before) == 2
    assert heard


def test_one_operator_each_where_nobody_listens(monkeypatch) -> None:
    model = align(tiny_model("qwen3"), backend="reference")
    policy = Policy(model)
    seen: list[str] = []

    class Names(list):
        def append(self, name: str) -> None:
            seen.append(name)
            super().append(name)

    monkeypatch.setattr(dispatch, "running", Names())
    context = PackedContext(torch.tensor([0, 3], dtype=torch.int32))
    policy.hidden(torch.arange(3), torch.arange(3), context).sum().backward()
    assert {name: seen.count(name) for name in ("apply_rotary", "swiglu", "silu")} == {
        "apply_rotary": 2, "swiglu": 2, "silu": 0
    }  # fmt: skip


def _is_activation(module: nn.Module) -> bool:
    return isinstance(module, layers.AlignedSiLU)
