"""q, k, v and gate, up as one product: the same numbers, names and memory, and nothing where it does not fit."""

from __future__ import annotations

import copy

import pytest
import torch
from support.engines import VOCAB, roomy, tiny_policy
from support.models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from rlalign.engine import Engine
from rlalign.modeling import PackedContext, Policy
from rlalign.modeling.fused import fuse_projections, fused_shapes
from rlalign.modeling.layers import AlignedLinear

TOKENS = torch.arange(2, 40) % VOCAB
CONTEXT = PackedContext(torch.tensor([0, 20, 38], dtype=torch.int32))


def hidden(policy: Policy) -> torch.Tensor:
    return policy.hidden(TOKENS, torch.cat([torch.arange(20), torch.arange(18)]), CONTEXT)


def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Widths of the products from now on."""
    from rlalign.modeling import fused, layers

    seen: list[int] = []
    real = layers.linear

    def linear(x: torch.Tensor, weight: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        seen.append(weight.shape[0])
        return real(x, weight, *args, **kwargs)

    for module in (fused, layers):
        monkeypatch.setattr(module, "linear", linear)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_family_computes_the_same(family, dtype, monkeypatch):
    """On a CPU a column's bits rest on the weight's shape, so here within rounding; tests/gpu compares bits."""
    policy = tiny_policy(family, dtype)
    before = hidden(policy)
    state = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    shapes = fuse_projections(policy.model, "reference")
    # phi3 and gpt_neox come fused, starcoder2 and phi have no gates
    groups = {"phi3": 0, "gpt_neox": 0, "starcoder2": 2, "phi": 2}.get(family, 4)
    assert len(shapes) == groups
    assert fused_shapes(policy.model) == fused_shapes(tiny_model(family)) == set(shapes)
    seen = products(monkeypatch)
    torch.testing.assert_close(hidden(policy), before, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)
    layers = 2
    assert len(seen) == layers * 4  # q k v, o, gate up, down
    after = policy.model.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[name], state[name]) for name in state)
    assert fuse_projections(policy.model, "reference") == shapes
    assert policy.weights_hash() == tiny_policy(family, dtype).weights_hash()


@torch.no_grad()
def test_weights_are_loaded_and_saved_as_before(tmp_path):
    ours, other = tiny_policy("llama"), tiny_policy("llama")
    fuse_projections(ours.model, "reference")
    changed = {name: weight * 1.25 for name, weight in other.named_weights().items()}
    places = [p.data_ptr() for p in ours.model.parameters()]
    for policy in (ours, other):
        policy.load_weights(changed)
    assert [p.data_ptr() for p in ours.model.parameters()] == places
    torch.testing.assert_close(hidden(ours), hidden(other), rtol=0, atol=1e-5)
    assert ours.weights_hash() == other.weights_hash()
    ours.model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(plain[name], weight) for name, weight in changed.items())


def test_gradients_go_to_each_weight_of_its_own():
    fused, plain = tiny_policy("qwen3"), tiny_policy("qwen3")
    fuse_projections(fused.model, "reference")
    cotangent = torch.randn(38, 64, generator=torch.Generator().manual_seed(1))
    for policy in (fused, plain):
        (hidden(policy) * cotangent).sum().backward()
    grads = [{name: p.grad for name, p in policy.model.named_parameters()} for policy in (fused, plain)]
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[1])


class _Two(nn.Module):
    def __init__(self, up_bias: bool = True) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(32, 48)
        self.up_proj = nn.Linear(32, 16, bias=up_bias)


def two(**options: bool) -> _Two:
    from rlalign.modeling.layers import become

    module = _Two(**options)
    for linear in (module.gate_proj, module.up_proj):
        become(linear, AlignedLinear, "reference")
    return module


@torch.no_grad()
def test_a_part_belongs_to_the_rows_it_was_computed_from(monkeypatch):
    module, plain = two(), two()
    plain.load_state_dict(module.state_dict())
    assert fuse_projections(module, "reference") == [(64, 32)]
    seen = products(monkeypatch)

    def check(name: str, x: torch.Tensor) -> None:
        expected = plain.get_submodule(name)(x)
        torch.testing.assert_close(module.get_submodule(name)(x), expected, rtol=0, atol=1e-6)

    x, y = torch.randn(2, 5, 32).unbind(0)
    for name, rows in [("gate_proj", x), ("up_proj", x), ("gate_proj", x), ("up_proj", y), ("gate_proj", y)]:
        check(name, rows)
    assert seen.count(64) == 3
    check("gate_proj", x)
    x.mul_(2)  # the part that waits is of other rows
    check("up_proj", x)
    check("up_proj", x)


@torch.no_grad()
def test_a_weight_that_moved_is_computed_alone(monkeypatch):
    module = two()
    fuse_projections(module, "reference")
    module.up_proj.weight.data = module.up_proj.weight.data * 3
    other = copy.deepcopy(module)
    for one in (module, other):
        one.gate_proj.bias.add_(1.0)
        x = torch.randn(4, 32)
        for linear in (one.gate_proj, one.up_proj):
            expected = torch.nn.functional.linear(x, linear.weight, linear.bias)
            torch.testing.assert_close(linear(x), expected, rtol=0, atol=1e-5)


def test_what_does_not_follow_the_convention_is_left_alone():
    assert fuse_projections(two(up_bias=False), "reference") == []
    odd = two()
    odd.gate_proj.weight = nn.Parameter(torch.randn(33, 32)[:, :31].contiguous())
    assert fuse_projections(odd, "reference") == []
    tied = two()
    tied.other = nn.Linear(32, 48)
    tied.other.weight = tied.gate_proj.weight
    assert fuse_projections(tied, "reference") == []
    assert fuse_projections(tiny_model("qwen3"), "reference") == []  # not aligned
    adapted = two()
    adapted.up_proj = nn.Sequential(adapted.up_proj)
    assert fuse_projections(adapted, "reference") == []


def test_an_engine_fuses_on_the_triton_backend_only(monkeypatch):
    policy = tiny_policy("qwen3")
    Engine(policy, None, roomy())
    assert not any(m.rlalign_fused for m in policy.model.modules() if isinstance(m, AlignedLinear))
    monkeypatch.setattr(policy, "backend", "triton")
    policy.fuse_projections()
    fused = [m for m in policy.model.modules() if isinstance(m, AlignedLinear) and m.rlalign_fused]
    assert len(fused) == 2 * 5
