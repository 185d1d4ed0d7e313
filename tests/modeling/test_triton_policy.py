"""A whole model on the triton backend, by Triton's interpreter: logic and accuracy; bits are tests/gpu's."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from support.models import tiny_model

from rlalign.config import EngineConfig, SamplingParams
from rlalign.engine import Engine
from rlalign.modeling import Policy, align, backend_for

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="there is a GPU: tests/gpu")


def one_layer(family: str, backend: str) -> Policy:
    model = tiny_model(family)
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    return Policy(align(model, backend=backend))


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("family", ["llama", "starcoder2", "olmo"])
def test_an_engine_runs_on_it(family):
    policies = {backend: one_layer(family, backend) for backend in ("triton", "reference")}
    params = SamplingParams(max_tokens=2, seed=1)
    drawn = [
        Engine(policy, None, EngineConfig(num_pages=4)).generate([[1, 2, 3, 4, 5]], params)[0][0]
        for policy in policies.values()
    ]
    assert drawn[0].token_ids.tolist() == drawn[1].token_ids.tolist()
    np.testing.assert_allclose(drawn[0].logprobs, drawn[1].logprobs, rtol=0, atol=1e-5)


def test_the_backend_follows_numerics_and_device():
    assert [backend_for("invariant", device) for device in ("cpu", "cuda", torch.device("cuda", 1))] == [
        "reference", "triton", "triton",
    ]  # fmt: skip
    assert backend_for("native", "cuda") == backend_for("native", "cpu") == "native"
    model = align(tiny_model("llama"))
    assert model.rlalign_backend == "reference"
    assert {m.rlalign_backend for m in model.modules() if hasattr(m, "rlalign_backend")} == {"reference"}


@interpreted
def test_every_module_is_told_the_backend():
    told = [m for m in align(tiny_model("gemma2"), backend="triton").modules() if hasattr(m, "rlalign_backend")]
    assert len(told) > 20 and {m.rlalign_backend for m in told} == {"triton"}
    assert {type(m.rlalign_attention).__name__ for m in told if hasattr(m, "rlalign_attention")} == {"Invariant"}
