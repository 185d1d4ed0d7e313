from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from matplotlib.figure import Figure

from rlalign.config import Correction
from rlalign.dashboards import WandbSink
from rlalign.dashboards.heat_map import draw_heat_map
from rlalign.dashboards.panels import PANELS, Section, definitions, panel_of
from rlalign.dashboards.pictures import (
    PictureData,
    chosen_points,
    draw_histogram,
    draw_scatter,
    histogram,
    table_rows,
    to_image,
)
from rlalign.dashboards.snapshot import LayerRow, PositionRow
from rlalign.verifier.compare import LogprobPair, compare
from rlalign.verifier.metrics import Provenance, align_metrics


def data(rollout: np.ndarray, train: np.ndarray) -> PictureData:
    delta = train - rollout
    return PictureData(rollout, train, delta, ~np.isfinite(delta), [])


def test_every_align_metric_has_a_panel() -> None:
    one = np.float32([-1.0, -2.0])
    known = Provenance(trainer_version=1, weights_equal=True, weights_version=1, correction=Correction(2.0))
    names = align_metrics(compare([LogprobPair(one, one, 2)]), advantages=[one], provenance=known)
    assert {name: panel_of(name) for name in names if panel_of(name) is None} == {}
    assert len(names) == 35


def test_every_metric_of_the_docs_has_a_panel() -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    tables = page[page.index("## `align/*`") : page.index("## Reading a difference")]
    cells = re.findall(r"^\| (`[^|]+`) \|", tables, re.MULTILINE)
    names = [name for cell in cells for quoted in re.findall(r"`([^`]+)`", cell) for name in expanded(quoted)]
    assert len(names) > 90
    assert [name for name in names if name != "step" and panel_of(name) is None] == []


def expanded(name: str) -> list[str]:
    """``a/{b,c}`` as ``a/b`` and ``a/c``."""
    head, *choices = re.split(r"[{}]", name)
    return [head + choice for choice in choices[0].split(",")] if choices else [head]


@pytest.mark.parametrize(("metric", "section", "title"), [
    ("align/logp_abs_diff/max", "Agreement", "largest difference"),
    ("align/logp_abs_diff/p99", "Where", "spread"),
    ("where/prob_scatter", "Where", "pictures"),
    ("align/k3_max", "Policy", "divergence"),
    ("perf/rollout_tokens_per_s", "Performance", "tokens per second"),
    ("reward/mean", "Reward", "reward"),
])  # fmt: skip
def test_exact_names_win_over_prefixes(metric: str, section: str, title: str) -> None:
    panel = panel_of(metric)
    assert panel is not None
    assert (panel.section, panel.title) == (section, title)


def test_unknown_metrics_have_no_panel() -> None:
    assert panel_of("nonsense") is None


def test_sections_come_in_order_and_none_is_empty() -> None:
    seen = list(dict.fromkeys(panel.section for panel in PANELS))
    assert seen == list(get_args(Section))


def test_definitions_list_each_pattern_once_and_wandb_accepts_them() -> None:
    patterns = [pattern for pattern, _ in definitions()]
    assert len(set(patterns)) == len(patterns)
    # wandb's prefixes may only end in a star
    assert all(re.fullmatch(r"[\w/]+\*?", pattern) for pattern in patterns)
    first_prefix = next(i for i, pattern in enumerate(patterns) if pattern.endswith("*"))
    assert not any(fnmatchcase(p, "*[!*]") for p in patterns[first_prefix:])


def test_histogram_puts_every_token_in_exactly_one_bin() -> None:
    rng = np.random.default_rng(0)
    rollout = -rng.exponential(size=1000).astype(np.float32)
    train = rollout.copy()
    train[:300] *= np.float32(1) + rng.normal(size=300).astype(np.float32) * np.float32(1e-3)
    train[300] = np.nan
    train[301] -= 1e6
    picture = data(rollout, train)
    h = histogram(picture)
    assert h.nonfinite == 1
    assert h.zero == int((train == rollout).sum()) >= 698
    assert h.zero + h.nonfinite + h.counts.sum() == 1000
    assert h.counts[-1] == 1


def test_zero_is_not_the_smallest_bin() -> None:
    tiny, zero = np.float32([-1e-30]), np.float32([0.0])
    small, none = histogram(data(zero, tiny)), histogram(data(zero, zero))
    assert (small.zero, small.counts[0]) == (0, 1)
    assert (none.zero, none.counts.sum()) == (1, 0)


@pytest.mark.parametrize("count", [0, 1, 50])
@pytest.mark.parametrize("draw", [draw_histogram, draw_scatter])
def test_pictures_differ_when_the_data_do(count: int, draw: object) -> None:
    same = -np.random.default_rng(count).exponential(size=count).astype(np.float32)
    other = same - np.float32(0.5)
    equal, different = (np.asarray(to_image(draw(data(same, t), title="t"))) for t in (same, other))
    assert equal.shape == different.shape
    assert np.array_equal(equal, different) == (count == 0)


def test_scatter_colours_by_bits() -> None:
    axes = draw_scatter(data(np.float32([0.0, -1.0]), np.float32([-0.0, -1.0])), title="t").axes[0]
    assert {one.get_label(): len(one.get_offsets()) for one in axes.collections} == {"equal": 1, "different": 1}


def test_a_heat_map_names_its_columns() -> None:
    figure = draw_heat_map(np.ones((2, 3)), ["a", "b"], title="t", columns=["1", "100", "200"])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1", "100", "200"]
    many = draw_heat_map(np.ones((2, 60)), ["a", "b"], title="t", columns=[str(step) for step in range(60)])
    assert [label.get_text() for label in many.axes[0].get_xticklabels()] == [str(step) for step in range(0, 60, 5)]


def test_heat_maps_of_steps_are_labelled_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    sink, shown = WandbSink.__new__(WandbSink), []
    sink._layers = {step: LayerRow(("0", "1"), (0.0, 1.0)) for step in (200, 1, 100)}
    sink._positions = {step: PositionRow(1, np.zeros(3)) for step in (10, 1)}

    def draw(*args: object, columns: list[str], **more: object) -> Figure:
        shown.append(columns)
        return draw_heat_map(*args, columns=columns, **more)

    monkeypatch.setattr("rlalign.dashboards.sink.draw_heat_map", draw)
    assert sink._layer_map().keys() | sink._heat_map().keys() == {"where/layer_heat_map", "where/position_heat_map"}
    assert shown == [["1", "100", "200"], ["1", "10"]]


def test_scatter_keeps_the_largest_differences_when_it_thins_out() -> None:
    rollout = -np.random.default_rng(0).exponential(size=20_000).astype(np.float32)
    train = rollout.copy()
    train[[7, 19_999]] -= np.float32([1.0, 2.0])
    train[3] = np.inf
    chosen = chosen_points(data(rollout, train))
    assert len(set(chosen.tolist())) == 5000
    assert {7, 19_999} <= set(chosen.tolist())
    assert 3 not in chosen


def test_table_shows_nonfinite_numbers_as_none() -> None:
    assert table_rows([{"a": float("nan"), "b": -1.5, "c": "x"}], ("a", "c", "b")) == [[None, "x", -1.5]]
