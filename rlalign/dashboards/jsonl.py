"""``metrics.jsonl``: one line per step, strict JSON, complete after every line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlalign.dashboards.panels import STEP


class MetricsFile:
    """Appends one line per call. Numbers that JSON has no word for are the strings NaN, Infinity and -Infinity."""

    def __init__(self, path: Path, *, first_step: int = 0) -> None:
        """``first_step``: of this run; a resumed one keeps the earlier lines of the file and drops the rest."""
        self.path = Path(path)
        kept = [line for line in _lines(self.path) if _step(line) < first_step]
        self.path.write_text("".join(kept), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write one line, ``step`` first, and flush it."""
        row = {STEP: step, **{name: to_json(value) for name, value in metrics.items()}}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def to_json(value: Any) -> Any:
    """``value`` with the floats that strict JSON has no word for as strings, in dicts and lists too."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {name: to_json(inner) for name, inner in value.items()}
    return [to_json(inner) for inner in value] if isinstance(value, list | tuple) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics file, with NaN and infinities back as floats. A torn last line is left out."""
    return [{name: _number(value) for name, value in json.loads(line).items()} for line in _lines(Path(path))]


def _lines(path: Path) -> list[str]:
    """Complete lines, each with its newline."""
    if not path.is_file():
        return []
    # a run that was killed while writing leaves a line without its newline
    return [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]


def _step(line: str) -> int:
    return int(json.loads(line)[STEP])


def _number(value: Any) -> Any:
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value
