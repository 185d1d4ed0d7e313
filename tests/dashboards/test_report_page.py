"""Snapshots, figures and the page: as data, validated by plotly itself, parsed, and opened in a browser."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support.pages import browse, parse

from rlalign.dashboards import MetricsFile, read_metrics
from rlalign.dashboards.charts import layer_figure, position_figure, scatter_figure, series_figure
from rlalign.dashboards.jsonl import to_json
from rlalign.dashboards.page import Chart, Page, Table, render
from rlalign.dashboards.pictures import PictureData, Trace
from rlalign.dashboards.run_report import read_run, run_page
from rlalign.dashboards.sink import WORST_COLUMNS
from rlalign.dashboards.snapshot import (
    MAX_BINS,
    LayerRow,
    PositionRow,
    merge_positions,
    position_row,
    snapshot_from_dict,
    snapshot_to_dict,
    take_snapshot,
)

WORST = dict(
    zip(WORST_COLUMNS, ("differs", "1/2/3", 4, 5, "a ⟦<b>⟧ & c", -1.0, -1.5, -0.5, 9, 6, 7, 8, "stop"), strict=True)
)


def data(seed: int = 0, *, count: int = 300, equal: bool = False, length: int = 20) -> PictureData:
    rng = np.random.default_rng(seed)
    rollout = -rng.exponential(size=count).astype(np.float32)
    train = rollout.copy()
    if not equal:
        train[::3] -= np.float32(1e-3)
        train[7] = np.nan
    delta = train - rollout
    trace = Trace("1/2/3", np.arange(5, 9), rollout[5:9], train[5:9], ("a", "</script>", "b", "c"))
    return PictureData(
        rollout, train, delta, ~np.isfinite(delta), [] if equal else [WORST], np.arange(count) % length, trace
    )


def test_a_snapshot_survives_its_file_bit_for_bit(tmp_path: Path) -> None:
    before = take_snapshot(data(), layers=LayerRow(("0", "1"), (0.0, math.inf)))
    file = MetricsFile(tmp_path / "pictures.jsonl")
    file.log(3, snapshot_to_dict(before))
    file.close()
    (row,) = read_metrics(tmp_path / "pictures.jsonl")
    after = snapshot_from_dict(row)
    assert (row["step"], after.num_tokens, after.worst, after.layers) == (3, 300, before.worst, before.layers)
    assert (after.histogram.zero, after.histogram.nonfinite) == (before.histogram.zero, 1)
    assert after.histogram.counts.tolist() == before.histogram.counts.tolist()
    assert np.array_equal(after.points.view(np.int32), before.points.view(np.int32))
    assert np.allclose(after.positions.max_abs, before.positions.max_abs, rtol=1e-8, equal_nan=True)
    assert after.positions.max_abs[7] == np.inf
    assert after.trace.tokens == before.trace.tokens
    assert np.array_equal(after.trace.train.view(np.int32), before.trace.train.view(np.int32))


def test_a_snapshot_is_small_whatever_the_comparison() -> None:
    many = data(count=200_000, length=30_000)
    sizes = [len(json.dumps(to_json(snapshot_to_dict(take_snapshot(many, full=full))))) for full in (False, True)]
    assert sizes[0] < 4_000
    assert sizes[1] < 100_000


def test_position_row_by_hand() -> None:
    rollout = np.float32([-1, -1, -1, -1])
    train = np.float32([-1, -1.5, -1, np.nan])
    delta = train - rollout
    row = position_row(PictureData(rollout, train, delta, ~np.isfinite(delta), [], np.array([0, 0, 2, 3])))
    assert row.width == 1
    assert str(row.max_abs.tolist()) == "[0.5, nan, 0.0, inf]"


@pytest.mark.parametrize(("longest", "width"), [(MAX_BINS, 1), (MAX_BINS + 1, 2), (1000, 8)])
def test_positions_share_bins_of_a_power_of_two(longest: int, width: int) -> None:
    row = position_row(data(count=longest, length=longest))
    assert (row.width, len(row.max_abs)) == (width, math.ceil(longest / width))


def test_rows_of_different_widths_merge_to_their_maximum() -> None:
    narrow, wide = PositionRow(1, np.array([1.0, 3.0, np.nan])), PositionRow(2, np.array([2.0, np.nan, np.inf]))
    merged = merge_positions([narrow, wide])
    assert merged.width == 2
    assert str(merged.max_abs.tolist()) == "[3.0, nan, inf]"


def test_a_snapshot_of_another_version_names_its_field() -> None:
    values = snapshot_to_dict(take_snapshot(data()))
    values["histogram"]["counts"] = [1, 2]
    with pytest.raises(ValueError, match=r"histogram\.counts.* 2 bins"):
        snapshot_from_dict(values)


def test_heat_map_tells_zero_infinite_and_absent_apart() -> None:
    rows = {step: PositionRow(1, np.array([0.0, 1e-6, np.inf, np.nan][: step + 1])) for step in (1, 2, 3)}
    heat = position_figure(rows)["data"][0]
    assert heat["x"] == [1, 2, 3]
    assert [row[2] for row in heat["z"]] == [heat["zmin"], -6.0, heat["zmax"], None]
    assert heat["zmin"] < -6 < heat["zmax"]
    assert heat["customdata"][2][2] == ["3", "inf"]


def test_many_steps_become_few_columns_without_losing_a_maximum() -> None:
    rows = {step: PositionRow(1, np.array([0.5 if step == 777 else 0.0])) for step in range(1, 1001)}
    heat = position_figure(rows)["data"][0]
    assert len(heat["x"]) <= 400
    assert [cell[0] for cell in heat["customdata"][0] if cell[1] == "0.5"] == ["775–777"]


def test_layers_keep_their_order_and_must_be_the_same() -> None:
    first = LayerRow(("embed", "0", "1"), (0.0, 0.0, 4.0))
    assert layer_figure({1: first})["data"][0]["y"] == ["embed", "0", "1"]
    with pytest.raises(ValueError, match="step 2 names other layers"):
        layer_figure({1: first, 2: LayerRow(("0",), (1.0,))})


def test_scatter_colours_by_bits() -> None:
    points = np.float32([[-1, -2, 0.0], [-1, -2.5, -0.0]])
    figure = scatter_figure(points)
    assert [(trace.get("name"), len(trace["x"])) for trace in figure["data"][1:]] == [("equal", 1), ("different", 2)]


def test_a_value_that_is_not_finite_is_shown_as_such() -> None:
    figure = series_figure({("run", "align/ulp/max"): [(1, 2.0), (2, math.inf), (3, math.nan)]})
    line, cross = figure["data"]
    assert (line["x"], line["y"]) == ([1], [2.0])
    assert (cross["x"], cross["y"], cross["text"]) == ([2, 3], [2.0, 2.0], ["inf", "nan"])


def write_run(folder: Path, *, equal: bool, steps: int = 4) -> Path:
    folder.mkdir()
    metrics, pictures = MetricsFile(folder / "metrics.jsonl"), MetricsFile(folder / "pictures.jsonl")
    for step in range(1, steps + 1):
        one = data(step, equal=equal)
        count = 0.0 if equal else 101.0
        metrics.log(step, {
            "align/mismatch_count": count, "align/nonfinite_count": 0.0 if equal else 1.0,
            "align/logp_abs_diff/max": 0.0 if equal else math.inf, "align/logp_abs_diff/mean": count / 1e5,
            "reward/mean": step / 10, "entropy": 1.0, "clip_frac": 0.0, "response_length/mean": 9.0,
            "perf/seconds/rollout": 1.0, "perf/seconds/train": 2.0, "perf/rollout_tokens_per_s": 100.0,
        })  # fmt: skip
        layers = LayerRow(("embed", "layer 0"), (0.0, 0.0 if equal else 3.0))
        pictures.log(step, snapshot_to_dict(take_snapshot(one, full=step in (1, steps), layers=layers)))
    summary = {
        "recipe": "grpo",
        "numerics": "native",
        "status": "finished",
        "logp_abs_diff_max": "Infinity",
        "steps": 4,
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    metrics.close()
    pictures.close()
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The report of one run that differs, and that of it beside one that agrees."""
    pytest.importorskip("plotly", reason="HTML reports need plotly, the extra 'report'")
    folder = tmp_path_factory.mktemp("runs")
    equal, different = (read_run(write_run(folder / name, equal=name == "same")) for name in ("same", "other"))
    paths = folder / "one.html", folder / "two.html"
    for path, runs in zip(paths, ([different], [equal, different]), strict=True):
        path.write_text(render(run_page(runs)), encoding="utf-8")
    return paths


def test_one_run_has_all_sections_and_all_pictures(pages: tuple[Path, Path]) -> None:
    page = parse(pages[0])
    assert page.sections == ["Agreement", "Where", "Policy", "Performance", "Reward"]
    assert len(page.charts) == len(page.figures)
    assert {
        "|Δ| of every token", "probability by trainer and rollout", "where in the response", "which layer",
        "along the worst sequence", "worst tokens", "seconds per phase", "reward/mean", "entropy", "clip_frac",
        "response_length/mean", "align/mismatch_count", "align/logp_abs_diff/max", "align/logp_abs_diff/mean",
    } <= set(page.titles)  # fmt: skip
    assert page.options == ["step 4", "step 1"] * 3
    assert "differ on 404 tokens (4 non-finite or missing) in 4 of 4 steps, first in step 1" in page.text
    assert "a ⟦<b>⟧ & c" in page.cells


def test_two_runs_stand_side_by_side(pages: tuple[Path, Path]) -> None:
    page = parse(pages[1])
    where = page.titles[page.titles.index("same: |Δ| of every token") :]
    assert where[1] == "other: |Δ| of every token"
    assert "same: rollout and trainer agree bit for bit in all 4 steps" in page.text
    names = {trace["name"] for figures in page.figures for trace in figures[0]["data"] if trace.get("name")}
    assert {"same", "other"} <= names


def test_the_page_asks_nothing_of_the_network(pages: tuple[Path, Path]) -> None:
    text = pages[1].read_text(encoding="utf-8")
    assert parse(pages[1]).addresses == []
    assert "default-src 'none'; script-src 'unsafe-inline'" in text[:400]


def test_plotly_accepts_every_figure(pages: tuple[Path, Path]) -> None:
    from plotly.graph_objects import Figure

    figures = [figure for page in map(parse, pages) for figures in page.figures for figure in figures]
    assert len(figures) > 30
    for figure in figures:
        Figure(figure)


def test_a_browser_draws_every_chart_without_a_word(pages: tuple[Path, Path], tmp_path: Path) -> None:
    seen = browse(pages[1], tmp_path)
    assert seen.console == []
    assert seen.drawn == len(parse(pages[1]).charts) > 15


def test_a_browser_draws_every_chart_of_a_real_run(
    plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("plotly", reason="HTML reports need plotly, the extra 'report'")
    path = tmp_path / "report.html"
    path.write_text(render(run_page([read_run(plain_run)])), encoding="utf-8")
    # so many more charts take longer; of a switch that is given twice the last one counts
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **o: run([*command, "--virtual-time-budget=20000"], **o))
    # charts are drawn as they come near the window, and this page is higher than that of a run of four numbers
    seen = browse(path, tmp_path, height=24_000)
    assert seen.console == []
    assert seen.drawn == len(parse(path).charts) > 40


def test_the_browser_would_have_said_something(tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text("<script>console.log(nothing)</script><div class='js-plotly-plot'></div>")
    seen = browse(tmp_path / "bad.html", tmp_path)
    assert "nothing is not defined" in seen.console[0]
    assert seen.drawn == 1


def test_a_cell_wraps_only_where_its_line_is_long(tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="HTML reports need plotly, the extra 'report'")
    rows = [["a b c ⟦d⟧ e f", "word " * 20, 7, None]]
    text = render(Page("t", [], Table("", ["context", "why", "num_n", "x"], rows), {}))
    assert "<th>num_<wbr>n</th>" in text
    assert '<td class="short">a b c ⟦d⟧ e f</td><td class="long">word ' in text
    assert '<td class="number">7</td><td class="short"></td>' in text
    assert "td.short { white-space: pre; }" in text


@pytest.mark.parametrize(("steps", "ticks"), [((1, 2), {"dtick": 1}), ((5,), {"dtick": 1}), ((1, 60), {})])
def test_few_steps_have_a_tick_each(steps: tuple[int, ...], ticks: dict[str, int]) -> None:
    series = series_figure({("run", "lr"): [(step, 0.0) for step in steps]})
    heat = position_figure({step: PositionRow(1, np.zeros(2)) for step in steps})
    for figure in (series, heat):
        axis = figure["layout"]["xaxis"]
        assert {name: axis[name] for name in axis if name == "dtick"} == ticks


def test_what_a_token_says_is_never_markup(tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="HTML reports need plotly, the extra 'report'")
    evil = "</script><script>document.title='x'</script><!--"
    chart = Chart(evil, {"": {"data": [{"type": "scatter", "text": [evil]}], "layout": {"height": 100}}}, evil)
    page = Page(evil, [(evil, True)], Table(evil, [evil], [[evil]]), {"Where": [chart]})
    path = tmp_path / "page.html"
    path.write_text(render(page), encoding="utf-8")
    parsed = parse(path)
    assert parsed.cells == [evil] and parsed.titles == [evil, evil]
    assert parsed.figures[0][0]["data"][0]["text"] == [evil]


def test_a_run_that_goes_on_or_is_older_still_has_a_report(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", equal=False)
    (folder / "pictures.jsonl").unlink()
    (folder / "summary.json").unlink()
    page = run_page([read_run(folder)])
    assert page.sections["Where"]
    assert not page.verdict[0][1]


def test_unusable_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl is missing"):
        read_run(tmp_path)
    folder = write_run(tmp_path / "run", equal=True)
    (folder / "pictures.jsonl").write_text('{"step": 1, "num_tokens": 3}\n')
    with pytest.raises(ValueError, match=r"pictures\.jsonl, line 1: field 'histogram' is missing"):
        read_run(folder)
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no step is finished yet"):
        read_run(folder)
