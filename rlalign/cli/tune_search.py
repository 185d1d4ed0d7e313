"""The search for a bucket's schedule: all candidates once, the best few in turns, and the winner's bits proven."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rlalign.cli.bench_kernels import Case
from rlalign.cli.tune_problems import Bucket, Problem

# Milliseconds of every round by implementation; what can't run is noted in the case.
Measure = Callable[[Case, int], dict[str, list[float]]]

_DEFAULT = "default"
_FINALISTS = 4
# A schedule that gains less than this is not worth an entry.
_MIN_GAIN = 0.02
_GRAPHED_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Found:
    """What a bucket's search came to. default: what runs at its last row count without a table. tile: None where that
    stays. ratio: time over the default's, the geometric mean over ``bucket.measured``. refused: of candidates whose
    bits differ, what differs: never to be seen."""

    problem: str
    bucket: Bucket
    num_candidates: int
    default: Any
    tile: Any = None
    ratio: float = 1.0
    ms: dict[int, float] = field(default_factory=dict)
    default_ms: dict[int, float] = field(default_factory=dict)
    refused: tuple[str, ...] = ()


def search(problem: Problem, bucket: Bucket, measure: Measure, rounds: int) -> Found:
    """The fastest schedule of ``problem`` in ``bucket`` with the default's bits."""
    default = problem.default(bucket.last)
    tiles = {str(tile): tile for tile in problem.candidates(bucket.last) if tile != default}
    screened = _times(problem, tiles, bucket.last, measure, 1)
    finalists = sorted((name for name in screened if name != _DEFAULT), key=screened.__getitem__)[:_FINALISTS]
    chosen = {name: tiles[name] for name in finalists}
    times = {num_rows: _times(problem, chosen, num_rows, measure, rounds) for num_rows in bucket.measured}
    default_ms = {num_rows: found[_DEFAULT] for num_rows, found in times.items()}
    ratios = {
        name: [found[name] / found[_DEFAULT] for found in times.values()]
        for name in finalists
        if all(name in found for found in times.values())
    }
    refused: list[str] = []
    for name in sorted(ratios, key=lambda name: statistics.geometric_mean(ratios[name])):
        ratio = statistics.geometric_mean(ratios[name])
        if ratio > 1 - _MIN_GAIN:
            break
        if max(ratios[name]) > 1:
            continue
        differing = [found for n in bucket.proven if (found := problem.differs(tiles[name], n)) is not None]
        if differing:
            refused.append(differing[0])
            continue
        ms = {num_rows: found[name] for num_rows, found in times.items()}
        return Found(problem.name, bucket, len(tiles), default, tiles[name], ratio, ms, default_ms, tuple(refused))
    return Found(problem.name, bucket, len(tiles), default, default_ms=default_ms, refused=tuple(refused))


def _times(problem: Problem, tiles: dict[str, Any], num_rows: int, measure: Measure, rounds: int) -> dict[str, float]:
    """Median milliseconds by candidate, the default among them, in turns; without those that can't run here."""
    calls = {_DEFAULT: problem.call(problem.default(num_rows), num_rows)}
    calls |= {name: problem.call(tile, num_rows) for name, tile in tiles.items()}
    case = Case(f"{problem.name}, M {num_rows}", _DEFAULT, calls, graphed=num_rows <= _GRAPHED_ROWS)
    found = measure(case, rounds)
    if _DEFAULT not in found:
        raise RuntimeError(f"{case.name}: the default schedule can't run here: {case.refused[_DEFAULT]}")
    return {name: statistics.median(values) for name, values in found.items()}
