"""One operator, or the batch, of another implementation in a real model's log-probs: ``attribute`` names just that.

The model is so wide that PyTorch's products sum in another order than ours, and the sequences' lengths are uneven: a
product has the same bits beside others as alone where its rows are a multiple of 4 (MKL's on x86).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.faults import Remembering
from transformers import AutoModelForCausalLM, Qwen3Config

from rlalign.cli.policies import Policies
from rlalign.cli.scoring import PolicyScorer
from rlalign.config import ScoringDtype
from rlalign.verifier import causes as catalogue
from rlalign.verifier.attribute import attribute
from rlalign.verifier.dumps import DumpSequence
from rlalign.verifier.score import OPERATORS, ScoreSettings

LENGTHS = (19, 5, 23, 13, 30, 11, 1, 2)
VOCABULARY = 499
OURS, NATIVE = ScoreSettings(), ScoreSettings(native=OPERATORS)
# one operator is not named of fewer tokens: that few may differ by chance
FEWEST = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=768, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=64, tie_word_embeddings=True,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.05))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> ScoringDtype:
    return request.param


@pytest.fixture(scope="module")
def engine(folder: Path, dtype: ScoringDtype) -> PolicyScorer:
    """Computes what the dumps report, on a policy of its own."""
    return PolicyScorer(Policies([folder], dtype))


@pytest.fixture(scope="module")
def scorer(folder: Path, dtype: ScoringDtype) -> Remembering:
    return Remembering(PolicyScorer(Policies([folder], dtype)))


@pytest.fixture(scope="module")
def sequences() -> list[DumpSequence]:
    random = np.random.default_rng(3)
    made = []
    for index, length in enumerate(LENGTHS):
        prompt, response = (random.integers(0, VOCABULARY, count) for count in (1 + index % 3, length))
        made.append(DumpSequence(str(index), prompt, response, np.zeros(length, np.float32), source=f"dump:{index}"))
    return made


@pytest.mark.parametrize(
    ("name", "base"),
    [
        *((f"{catalogue.ONE_OPERATOR}{operator}", OURS) for operator in OPERATORS),
        ("operators.native", OURS), ("operators.invariant", NATIVE), ("batch", OURS),
    ],
)  # fmt: skip
def test_one_operator_or_the_batch_is_named_and_nothing_else(name, base, dtype, engine, scorer, sequences):
    causes = catalogue.numeric_causes(dtype, decode=False, native=base == NATIVE)
    [cause] = [one for one in causes if one.name == name]
    planted = engine(sequences, cause.change(catalogue.Way(base), 0).settings)
    dump = [replace(one, logprobs=values) for one, values in zip(sequences, planted, strict=True)]
    found = attribute(dump, scorer, base=base, dtype=dtype)
    if found.base.mismatches < FEWEST:
        pytest.skip(f"{name} has other bits in {found.base.mismatches} of {found.base.tokens} tokens on this machine")
    # PyTorch's head in bfloat16 is one that rounds logits to it; neighbours may give no other bits
    [effect] = [one for one in found.effects if one.cause.name == name]
    assert [(step.cause.name, step.sequences) for step in found.steps] == [(effect.same_as or name, None)]
    assert found.rest.mismatches == 0 and found.explained and not found.findings
    assert found.steps[0].cause.remedy
