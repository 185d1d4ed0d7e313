"""scripts/plot_gap.py, as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlalign.cli.plot_gap import main, read_steps
from rlalign.dashboards import MetricsFile


def run(folder: Path, numerics: str, gaps: list[float]) -> Path:
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"numerics": numerics}))
    file = MetricsFile(folder / "metrics.jsonl")
    file.log(0, {"eval/accuracy": 0.5})  # a line of another kind
    for step, gap in enumerate(gaps, start=1):
        match = float(gap == 0)
        file.log(step, {"align/bitwise_match_frac": match, "align/logp_abs_diff/max": gap, "align/logp_abs_diff/mean": gap / 5})  # fmt: skip  # noqa: E501
    file.close()
    return folder


def test_draws_every_run(tmp_path):
    runs = [run(tmp_path / "a", "invariant", [0.0, 0.0]), run(tmp_path / "b", "native", [0.02, 0.3])]
    one, two = tmp_path / "one.svg", tmp_path / "two.svg"
    assert main([str(runs[0]), "--output", str(one)]) == 0
    assert main([*map(str, runs), "--output", str(two)]) == 0
    assert one.read_text() != two.read_text()
    numerics, rows = read_steps(runs[1])
    assert numerics == "native" and [row["step"] for row in rows] == [1, 2]


@pytest.mark.parametrize("missing", ["summary.json", "metrics.jsonl"])
def test_what_is_no_finished_run_is_refused(missing, tmp_path, capsys):
    folder = run(tmp_path / "a", "native", [0.1])
    (folder / missing).unlink()
    assert main([str(folder), "--output", str(tmp_path / "gap.svg")]) == 2
    assert missing in capsys.readouterr().err
    assert not (tmp_path / "gap.svg").exists()
