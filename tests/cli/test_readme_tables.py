"""README's numbers are those that the benchmarks wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlalign.cli.readme_tables import ROOT, pages, rendered

META = {
    "machine": "a machine",
    "threads": 1,
    "torch": "2.13.0",
    "date": "2026-11-21T10:00:00",
    "commit": "0123456789abc",
}


def test_pages_are_what_the_results_say() -> None:
    assert (ROOT / "README.md").read_text(encoding="utf-8").count("<!-- table ") >= 2
    for page in pages():
        text = page.read_text(encoding="utf-8")
        assert rendered(text) == text, f"{page}: run python scripts/readme_tables.py"


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


def test_one_file_can_have_several_tables(tmp_path: Path) -> None:
    meta = META | {"gpu": "a GPU", "driver": "580", "triton": "3.6.0"}
    records = [
        {"case": "N 8, K 4, M 1", "impl": "cublas", "baseline": "cublas", "ratio": 1.0, "table": "forward"},
        {"case": "N 8, K 4, M 1", "impl": "rlalign", "baseline": "cublas", "ratio": 0.934, "table": "forward"},
        {"case": "N 8, K 4, M 64", "impl": "rlalign", "baseline": "cublas", "ratio": 1.06, "table": "forward"},
        {"case": "N 9, K 4, M 64", "impl": "rlalign", "baseline": "cublas", "ratio": 1.2, "table": "forward"},
        {"case": "loss", "impl": "torch", "baseline": "torch", "ratio": 1.0, "ms": 15.2, "table": "score"},
        {"case": "loss", "impl": "rlalign", "baseline": "torch", "ratio": 0.5, "ms": 7.6, "table": "score",
         "extra_mib": 1234.5},
    ]  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps({"meta": meta, "records": records}))
    grid = rendered("<!-- table grid a.json:forward -->\n<!-- /table -->\n", tmp_path)
    assert "| case | implementation | M 1 | M 64 |" in grid
    assert "| N 8, K 4 | rlalign | 0.93 | 1.06 |" in grid
    assert "| N 9, K 4 | rlalign | – | 1.20 |" in grid
    assert "Time over that of cublas." in grid and "loss" not in grid
    times = rendered("<!-- table times a.json:score -->\n<!-- /table -->\n", tmp_path)
    assert "| loss | 15.20 ms | 7.60 ms, 1,234 MiB | 0.50 |" in times and "N 8" not in times
    with pytest.raises(ValueError, match="has no table 'backward'; its tables are forward, score"):
        rendered("<!-- table grid a.json:backward -->\n<!-- /table -->\n", tmp_path)
