"""Whole runs, small enough for a test: one layer, two steps, a Ray that all of them share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlalign.config import Config, config_from_dict

_TINY: dict[str, dict[str, Any]] = {
    "model": {
        "hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "intermediate_size": 48,
        "max_position_embeddings": 64, "warm_start_steps": 3, "warm_start_batch": 8,
    },
    # the task's own reward would be 0 for every sample, so that no gradient and no weight ever changed
    "task": {"num_train": 64, "num_eval": 8, "reward": f"{Path(__file__).parent / 'rewards.py'}:digit_sum"},
    "sampling": {"max_tokens": 8},
    "algorithm": {"group_size": 4, "prompts_per_step": 4},
    "engine": {"num_pages": 64},
    "cluster": {"threads": 1, "device": "cpu"},
    "tracking": {"mode": "disabled"},
    "eval": {"num_prompts": 8},
    "run": {"steps": 3, "save_every": 2},
}  # fmt: skip


def tiny_run(folder: Path, **sections: dict[str, Any]) -> Config:
    """Settings of a run in ``folder``, with some changed: ``tiny_run(folder, run={"steps": 1})``."""
    values = {name: {**_TINY.get(name, {}), **sections.get(name, {})} for name in {*_TINY, *sections}}
    numerics = values.pop("numerics", {}).get("numerics", "invariant")
    values["run"] = {"dir": str(folder), **values["run"]}
    return config_from_dict({"numerics": numerics, **values})


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())
