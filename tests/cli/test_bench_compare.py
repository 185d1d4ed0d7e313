from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlalign.cli.bench_compare import main


def test_a_small_measurement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    assert main(["--tokens", "1000", "--format", "parquet", "--dir", str(tmp_path), "--output", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert [(row["format"], row["shuffled"], row["tokens"]) for row in rows] == [
        ("parquet", False, 1000), ("parquet", True, 1000)
    ]  # fmt: skip
    assert all(row["seconds"] > 0 and row["peak_mib"] > 1 for row in rows)
    assert capsys.readouterr().out.splitlines()[1].startswith("parquet  same")
    assert list(tmp_path.iterdir()) == [out]
