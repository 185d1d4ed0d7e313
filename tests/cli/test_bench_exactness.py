"""The exactness benchmark: every axis is really moved, agreement is measured, and disagreement is seen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rlalign.cli import bench_exactness
from rlalign.cli.bench_exactness import Bench, make_prompts, measure
from rlalign.config import ModelConfig
from rlalign.modeling import load_policy, make_tiny_model
from rlalign.tasks.sort import make_sort_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    config = ModelConfig(hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=64)
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("policy", 0), ("other", 1)):
        make_tiny_model(config, make_sort_tokenizer(max_value=99), root / name, seed=seed)
    return [root / "policy", root / "policy", root / "other"]


def bench(folders: list[Path], count: int, **settings: str) -> Bench:
    policies = [load_policy(folder, **settings) for folder in folders]
    return Bench(*policies, make_prompts(policies[0].vocab_size, count))


def test_no_axis_moves_a_bit(folders: list[Path]) -> None:
    records = measure(bench(folders, 12), "invariant", "float32")
    assert len(records) == 13
    for record in records:
        assert record["tokens"] == 12 * 32
        assert (record["mismatch_count"], record["logp_abs_diff_max"]) == (0, 0.0), record
        assert record["responses_changed"] in (0, None), record


def test_other_weights_are_seen(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_exactness, "axes", lambda axes=bench_exactness.axes: axes()[:1])
    mixed = bench(folders, 3)
    [record] = measure(replace(mixed, train=mixed.other), "invariant", "float32")
    assert record["mismatch_count"] > 0


def test_axes_that_were_not_moved_are_an_error(folders: list[Path]) -> None:
    with pytest.raises(RuntimeError, match="nothing was preempted"):
        measure(bench(folders, 2), "invariant", "float32")


def test_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = ModelConfig(hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=64)
    monkeypatch.setattr(bench_exactness, "_MODEL", tiny)
    monkeypatch.setattr(bench_exactness, "axes", lambda axes=bench_exactness.axes: axes()[:2])
    output = tmp_path / "out" / "exactness.json"
    assert bench_exactness.main(["--prompts", "3", "--output", str(output)]) == 0
    written = json.loads(output.read_text())
    assert {r["impl"] for r in written["records"]} == {"invariant", "native"}
    assert {r["dtype"] for r in written["records"]} == {"float32", "bfloat16"}
    assert {"machine", "threads", "torch", "commit", "date"} <= set(written["meta"])
