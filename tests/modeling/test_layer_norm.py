"""LayerNorm, with weight and bias or without: PyTorch's and OLMo's become ours, others are left to the audit."""

from __future__ import annotations

import copy

import pytest
import torch
from support.engines import bits, flat, mixed_params, packed_logprobs, random_prompts, roomy, tiny_policy
from support.models import tiny_model
from torch import Tensor, nn

from rlalign.engine import Engine
from rlalign.modeling import AuditError, Policy, align, audit
from rlalign.modeling.layers import AlignedLayerNorm

# norms of the two layers and the last one; phi has one a layer, and one each for queries and keys
NORMS = {"starcoder2": 5, "olmo": 5, "phi": 7, "gpt_neox": 5}
PROMPTS, PARAMS = random_prompts(0, 12, high=36), mixed_params(1, 12, max_tokens=12)


@pytest.mark.parametrize("family", NORMS)
def test_every_norm_is_ours_under_its_own_name(family: str) -> None:
    original = tiny_model(family)
    model = align(copy.deepcopy(original), backend="reference")
    found = {name: m for name, m in model.named_modules() if isinstance(m, AlignedLayerNorm)}
    assert len(found) == NORMS[family]
    assert audit(model).exact
    x = torch.randn(7, 1000, generator=torch.Generator().manual_seed(3))
    for name, norm in found.items():
        theirs = original.get_submodule(name)
        assert [n for n, _ in norm.named_parameters()] == [n for n, _ in theirs.named_parameters()]
        rows = x[:, : norm.normalized_shape[0]]
        torch.testing.assert_close(norm(rows), theirs(rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", NORMS)
def test_an_engines_logprobs_are_the_packed_forwards(family: str, dtype: torch.dtype) -> None:
    policy = tiny_policy(family, dtype)
    engine = Engine(policy, None, roomy(max_batch_tokens=64, prefill_chunk=11))
    completions = flat(engine.generate(PROMPTS, PARAMS))
    trained = packed_logprobs(policy, completions, PARAMS)
    assert [bits(c.logprobs) for c in completions] == [bits(values) for values in trained]
    assert engine.stats["mixed_steps"] > 0


class Doubled(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class OfTwoAxes(nn.LayerNorm):
    """As images have it: mean and variance over rows and features."""

    def __init__(self) -> None:
        super().__init__((8, 64))


class BareLayerNorm(nn.Module):
    """OLMo's, but for the eps, and what is done before it."""

    def __init__(self, eps: float, factor: float) -> None:
        super().__init__()
        self.normalized_shape, self.eps, self.factor = (64,), eps, factor

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x.float() * self.factor, self.normalized_shape, eps=self.eps).to(x.dtype)


@pytest.mark.parametrize(
    "norm", [Doubled(64), OfTwoAxes(), BareLayerNorm(1e-6, 1.0), BareLayerNorm(1.1e-5, 1.0), BareLayerNorm(1e-5, 2.0)]
)
def test_one_that_computes_something_else_is_left_to_the_audit(norm: nn.Module) -> None:
    model = tiny_model("olmo")
    model.model.layers[1].input_layernorm = norm
    align(model, backend="reference")
    with pytest.raises(AuditError, match=r"aten\.native_layer_norm in model\.layers\.1\.input_layernorm"):
        audit(model)


def test_without_weight_or_without_bias() -> None:
    model = tiny_model("starcoder2")
    model.model.layers[0].input_layernorm = nn.LayerNorm(64, bias=False)
    model.model.layers[1].input_layernorm = nn.LayerNorm(64, elementwise_affine=False)
    model.model.norm = BareLayerNorm(1e-5, 1.0)  # another class than OLMo's, with what it computes
    assert audit(align(model, backend="reference")).exact
    assert sum(isinstance(m, AlignedLayerNorm) for m in Policy(model).model.modules()) == 5


def test_dropout_that_no_module_shows_is_refused() -> None:
    for field in ("residual_dropout", "embedding_dropout", "hidden_dropout_prob", "activation_dropout", "layerdrop"):
        model = tiny_model("starcoder2")
        setattr(model.config, field, 0.1)
        with pytest.raises(ValueError, match=rf"config\.{field}=0\.1"):
            align(model, backend="reference")


def test_the_switch_of_norms_reaches_them(tmp_path) -> None:
    from rlalign.cli.policies import Policies
    from rlalign.verifier.score import ScoreSettings

    tiny_model("starcoder2").save_pretrained(tmp_path)
    with Policies([tmp_path], dtype="float32").using(ScoreSettings(native=("norm",))) as policy:
        backends = {m.rlalign_backend for m in policy.model.modules() if isinstance(m, AlignedLayerNorm)}
    assert backends == {"native"}
