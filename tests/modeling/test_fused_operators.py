"""Rotations and gates that align() fuses: where the model's own code does the same, nowhere else, with its bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from support.models import tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CohereConfig, GlmConfig, PreTrainedModel

from rlalign.modeling import PackedContext, Policy, align, audit, gates, layers, rotation

SMALL = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
# gate and up are one product, or there is no gate
UNGATED = ("phi3", "starcoder2", "phi", "gpt_neox")
# rotate channels that are neighbours, not halves
INTERLEAVED = {"glm": GlmConfig(**SMALL, head_dim=16), "cohere": CohereConfig(**SMALL)}


def fuse(model: PreTrainedModel) -> PreTrainedModel:
    """As align() does on a GPU, with the operators of a CPU."""
    align(model, backend="reference")
    rotation.align_rotation(model, "reference")
    return model


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
    fused = fuse(copy.deepcopy(original))
    assert counts(fused) == (2, 0 if family in UNGATED else 2)
    audit(fused)
    found = hidden(fused)
    monkeypatch.setattr(rotation, "_rotation_of", lambda module: None)
    monkeypatch.setattr(gates, "_is_gated", lambda module: False)
    plain = fuse(original)
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
    aligned = fuse(model)
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
    assert counts(fuse(tiny_model("llama"))) == (0, 2)


@pytest.mark.parametrize(("backend", "expected"), [("native", (0, 0)), ("reference", (0, 2)), ("triton", (2, 2))])
def test_native_numerics_and_a_cpus_rotation_keep_the_models_own_code(backend: str, expected: tuple[int, int]) -> None:
    assert counts(align(tiny_model("llama"), backend=backend)) == expected


def shifted(mlp: nn.Module, x: Tensor) -> Tensor:
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * (mlp.up_proj(x) + 1))


def clamped(mlp: nn.Module, x: Tensor) -> Tensor:
    """As Step-3.7 and DeepSeek-V4 do, beyond what small inputs reach."""
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)).clamp(max=1e4) * mlp.up_proj(x).clamp(-1e4, 1e4))


def dropping(mlp: nn.Module, x: Tensor) -> Tensor:
    """As Seed-OSS does, in training."""
    out = mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    return nn.functional.dropout(out, 0.5, True) if mlp.training else out


def scaled(mlp: nn.Module, x: Tensor) -> Tensor:
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)) * mlp.down_proj.weight.new_ones(())


def squared(mlp: nn.Module, x: Tensor) -> Tensor:
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.act_fn(mlp.gate_proj(x)))


def unpacking(mlp: nn.Module, x: Tensor) -> Tensor:
    _batch, _rows, _size = x.shape
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))


def of_two(mlp: nn.Module, x: Tensor, other: Tensor) -> Tensor:
    return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(other))


def branching(mlp: nn.Module, x: Tensor) -> Tensor:
    return x if x.sum() > 1e30 else mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))


@pytest.mark.parametrize("code", [shifted, clamped, dropping, scaled, squared, unpacking, of_two, branching])
def test_an_mlp_of_other_code_is_left_alone(code) -> None:
    model = tiny_model("llama").train()
    mlp = model.model.layers[1].mlp
    other = type("Other", (type(mlp),), {"forward": code})
    mlp.__class__ = other
    assert counts(fuse(model)) == (2, 1)
    assert type(mlp) is other and mlp.training


@torch.no_grad()
def test_a_gate_takes_its_input_by_any_name_and_an_activation_that_was_replaced() -> None:
    model = fuse(tiny_model("llama"))
    mlp, x = model.model.layers[0].mlp, torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    expected = mlp(x)
    assert torch.equal(mlp(x=x), expected)
    mlp.act_fn.forward = lambda gate: gate * 0
    assert not mlp(x).any()
    mlp.act_fn = nn.Identity()
    assert torch.equal(mlp(x), mlp.down_proj(mlp.gate_proj(x) * mlp.up_proj(x)))


def test_a_backward_hook_on_the_activation_is_called() -> None:
    model, heard = fuse(tiny_model("llama")), []
    for module in model.modules():
        if _is_activation(module):
            module.register_full_backward_hook(lambda *_: heard.append(1))
    hidden(model).sum().backward()
    assert len(heard) == 2


def test_a_rotation_that_raises_is_left_alone(monkeypatch) -> None:
    from transformers.models.llama import modeling_llama

    def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
        raise AssertionError("not with these")

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", apply_rotary_pos_emb)
    assert counts(fuse(tiny_model("llama"))) == (0, 2)


def test_names_of_the_models_file_are_those_of_the_time_of_align(monkeypatch) -> None:
    from transformers.models.llama import modeling_llama

    fuse(tiny_model("llama"))
    called, real = [], modeling_llama.ALL_ATTENTION_FUNCTIONS

    class Watched(type(real)):
        def get_interface(self, *args: object) -> object:
            called.append(1)
            return real.get_interface(*args)

    monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", Watched())
    hidden(fuse(tiny_model("llama")))
    assert called


@torch.no_grad()
def test_hooks_on_the_activation_are_called_and_change_no_bit() -> None:
    model = fuse(tiny_model("llama"))
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


@pytest.mark.parametrize("run", ["forward and backward", "audit"])
def test_one_operator_each_where_nobody_listens(run: str, monkeypatch) -> None:
    model = fuse(tiny_model("qwen3"))
    policy = Policy(model)
    seen: list[str] = []

    def noted(name: str, real: Callable[..., object], *args: object, **keywords: object) -> object:
        seen.append(name)
        return real(*args, **keywords)

    for module, name in ((rotation, "apply_rotary"), (layers, "swiglu"), (layers, "silu")):
        monkeypatch.setattr(module, name, partial(noted, name, getattr(module, name)))
    context = PackedContext(torch.tensor([0, 3], dtype=torch.int32))
    if run == "audit":
        audit(model)
    else:
        policy.hidden(torch.arange(3), torch.arange(3), context).sum().backward()
    assert {name: seen.count(name) for name in ("apply_rotary", "swiglu", "silu")} == {
        "apply_rotary": 2, "swiglu": 2, "silu": 0
    }  # fmt: skip


def _is_activation(module: nn.Module) -> bool:
    return isinstance(module, layers.AlignedSiLU)
