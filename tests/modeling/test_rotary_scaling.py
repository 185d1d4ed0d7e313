"""Rotary scalings: which are exact as they are, longrope up to where it would switch, and what is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from support.engines import VOCAB, bits, flat, mixed_params, packed_logprobs, random_prompts, roomy
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from rlalign.config import EngineConfig, SamplingParams
from rlalign.engine import Engine
from rlalign.modeling import PackedContext, Policy, align, audit
from rlalign.modeling.layers import AlignedRotary

SWITCH = 48
SCALINGS = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    },
    "proportional": {"factor": 2.0, "partial_rotary_factor": 0.5},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {
        "original_max_position_embeddings": SWITCH, "factor": 5.0,
        "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [3.0 + 2.0 * i for i in range(8)],
    },
    "dynamic": {"factor": 2.0},
}  # fmt: skip
EXACT = tuple(name for name in SCALINGS if name != "dynamic")
LENGTHS = (5, 23, 1, SWITCH, 12)


def scaled_model(kind: str, dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        rope_parameters={"rope_type": kind, "rope_theta": 10_000.0, **SCALINGS[kind], **changes},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.15)
    return model


def hidden(policy: Policy, sequences: list[torch.Tensor]) -> list[torch.Tensor]:
    lengths = [len(tokens) for tokens in sequences]
    context = PackedContext(torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32))
    positions = torch.cat([torch.arange(length) for length in lengths])
    return list(policy.hidden(torch.cat(sequences), positions, context).split(lengths))


@torch.no_grad()
@pytest.mark.parametrize("kind", EXACT)
def test_aligned_it_is_exact_and_computes_its_function(kind: str) -> None:
    original = scaled_model(kind)
    model = align(copy.deepcopy(original), backend="reference")
    assert audit(model).exact
    assert sum(isinstance(module, AlignedRotary) for module in model.modules()) == 1
    generator = torch.Generator().manual_seed(3)
    sequences = [torch.randint(VOCAB, (length,), generator=generator) for length in LENGTHS]
    policy = Policy(model)
    for ours, tokens in zip(hidden(policy, sequences), sequences, strict=True):
        theirs = original.model(tokens.unsqueeze(0)).last_hidden_state[0]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        (alone,) = hidden(policy, [tokens])
        assert torch.equal(alone, ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", EXACT)
def test_an_engines_logprobs_are_the_packed_forwards(kind: str, dtype: torch.dtype) -> None:
    policy = Policy(align(scaled_model(kind, dtype), backend="reference"))
    prompts, params = random_prompts(0, 10, high=36), mixed_params(1, 10, max_tokens=40)
    completions = flat(Engine(policy, None, roomy(max_batch_tokens=64, prefill_chunk=11)).generate(prompts, params))
    trained = packed_logprobs(policy, completions, params)
    assert [bits(c.logprobs) for c in completions] == [bits(values) for values in trained]
    assert max(len(c.prompt_ids) + len(c.token_ids) for c in completions) > 40


@torch.no_grad()
def test_a_longrope_has_its_short_frequencies_whatever_it_saw_before() -> None:
    model = scaled_model("longrope")
    short = model.model.rotary_emb.inv_freq.clone()
    model(torch.arange(SWITCH + 1).unsqueeze(0))
    assert not torch.equal(model.model.rotary_emb.inv_freq, short)
    policy = Policy(align(model, backend="reference"))
    assert torch.equal(model.model.rotary_emb.inv_freq, short)
    hidden(policy, [torch.arange(SWITCH + 1)])  # past the end: it may not switch for the others
    assert torch.equal(model.model.rotary_emb.inv_freq, short)


def test_a_longrope_ends_where_it_would_switch() -> None:
    policy = Policy(align(scaled_model("longrope"), backend="reference"))
    assert policy.max_positions == SWITCH
    with pytest.raises(ValueError, match=rf"max_model_len=49: the model has {SWITCH} positions \(256 with"):
        Engine(policy, None, EngineConfig(page_size=16, max_model_len=SWITCH + 1))
    engine = Engine(policy, None, EngineConfig(page_size=16))
    ((refused,),) = engine.generate([[1] * SWITCH], SamplingParams(max_tokens=1))
    assert "its longrope takes other frequencies" in refused.error
    assert Policy(align(scaled_model("longrope"), backend="native")).max_positions == 256
    assert Policy(align(scaled_model("yarn"), backend="reference")).max_positions == 256
    few = Policy(align(scaled_model("longrope", original_max_position_embeddings=9), backend="reference"))
    short = scaled_model("longrope").model.rotary_emb.inv_freq
    assert few.max_positions == 9 and torch.equal(few.model.model.rotary_emb.inv_freq, short)


def test_frequencies_that_depend_on_the_batch_are_refused_by_name() -> None:
    model = scaled_model("dynamic")
    kinds = [type(module) for module in model.modules()]
    others = "default, linear, llama3, proportional, yarn, and longrope"
    with pytest.raises(ValueError, match=f"model.rotary_emb: rope_type='dynamic' .* supported: {others}"):
        align(model, backend="reference")
    # nothing of it was touched, or what is done with it now would be half one thing and half another
    assert [type(module) for module in model.modules()] == kinds
    assert align(model, backend="native").rlalign_backend == "native"
