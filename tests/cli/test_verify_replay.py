"""``rlalign-verify replay``: steps as a run keeps them, with faults on either side, computed once more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.pages import parse

from rlalign.cli.rescoring import rescore
from rlalign.cli.verify import main
from rlalign.config import Config, ModelConfig, SamplingParams, config_from_dict
from rlalign.engine import Engine
from rlalign.modeling import load_policy, load_tokenizer, make_tiny_model
from rlalign.records import Prompt, Sample, derive_seed
from rlalign.run.mismatch import write_mismatch
from rlalign.tasks.sort import make_sort_tokenizer
from rlalign.verifier.dumps import read_dump

TINY = ModelConfig(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=32,
                   max_position_embeddings=64)  # fmt: skip
CONFIG = config_from_dict({"cluster": {"threads": 1, "device": "cpu"}, "engine": {"num_pages": 64}})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_tiny_model(TINY, make_sort_tokenizer(max_value=9), path, seed=0)
    return path


@pytest.fixture(scope="module")
def step(model: Path) -> tuple[list[Sample], list[np.ndarray]]:
    """Samples of three prompts, two each, and their train log-probs; the two sides agree."""
    policy = load_policy(model, dtype="float32", numerics="invariant", device="cpu")
    params = [SamplingParams(n=2, max_tokens=8, top_p=0.9, stop=("9 9 9",), seed=derive_seed(7, p)) for p in range(3)]
    prompts = [Prompt(p, np.arange(3, 8 + p), "", "") for p in range(3)]
    groups = Engine(policy, load_tokenizer(model)).generate([p.token_ids.tolist() for p in prompts], params)
    samples = [Sample(4, *rest) for prompt, group, p in zip(prompts, groups, params, strict=True)
               for rest in ((prompt, one, p) for one in group)]  # fmt: skip
    return samples, rescore(policy, samples, micro_batch_tokens=64)


def keep(
    folder: Path,
    model: Path,
    samples: list[Sample],
    train: list[np.ndarray],
    *,
    synced: str = "",
    config: Config = CONFIG,
) -> Path:
    def save(path: Path) -> Mapping[str, Any]:
        shutil.copytree(model, path)
        sha256 = load_policy(model, dtype="float32", numerics="invariant", device="cpu").weights_hash()
        return {"version": 3, "sha256": sha256, "synced_sha256": synced or sha256}

    return write_mismatch(folder, samples, train, verdict="they differ", config=config, plan={}, save_weights=save)


def shifted(values: np.ndarray, at: int = 1) -> np.ndarray:
    return values + np.where(np.arange(len(values)) == at, np.float32(0.25), np.float32(0))


def faulty_rollout(samples: list[Sample]) -> list[Sample]:
    one = samples[2]
    broken = replace(one, completion=replace(one.completion, logprobs=shifted(one.completion.logprobs)))
    return [*samples[:2], broken, *samples[3:]]


def result_of(path: Path, tmp_path: Path, *more: str) -> dict[str, Any]:
    code = main(["replay", str(path), "--json", str(tmp_path / "out.json"), *more])
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["exit_code"] == code
    return result


def test_a_fault_of_the_rollout_is_named(model: Path, step: Any, tmp_path: Path) -> None:
    samples, train = step
    result = result_of(keep(tmp_path / "step", model, faulty_rollout(samples), train), tmp_path)
    assert "the fault was the rollout's" in result["verdict"]
    counts = [one["mismatch_count"] for one in result["comparisons"].values()]
    assert (counts, result["exit_code"]) == ([1, 1, 0, 0], 0)
    assert result["worst_tokens"][0]["key"] == "4/1/0"
    assert abs(result["worst_tokens"][0]["delta"] + 0.25) < 1e-6


def test_a_fault_of_the_trainer_is_named(model: Path, step: Any, tmp_path: Path) -> None:
    samples, train = step
    result = result_of(keep(tmp_path / "step", model, samples, [shifted(train[0]), *train[1:]]).parent, tmp_path)
    assert "the fault was the trainer's" in result["verdict"]
    assert [one["mismatch_count"] for one in result["comparisons"].values()] == [1, 0, 1, 0]


def test_other_weights_are_named(model: Path, step: Any, tmp_path: Path) -> None:
    samples, train = step
    path = keep(tmp_path / "step", model, faulty_rollout(samples), train, synced="f" * 64)
    assert "weights were not those that the engines were given" in result_of(path, tmp_path)["verdict"]


def test_what_differs_again_exits_1(model: Path, step: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, train = step

    def trainer(policy: Any, samples: Any, **settings: Any) -> list[np.ndarray]:
        return [shifted(values) for values in rescore(policy, samples, **settings)]

    path = keep(tmp_path / "step", model, samples, [shifted(values) for values in train])
    monkeypatch.setattr("rlalign.cli.rescoring.rescore", trainer)
    result = result_of(path, tmp_path)
    assert result["exit_code"] == 1
    assert result["verdict"].startswith("reproduced: both sides give what they gave")


def test_weights_by_hand_and_a_page(model: Path, step: Any, tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="HTML reports need plotly, the extra 'report'")
    samples, train = step
    path = write_mismatch(tmp_path / "step", faulty_rollout(samples), train, verdict="v", config=CONFIG, plan={})
    assert main(["replay", str(path)]) == 2
    assert result_of(path, tmp_path, "--model", str(model), "--html", str(tmp_path / "page.html"))["exit_code"] == 0
    assert {"then and now", "worst tokens", "along the worst sequence"} <= set(parse(tmp_path / "page.html").titles)


def test_the_kept_step_is_a_dump_too(model: Path, step: Any, tmp_path: Path) -> None:
    samples, train = step
    folder = keep(tmp_path / "step", model, faulty_rollout(samples), train).parent
    assert main(["compare", str(folder / "rollout.jsonl"), str(folder / "train.jsonl")]) == 1
    back = list(read_dump(folder / "train.jsonl"))
    assert all(np.array_equal(a.logprobs.view(np.int32), b.view(np.int32)) for a, b in zip(back, train, strict=True))


@pytest.mark.parametrize(("change", "message"), [
    ({"format": 9}, "field 'format' is 9"),
    ({"samples": []}, "0 samples, but 6 and 6 sequences"),
    ({"verdict": None, "config": {"numerics": "x"}}, "numerics"),
])  # fmt: skip
def test_unusable_files_exit_2_in_one_line(
    model: Path, step: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    path = keep(tmp_path / "step", model, *step)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert main(["replay", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path}") and said.count("\n") == 1 and message in said


def edit_line(side: str, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / f"{side}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))

    return edit


def edit_json(*keys: Any, value: Any = None) -> Callable[[Path], None]:
    """Another value, or none at all, in replay.json."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / "replay.json").read_text())
        *parents, last = keys
        target = content
        for key in parents:
            target = target[key]
        if value is None:
            del target[last]
        else:
            target[last] = value
        (folder / "replay.json").write_text(json.dumps(content))

    return edit


def cut(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"token_ids": row["token_ids"][:-1], "logprobs": row["logprobs"][:-1]}


@pytest.mark.parametrize(("edit", "message"), [
    (edit_line("train", lambda rows: rows[::-1]), "train.jsonl:1 (id '4/2/1') are not the same sequence"),
    (edit_line("train", lambda rows: [cut(rows[0]), *rows[1:]]), "are not the same sequence"),
    (edit_line("rollout", lambda rows: [rows[0] | {"prompt_token_ids": [3]}, *rows[1:]]), "not the same sequence"),
    (edit_json("weights", "synced_sha256"), "field 'synced_sha256' is missing"),
    (edit_json("samples", 1, "sample", value=7), "sample '4/0/1' is not sample 7 of 2 of '4/0/7'"),
    (edit_json("samples", 1, "prompt_id", value="x"), "sample '4/0/1' is not sample 1 of 2 of '4/x/1'"),
    (edit_json("samples", 1, "sampling", "temperature", value=-1), "temperature=-1: Input should be greater"),
    (edit_json("plan", value=[1]), "not a step that a run kept"),
    (lambda folder: shutil.rmtree(folder / "weights"), "give those that sampled with --model DIR"),
])  # fmt: skip
def test_an_edited_step_exits_2_and_says_what_is_wrong(
    model: Path, step: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], edit: Any, message: str
) -> None:
    path = keep(tmp_path / "step", model, *step)
    edit(path.parent)
    assert main(["replay", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path}: ") and said.count("\n") == 1 and message in said


def test_a_moved_step_is_the_same(model: Path, step: Any, tmp_path: Path) -> None:
    samples, train = step
    folder = keep(tmp_path / "step", model, faulty_rollout(samples), train).parent
    moved = shutil.move(folder, tmp_path / "elsewhere")
    assert "the fault was the rollout's" in result_of(moved, tmp_path)["verdict"]


def test_a_step_whose_sampled_tokens_agreed_says_that_the_rest_is_not_replayed(
    model: Path, step: Any, tmp_path: Path
) -> None:
    result = result_of(keep(tmp_path / "step", model, *step), tmp_path)
    assert result["exit_code"] == 0
    assert "all sampled tokens agreed then; what differed is beyond them" in "".join(result["remarks"])


def test_nothing_compared_exits_2(model: Path, step: Any, tmp_path: Path) -> None:
    """Weights by which every sample gets other tokens: the sides now have nothing in common with then."""
    samples, train = step
    other = [(s.completion.token_ids + 1) % 10 for s in samples]
    changed = [
        replace(s, completion=replace(s.completion, token_ids=ids)) for s, ids in zip(samples, other, strict=True)
    ]
    result = result_of(keep(tmp_path / "step", model, changed, train), tmp_path)
    assert result["exit_code"] == 2
    assert result["verdict"].endswith("now nothing was compared: no sample has the same tokens")


def test_a_missing_file_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(tmp_path / "none.json")]) == 2
    assert "no such file" in capsys.readouterr().err
