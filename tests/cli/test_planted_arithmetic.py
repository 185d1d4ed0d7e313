"""Dumps of plain transformers in 16 bits: ``attribute`` names how they were computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.faults import PROMPTS
from support.models import tiny_model
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from rlalign.cli.verify import main
from rlalign.verifier.dumps import DumpSequence, write_dump

Compute = Callable[[PreTrainedModel, list[int], list[int]], torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("qwen3").to(torch.bfloat16).save_pretrained(folder)
    return folder


@torch.no_grad()
def forward(model: PreTrainedModel, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Logits [L, V] of one forward of the whole sequence."""
    return model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]


@torch.no_grad()
def decode(model: PreTrainedModel, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Logits [L, V], token by token from a cache."""
    cache, found = DynamicCache(), []
    for ids in (prompt, *([token] for token in response[:-1])):
        found.append(model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0, -1])
    return torch.stack(found)


def by_transformers(folder: Path, how: Compute, dtype: torch.dtype = torch.bfloat16) -> list[DumpSequence]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()
    random, made = np.random.default_rng(3), []
    for index, prompt in enumerate(PROMPTS):
        response = random.integers(0, 97, 24)
        logits = how(model, prompt, response.tolist()).float()
        values = torch.log_softmax(logits, -1).gather(1, torch.from_numpy(response)[:, None])[:, 0].numpy()
        made.append(DumpSequence(str(index), np.array(prompt), response, values, source=f"dump:{index}"))
    return made


def run(dump: list[DumpSequence], folder: Path, tmp_path: Path, *options: str) -> dict:
    file, out = tmp_path / "dump.jsonl", tmp_path / "out.json"
    write_dump(file, dump)
    main(["attribute", "--dump", str(file), "--model", str(folder), "--json", str(out), *options])
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    ("how", "numerics", "cause"),
    [
        (decode, "native", "decode.alone"),
        (forward, "invariant", "operators.native"),
        (decode, "invariant", "decode.alone"),
    ],
    ids=["token by token", "other operators", "both"],
)
def test_how_transformers_computed_it_is_named(how, numerics, cause, folder, tmp_path):
    found = run(by_transformers(folder, how), folder, tmp_path, "--numerics", numerics)
    assert [step["name"] for step in found["causes"]] == [cause]
    assert found["rest"]["mean_abs"] < 0.5 * found["base"]["mean_abs"]
    assert found["explained"] and not found["findings"]


@pytest.mark.parametrize("scoring", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("engine", ["float32", "bfloat16", "float16"])
def test_the_engines_dtype_is_named_under_any_other(engine, scoring, folder, tmp_path):
    options = ("--dtype", scoring, "--numerics", "native")
    found = run(by_transformers(folder, forward, getattr(torch, engine)), folder, tmp_path, *options)
    named = [step["name"] for step in found["causes"] if step["name"].startswith("dtype.")]
    assert named == ([] if engine == scoring else [f"dtype.{engine}"])
    assert found["explained"] and not found["findings"]


def test_float16_is_refused_where_nothing_computes_in_it(folder, tmp_path, capsys):
    file = tmp_path / "dump.jsonl"
    write_dump(file, by_transformers(folder, forward, torch.float16))
    assert main(["dump", str(file), "--model", str(folder), "--dtype", "float16"]) == 2
    assert "dtype=float16: on a CPU only numerics=native computes in it" in capsys.readouterr().err
