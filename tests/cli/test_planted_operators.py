"""One operator of PyTorch's, or another batch, planted into a real model: ``attribute`` names it, all bits are back."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from support.faults import PLAIN, PROMPTS, Remembering
from support.models import tiny_model
from transformers import Qwen3ForCausalLM

from rlalign.cli.policies import Policies
from rlalign.cli.scoring import PolicyScorer
from rlalign.config import ScoringDtype
from rlalign.verifier.attribute import attribute
from rlalign.verifier.causes import Way, numeric_causes
from rlalign.verifier.dumps import DumpSequence
from rlalign.verifier.score import OPERATORS, ScoreSettings

INVARIANT, NATIVE = ScoreSettings(), ScoreSettings(native=OPERATORS)
DECODED = replace(NATIVE, phase="decode")  # a row or several at a time: other products


@pytest.fixture(scope="module")
def scorer_of(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = tiny_model("qwen3").config
    config.update({"hidden_size": 320, "intermediate_size": 640})  # so wide that orders of summation differ
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return cache(lambda dtype: Remembering(PolicyScorer(Policies([folder], dtype))))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("operator.attention", INVARIANT), ("operator.linear", INVARIANT), ("operator.norm", INVARIANT),
        ("operator.rotary", INVARIANT), ("operator.activation", INVARIANT), ("operator.head", INVARIANT),
        ("operators.native", INVARIANT), ("operators.invariant", NATIVE), ("batch", DECODED),
    ],
)  # fmt: skip
def test_it_is_named_alone(name: str, base: ScoreSettings, dtype: ScoringDtype, scorer_of) -> None:
    scorer, random = scorer_of(dtype), np.random.default_rng(1)
    sampled = [
        DumpSequence(str(i), np.array(prompt), random.integers(0, 97, 24), np.zeros(24, np.float32), sampling=PLAIN)
        for i, prompt in enumerate(PROMPTS * 4)
    ]
    if base.phase == "decode":  # a forward per token
        sampled = sampled[:5]
    causes = numeric_causes(dtype, decode=False, native=base != INVARIANT)
    ways = {cause.name: cause.change(Way(base), 0).settings for cause in causes}
    planted = np.stack(scorer(sampled, ways.pop(name)))
    moved = (planted != np.stack(scorer(sampled, base))).sum()
    if moved < 9:
        pytest.skip(f"{name} has the same bits on this CPU, but for {moved} tokens of {planted.size}")
    twins = {other for other, way in ways.items() if np.array_equal(planted, np.stack(scorer(sampled, way)))}
    dump = [replace(one, logprobs=values) for one, values in zip(sampled, planted, strict=True)]
    found = attribute(dump, scorer, base=base, dtype=dtype, decode=False)
    [step] = found.steps
    assert step.cause.name in {name, *twins} and step.cause.remedy
    assert (found.rest.mismatches, found.findings) == (0, ())
