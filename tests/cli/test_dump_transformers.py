"""transformers' own generation, dumped, against the model's forward: from sampling to a verdict, on a CPU."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.models import tiny_model

from rlalign.cli.dump_transformers import main as dump
from rlalign.cli.verify import main as verify
from rlalign.verifier.dumps import read_dump

PROMPTS = ([3, 14, 15, 9], [2, 71, 82, 8, 18, 28], [1, 61, 80, 33, 9, 88, 7], [57, 72])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model("qwen3").save_pretrained(path / "model")
    rows = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    (path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def made(folder: Path, out: Path, *options: str) -> list[Any]:
    given = ["--model", str(folder / "model"), "--prompts", str(folder / "prompts.jsonl"), "--out", str(out)]
    assert dump([*given, "--max-tokens", "10", *options]) == 0
    found = list(read_dump(out))
    assert [s.prompt_token_ids.tolist() for s in found] == list(PROMPTS)
    assert all(len(s.token_ids) == len(s.logprobs) == 10 and s.finish_reason == "length" for s in found)
    return found


def verdict(folder: Path, file: Path, out: Path, *options: str) -> dict[str, Any]:
    code = verify(["dump", str(file), "--model", str(folder / "model"), "--json", str(out), *options])
    found = json.loads(out.read_text())
    assert found["exit_code"] == code
    return found


SAMPLING = ["--temperature", "0.7", "--top-p", "0.8"]


@pytest.mark.parametrize(
    ("options", "suffix"),
    [
        (["--engine", "generate", *SAMPLING, "--batch-size", "3"], ".jsonl"),
        (["--engine", "generate", *SAMPLING, "--raw", "--min-p", "0.01"], ".parquet"),
        (["--engine", "generate", "--top-k", "9", "--attention", "eager"], ".jsonl"),
        (["--engine", "generate", "--temperature", "0"], ".jsonl"),
        (["--engine", "generate_batch", *SAMPLING], ".jsonl"),
        (["--engine", "generate_batch", "--temperature", "1.3", "--top-k", "9"], ".parquet"),
    ],
    ids=["generate", "raw", "top-k", "greedy", "batch", "batch-top-k"],
)
def test_from_generation_to_a_verdict(options, suffix, folder, tmp_path):
    file = tmp_path / f"dump{suffix}"
    sequences = made(folder, file, *options)
    assert all(s.processed is ("--raw" not in options) for s in sequences)
    found = verdict(folder, file, tmp_path / "out.json", "--max-abs", "1e-4")
    # float32 on both sides: other operators, so other bits, and nothing else
    assert found["exit_code"] == 0 and found["metrics"]["align/mismatch_count"] > 0
    assert found["metrics"]["align/nonfinite_count"] == 0
    assert 0 < found["metrics"]["align/logp_abs_diff/mean"] < 1e-5


def test_seeds_and_greedy_choices_repeat(folder, tmp_path):
    for engine, seeds in (("generate", "556"), ("generate_batch", "55")):
        dumps = [
            made(folder, tmp_path / f"{engine}{i}.jsonl", "--engine", engine, "--seed", s) for i, s in enumerate(seeds)
        ]
        first, again, *others = ([s.token_ids.tolist() for s in each] for each in dumps)
        assert first == again and first not in others
    greedy = [
        made(folder, tmp_path / f"{e}.jsonl", "--engine", e, "--temperature", "0")
        for e in ("generate", "generate_batch")
    ]
    assert [s.token_ids.tolist() for s in greedy[0]] == [s.token_ids.tolist() for s in greedy[1]]


@pytest.mark.parametrize("engine", ["generate", "generate_batch"])
def test_attribution_names_the_transform_that_was_left_out_and_else_rounding(engine, folder, tmp_path):
    file, out = tmp_path / "dump.jsonl", tmp_path / "out.json"
    made(folder, file, "--engine", engine, *SAMPLING)
    options = ["attribute", "--dump", str(file), "--model", str(folder / "model"), "--no-decode", "--json", str(out)]
    options += ["--limit", "2"]
    assert verify(options) == 1
    found = json.loads(out.read_text())
    assert found["explained"] and found["base"]["mean_abs"] < 1e-5
    assert [cause["kind"] for cause in found["causes"]] in ([], ["numerics"])
    if engine == "generate_batch":
        return
    # the same dump, taken as raw: it says what it really is
    assert verify([*options, "--raw"]) == 1
    found = json.loads(out.read_text())
    assert found["base"]["mean_abs"] > 0.1 and found["rest"]["mean_abs"] < 1e-5
    assert found["causes"][0]["name"] in ("processed", "raw", "temperature", "top_p")


def test_what_ends_a_response_and_the_padding_behind_it(folder, tmp_path, monkeypatch):
    """An end that comes soon: half of the vocabulary."""
    monkeypatch.setattr("rlalign.cli.dump_transformers._eos", lambda _model: list(range(48)))
    file = tmp_path / "dump.jsonl"
    given = ["--model", str(folder / "model"), "--prompts", str(folder / "prompts.jsonl"), "--out", str(file)]
    assert dump([*given, "--max-tokens", "12", "--temperature", "1.5"]) == 0
    sequences = list(read_dump(file))
    for s in sequences:
        assert (s.token_ids[:-1] >= 48).all() and np.isfinite(s.logprobs).all()
        assert s.finish_reason == ("stop" if s.token_ids[-1] < 48 else "length")
    assert len({len(s.token_ids) for s in sequences}) > 1
    found = verdict(folder, file, tmp_path / "out.json", "--max-abs", "1e-4")
    assert found["exit_code"] == 0 and not math.isnan(found["metrics"]["align/k3"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "generate_batch", "--raw"], "--raw: generate_batch reports log-probs after all transforms only"),
        (["--engine", "generate_batch", "--min-p", "0.1"], "--min-p: generate_batch has no such transform"),
        (["--out", "dump.txt"], "a dump is written as"),
        (["--top-p", "0"], "top_p"),
        (["--model", "/nowhere"], "/nowhere"),
    ],
)
def test_unusable_settings_are_one_line(options, message, folder, tmp_path, capsys):
    given = [
        "--model",
        str(folder / "model"),
        "--prompts",
        str(folder / "prompts.jsonl"),
        "--out",
        str(tmp_path / "d.jsonl"),
    ]
    assert dump([*given, *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
