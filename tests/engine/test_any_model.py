"""``Engine(model, tokenizer, config)`` with what people have at hand: a policy, an aligned model, a plain one."""

from __future__ import annotations

import pytest
import torch
from support.engines import flat, mixed_params, outcome, random_prompts, roomy, tiny_policy
from support.models import tiny_model

from rlalign.engine import Engine
from rlalign.modeling import AuditError, align

PROMPTS, PARAMS = random_prompts(5, 6, high=30), mixed_params(6, 6, max_tokens=10)


def results(engine: Engine) -> list[tuple]:
    return outcome(flat(engine.generate(PROMPTS, PARAMS)))


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_model_is_aligned_in_place_and_gives_the_policys_bits(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype)
    engine = Engine(model, None, roomy())
    assert results(engine) == results(Engine(tiny_policy(family, dtype), None, roomy()))
    assert engine.policy.model is model and model.rlalign_backend == engine.policy.backend == "reference"
    assert results(Engine(model, None, roomy(page_size=4))) == results(engine)  # a second one shares it


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_an_aligned_model_keeps_its_backend(backend: str) -> None:
    engine = Engine(align(tiny_model("llama"), backend=backend), None, roomy())
    assert engine.policy.backend == backend
    assert results(engine) == results(Engine(tiny_policy("llama", backend=backend), None, roomy()))


def test_a_model_that_cannot_be_exact_is_refused_every_time() -> None:
    class MeanFree(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean(-1, keepdim=True)

    model = tiny_model("llama")
    model.model.layers[1].mlp = MeanFree()
    for _ in range(2):
        with pytest.raises(AuditError, match=r"aten\.mean in model\.layers\.1\.mlp"):
            Engine(model, None)


@pytest.mark.parametrize("model", ["a/folder", None, torch.nn.Linear(2, 2), Engine])
def test_anything_else_is_a_type_error_that_says_what_is_taken(model: object) -> None:
    with pytest.raises(TypeError, match=r"model=.*need a Policy .*or a Hugging Face causal LM"):
        Engine(model, None)
