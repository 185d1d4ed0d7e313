"""``experiment=one_gpu`` through Ray, with fewer layers and steps: both actors on one GPU, and what native shows."""

from __future__ import annotations

import grpo
import pytest
from support.one_gpu import ROOT, one_gpu, questions
from support.runs import summary

from rlalign.dashboards.jsonl import read_metrics

SMALLER = (
    "model.num_layers=4", "sampling.max_tokens=48", "algorithm.prompts_per_step=4", "engine.num_pages=128",
    "eval.num_prompts=1", "run.steps=3", "tracking=none",
)  # fmt: skip


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("numerics", "transport"), [("invariant", "cuda_ipc"), ("native", "object_store")])
def test_both_actors_share_a_gpu(numerics, transport, shared_ray, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # the reward's path is from there
    path = questions(tmp_path / "train.jsonl", 40)
    # auto takes the GPU's memory
    way = f"cluster.weight_transport={'auto' if transport == 'cuda_ipc' else transport}"
    grpo.train(one_gpu(*SMALLER, way, f"numerics={numerics}", f"task.path={path}", f"run.dir={tmp_path / 'run'}"))
    found = summary(tmp_path / "run")
    assert found["status"] == "finished" and found["plan"]["device"] == "cuda"
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "grad_norm" in row]
    assert len(rows) == 3
    assert all(row["grad_norm"] > 0 and row["reward/std"] > 0 and row["align/weights_equal"] == 1 for row in rows)
    assert all(row["weights_changed_frac"] > 0 for row in rows)
    assert found["tokens"] > 1000
    assert found["weight_transport"] == transport
    replayed = sum(row["perf/engine/graph_steps"] for row in rows)
    assert replayed > 0 if numerics == "invariant" else replayed == 0
    if numerics == "native":
        assert found["mismatch_count"] > 0
        return
    assert found["plan"]["backend"] == "triton"
    assert found["mismatch_count"] == 0 and found["logp_abs_diff_max"] == 0.0
    assert any(name.startswith("sweep,linear,") and holds for name, holds in found["schedules"].items())
