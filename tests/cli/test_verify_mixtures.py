"""Every command that loads a model, on mixtures of experts: native works, invariant is refused in a line saying so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.dumps import error_line, run
from support.models import tiny_model

from rlalign import modeling
from rlalign.cli.verify import main

ROUNDING = ("--max-abs", "1e-4")


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model(request.param).save_pretrained(path)
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt_token_ids": [*range(5, 9 + i)]}) + "\n" for i in range(3)))
    return path


def test_native_is_judged_within_rounding(model: Path, prompts: Path, tmp_path: Path) -> None:
    dump = tmp_path / "dump.jsonl"
    generate = ["run", "--model", str(model), "--prompts", str(prompts), "--max-tokens", "6", "--dump", str(dump)]
    commands: list[list[str]] = [
        [*generate, "--rollout", "native", "--train", "native"],
        ["dump", str(dump), "--model", str(model), "--numerics", "native"],
        ["attribute", "--dump", str(dump), "--model", str(model), "--numerics", "native", "--limit", "1"],
        ["bisect", "--model", str(model), "--dump", str(dump), "--a", "native", "--b", "native,decode"],
    ]
    results = {command[0]: run(command, tmp_path, *ROUNDING) for command in commands}
    assert {name: result["exit_code"] for name, result in results.items()} == dict.fromkeys(results, 0)
    assert results["dump"]["num_tokens"] == 18
    assert results["bisect"]["not_recorded"] == []


def changed(model: Path, path: Path, parameter: str) -> Path:
    other = modeling.load_model(model, dtype="float32", device="cpu")
    with torch.no_grad():
        other.get_parameter(parameter).mul_(1.01)
    modeling.save_checkpoint(other, None, path)
    return path


@pytest.mark.parametrize(
    ("parameter", "operator"),
    [("experts.down_proj", "experts"), ("experts.gate_up_proj", "experts"), ("gate.weight", "router")],
)
def test_bisect_names_experts_and_router(
    model: Path, prompts: Path, tmp_path: Path, parameter: str, operator: str
) -> None:
    other = changed(model, tmp_path / "other", f"model.layers.1.mlp.{parameter}")
    sides = ["--a", "native", "--b", f"native,model={other}"]
    found: dict[str, Any] = run(["bisect", "--model", str(model), "--prompts", str(prompts), *sides], tmp_path)
    assert found["exit_code"] == 1
    module = f"model.layers.1.mlp.{parameter.partition('.')[0]}"
    assert (found["first"]["module"], found["first"]["operator"]) == (module, operator)


@pytest.mark.parametrize(
    ("command", "side"),
    [
        (["run", "--prompts", "PROMPTS"], ""),
        (["run", "--prompts", "PROMPTS", "--train", "native"], ""),
        (["dump", "DUMP"], ""),
        (["attribute", "--dump", "DUMP"], ""),
        (["bisect", "--prompts", "PROMPTS"], "--a invariant: "),
        (["bisect", "--prompts", "PROMPTS", "--a", "native", "--b", "native=norm"], "--b native=norm: "),
    ],
)
def test_invariant_is_refused_in_a_line_that_says_what_works(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str], side: str
) -> None:
    dump = tmp_path / "dump.jsonl"
    row = {"id": "r", "prompt_token_ids": [3, 4], "token_ids": [5, 6], "logprobs": [-1.0, -1.0]}
    dump.write_text(json.dumps(row) + "\n")
    files = {"PROMPTS": str(prompts), "DUMP": str(dump)}
    assert main([*(files.get(word, word) for word in command), "--model", str(model)]) == 2
    said = error_line(capsys)
    assert said.startswith(
        f"error: {side}{modeling.load_model(model, dtype='float32', device='cpu').__class__.__name__}"
    )
    assert "model.layers.0.mlp is a mixture of experts" in said
    assert "numerics=native takes mixtures whose every layer has attention (rlalign-verify: --numerics native; " in said
    assert said.endswith("bisect: --a native --b native,decode)\n")


@pytest.mark.parametrize("command", [["run", "--prompts", "PROMPTS"], ["bisect", "--prompts", "PROMPTS"]])
def test_gemma3_is_refused_by_its_rotary_tables_in_a_line_that_says_what_works(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    tiny_model("gemma3").save_pretrained(tmp_path / "gemma3")
    words = [*(str(prompts) if word == "PROMPTS" else word for word in command), "--model", str(tmp_path / "gemma3")]
    assert main(words) == 2
    said = error_line(capsys)
    assert "Gemma3ForCausalLM is not exact: aten.cos in model.rotary_emb" in said
    assert "Try numerics=native (rlalign-verify: --numerics native; bisect: --a native --b native,decode)" in said
    if command[0] == "run":
        assert main([*words, "--numerics", "native", "--max-abs", "1e-4", "--max-tokens", "6"]) == 0
