"""One operator, or the batch, of another implementation under a real model's log-probs: ``attribute`` names just that.

A model wide enough that a CPU's libraries sum in other orders than ours, and sequences of uneven lengths: products of
other row counts have other bits, though not of multiples of 4 on x86.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from rlalign.cli.policies import Policies
from rlalign.cli.scoring import PolicyScorer
from rlalign.cli.verify import main
from rlalign.verifier import causes as catalogue
from rlalign.verifier.dumps import DumpSequence, write_dump
from rlalign.verifier.score import OPERATORS, ScoreSettings

LENGTHS = (9, 5, 13, 3, 6, 11, 1, 2)
CAUSES = {cause.name: cause for cause in catalogue.numeric_causes("float32", decode=False)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = Qwen3Config(
        vocab_size=97, hidden_size=512, intermediate_size=768, num_hidden_layers=1, num_attention_heads=4,
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


@pytest.fixture(scope="module")
def scorer(folder: Path) -> PolicyScorer:
    return PolicyScorer(Policies([folder], "float32"))


@pytest.fixture(scope="module")
def sequences() -> list[DumpSequence]:
    random = np.random.default_rng(3)
    return [
        DumpSequence(str(i), random.integers(0, 97, 1 + i % 3), random.integers(0, 97, length), np.zeros(length))
        for i, length in enumerate(LENGTHS)
    ]


def attributed(
    scorer: PolicyScorer, sequences: list[DumpSequence], planted: ScoreSettings, tmp_path: Path, *options: str
) -> dict:
    file, out = tmp_path / "dump.jsonl", tmp_path / "out.json"
    logprobs = scorer(sequences, planted)
    write_dump(file, [replace(one, logprobs=values) for one, values in zip(sequences, logprobs, strict=True)])
    main(["attribute", "--dump", str(file), "--model", str(scorer.policies.models[0]), "--json", str(out), *options])
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", [*(f"operator.{operator}" for operator in OPERATORS), "batch"])
def test_one_operator_or_the_batch_is_named(name, scorer, sequences, tmp_path):
    cause = CAUSES[name]
    found = attributed(scorer, sequences, cause.change(catalogue.Way(), 0).settings, tmp_path)
    print(name, found["base"], found["causes"])
