"""Every key that a run logs is on docs/metrics.md, by its name or as one of a brace's."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import grpo
import ppo
import pytest
from support.runs import tiny_run

from rlalign.dashboards.jsonl import read_metrics

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def names_on_the_page() -> set[str]:
    """``a/{b,c}`` stands for two names; ``a/*`` for none, since it explains nothing."""
    names: set[str] = set()
    for quoted in re.findall(r"`([^`\n]+)`", PAGE.read_text(encoding="utf-8")):
        parts = [part.split(",") for part in re.split(r"[{}]", quoted)]
        names.update("".join(chosen) for chosen in product(*parts))
    return names


def logged_names(folder: Path) -> set[str]:
    return {name for row in read_metrics(folder / "metrics.jsonl") for name in row}


def test_braces_are_expanded_and_stars_are_not() -> None:
    names = names_on_the_page()
    assert {"align/ppl/train", "align/ppl/rollout", "perf/seconds/sync"} <= names
    assert "align/ppl/ration" not in names and "perf/engine/no_such" not in names


def test_every_key_of_a_grpo_run(plain_run: Path) -> None:
    logged = logged_names(plain_run)
    assert logged - names_on_the_page() == set()
    assert {"perf/engine/cache_use_peak", "align/mismatch_count", "reward/mean", "eval/accuracy"} <= logged
    assert "reward/no_signal_frac" in logged
    assert "perf/mfu" not in logged  # of a CPU nothing is known


@pytest.mark.parametrize(
    ("recipe", "algorithm", "expected"),
    [
        (grpo, {"kl_coef": 0.1, "epochs": 2, "minibatches": 2}, "kl_ref"),
        (ppo, {"adv_estimator": "gae", "epochs": 2, "minibatches": 2, "kl_coef": 0.1}, "critic/value"),
    ],
    ids=["grpo-with-reference", "ppo"],
)
def test_every_key_of_other_runs(recipe, algorithm, expected, shared_ray, tmp_path: Path) -> None:
    recipe.train(tiny_run(tmp_path, algorithm=algorithm, run={"steps": 1}, cluster={"peak_tflops": 0.05}))
    logged = logged_names(tmp_path)
    assert logged - names_on_the_page() == set()
    assert {expected, "perf/mfu"} <= logged
    assert all(0 < row["perf/mfu"] < 1 for row in read_metrics(tmp_path / "metrics.jsonl") if "perf/mfu" in row)
