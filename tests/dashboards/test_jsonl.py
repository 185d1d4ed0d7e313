from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rlalign.dashboards.jsonl import MetricsFile, read_metrics


def refuse(constant: str) -> float:
    raise AssertionError(f"{constant} is not strict JSON")


def test_each_line_is_strict_json_and_on_disk_at_once(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    file.log(0, {"a": 1.5, "b": float("inf"), "c": float("nan"), "d": -math.inf, "e": "text", "f": 3})
    lines = (tmp_path / "m.jsonl").read_text().splitlines()
    assert [list(json.loads(line, parse_constant=refuse)) for line in lines] == [["step", "a", "b", "c", "d", "e", "f"]]
    file.close()


def test_numbers_come_back_bit_for_bit(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    file.log(3, {"a": 0.1 + 0.2, "b": math.inf, "c": math.nan, "d": "NaNa"})
    file.close()
    (row,) = read_metrics(tmp_path / "m.jsonl")
    assert (row["step"], row["a"], row["b"], row["d"]) == (3, 0.1 + 0.2, math.inf, "NaNa")
    assert math.isnan(row["c"])


def test_a_resumed_run_keeps_what_came_before_it(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    first = MetricsFile(path)
    for step in range(5):
        first.log(step, {"a": float(step)})
    first.close()
    with path.open("a") as torn:
        torn.write('{"step": 5, "a"')
    resumed = MetricsFile(path, first_step=3)
    resumed.log(3, {"a": 30.0})
    resumed.close()
    assert [(row["step"], row["a"]) for row in read_metrics(path)] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_fresh_run_starts_an_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0}\n')
    MetricsFile(path).close()
    assert read_metrics(path) == []


def test_what_json_cannot_hold_is_an_error_not_a_guess(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    with pytest.raises(TypeError):
        file.log(0, {"a": object()})
    file.close()
