"""README's numbers are those that the benchmarks wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlalign.cli.readme_tables import ROOT, rendered

META = {
    "machine": "a machine",
    "threads": 1,
    "torch": "2.13.0",
    "date": "2026-11-21T10:00:00",
    "commit": "0123456789abc",
}


def test_readme_is_what_the_results_say() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("<!-- table ") >= 2
    assert rendered(text) == text, "run: python scripts/readme_tables.py"


def test_a_table_follows_its_file(tmp_path: Path) -> None:
    records = [
        {"case": "rollout", "impl": "native", "tokens_per_s": 1500.0, "ratio": 1.0},
        {"case": "rollout", "impl": "invariant", "tokens_per_s": 1200.0, "ratio": 1.25},
    ]
    (tmp_path / "speed.json").write_text(json.dumps({"meta": META, "records": records}))
    text = "before\n<!-- table speed speed.json -->\nold numbers\n<!-- /table -->\nafter\n"
    made = rendered(text, tmp_path)
    assert "| rollout | 1,500 | 1,200 | 1.25 |" in made
    assert "old numbers" not in made
    assert made.startswith("before\n")
    assert made.endswith("<!-- /table -->\nafter\n")
    assert rendered(made, tmp_path) == made
    with pytest.raises(ValueError, match="unknown kind 'prose'"):
        rendered("<!-- table prose speed.json -->\n<!-- /table -->", tmp_path)


def test_kernels_stand_beside_whatever_ran(tmp_path: Path) -> None:
    host = {"host time, decode": {"torch sdpa": 20.4, "rlalign": 30.6}}
    meta = META | {"gpu": "a GPU", "driver": "580", "triton": "3.6.0", "host_us": host}
    records = [
        {"case": "forward", "impl": "cudnn", "tflops": 500.0, "ratio": 1.0, "baseline": "cudnn"},
        {"case": "forward", "impl": "rlalign", "tflops": 480.0, "ratio": 1.042, "baseline": "cudnn"},
        {"case": "ragged", "impl": "flash", "tbps": 2.0, "ratio": 1.0, "baseline": "flash"},
        {"case": "ragged", "impl": "rlalign", "tbps": 2.5, "ratio": 0.8, "baseline": "flash"},
    ]
    (tmp_path / "a.json").write_text(json.dumps({"meta": meta, "records": records}))
    made = rendered("<!-- table kernels a.json -->\n<!-- /table -->\n", tmp_path)
    assert "| forward | 500 TFLOP/s | – | 480 TFLOP/s | 1.04 |" in made
    assert "| ragged | – | 2.00 TB/s | 2.50 TB/s | 0.80 (flash) |" in made
    assert "Host time, decode: torch sdpa 20 µs, rlalign 31 µs." in made
    assert "a GPU, driver 580" in made
