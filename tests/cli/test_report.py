"""scripts/report.py and ``--html``, as a user calls them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.pages import parse

from rlalign.cli.html import HtmlOutcome, outcome_page, write_html
from rlalign.cli.report import main
from rlalign.dashboards import MetricsFile
from rlalign.dashboards.page import Table
from rlalign.dashboards.snapshot import LayerRow

pytest.importorskip("plotly", reason="HTML reports need plotly, the extra 'report'")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    file = MetricsFile(folder / "metrics.jsonl")
    file.log(1, {"align/mismatch_count": 0.0, "align/nonfinite_count": 0.0, "reward/mean": 0.5})
    file.close()
    return folder


def test_writes_into_the_run_or_where_it_is_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run)]) == 0
    assert "MB" in capsys.readouterr().out
    assert main([str(run), str(run), "--output", str(tmp_path / "two.html")]) == 0
    assert "run (1): rollout and trainer agree" in parse(tmp_path / "two.html").text
    assert sorted(os.listdir(run)) == ["metrics.jsonl", "report.html"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["{tmp}"], "metrics.jsonl is missing"),
    (["{tmp}/nope"], "{tmp}/nope"),
    (["{run}", "{run}", "{run}"], "one run or two"),
    (["{run}", "--output", "{tmp}/no/such/x.html"], "--output: no such folder"),
    (["{run}", "--output", "{tmp}"], "is a folder"),
    ([], "required: RUN_DIR"),
])  # fmt: skip
def test_unusable_arguments_exit_2_in_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([text.format(tmp=tmp_path, run=run) for text in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message.format(tmp=tmp_path) in said
    assert ("--output" in said) == ("--output" in arguments)


def test_without_plotly_it_says_what_to_install(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlalign.dashboards import page

    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(page.importlib.resources, "files", missing)
    assert main([str(run)]) == 2
    assert "pip install 'rlalign[report]'" in capsys.readouterr().err


def test_an_outcome_shows_what_it_has_and_nothing_else(tmp_path: Path) -> None:
    outcome = HtmlOutcome(
        title="bisect", verdict="layer 1 differs", good=False, metrics={"align/k3": 0.5, "mine": 1.0},
        layers=LayerRow(("0", "1"), (0.0, 3.0)), tables=[("Where", Table("causes", ["cause"], [["padding"]]))],
    )  # fmt: skip
    write_html(outcome, tmp_path / "page.html")
    page = parse(tmp_path / "page.html")
    assert page.sections == ["Agreement", "Where", "Policy"]
    assert page.titles == ["metrics", "which layer", "causes", "metrics"]
    assert page.cells == ["mine", "1", "padding", "align/k3", "0.5"]
    assert not outcome_page(outcome).verdict[0][1]
