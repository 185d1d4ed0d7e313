"""``--html``: what a subcommand found, as one page that opens offline.

A subcommand calls ``check_html`` before its work and ``write_html`` after it. What it has nothing to say about it
leaves out, and so does the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlalign.cli.dump_options import check_file
from rlalign.dashboards.blocks import layer_chart, picture_blocks
from rlalign.dashboards.page import QUESTIONS, Chart, Page, Table, render, require_plotly
from rlalign.dashboards.panels import Section, panel_of
from rlalign.dashboards.pictures import PictureData
from rlalign.dashboards.snapshot import LayerRow, Snapshot, take_snapshot


@dataclass(frozen=True, slots=True)
class HtmlOutcome:
    """What the page of one verification shows.

    verdict: one line; good: whether it is the one that was hoped for. facts: label to value, in the order shown.
    metrics: ``align/*`` keys, each shown in its panel's section. pictures: a comparison's tokens, or its snapshot if
    they were streamed. layers: of a bisection, shown as a heat map of one column. charts, tables: whatever
    else was found, such as causes, by section, in this order.
    """

    title: str
    verdict: str
    good: bool
    facts: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    pictures: PictureData | Snapshot | None = None
    layers: LayerRow | None = None
    tables: Sequence[tuple[Section, Table]] = ()
    charts: Sequence[tuple[Section, Chart | Table]] = ()


def check_html(path: Path, *, option: str = "--html") -> None:
    """Raises FileNotFoundError or ValueError in one line if no report can be written there, before any work is done."""
    check_file(path, option)
    require_plotly()


def write_html(outcome: HtmlOutcome, path: Path) -> None:
    """Write the page, UTF-8, about 5 MB. Raises ValueError if plotly is not installed."""
    path.write_text(render(outcome_page(outcome)), encoding="utf-8")


def outcome_page(outcome: HtmlOutcome) -> Page:
    """The page of one verification, in the sections of every other dashboard."""
    sections: dict[Section, list[Chart | Table]] = {name: [] for name in QUESTIONS}
    if outcome.layers is not None:
        sections["Where"].append(layer_chart({"": outcome.layers}))
    if (pictures := outcome.pictures) is not None:
        sections["Where"] += picture_blocks(
            "", {0: pictures if isinstance(pictures, Snapshot) else take_snapshot(pictures)}
        )
    for section, block in (*outcome.charts, *outcome.tables):
        sections[section].append(block)
    for section, rows in _metric_rows(outcome.metrics).items():
        sections[section].append(Table("metrics", ["metric", "value"], rows))
    return Page(
        title=outcome.title,
        verdict=[(outcome.verdict, outcome.good)],
        facts=Table("", ["", ""], [[name, _shown(value)] for name, value in outcome.facts.items()]),
        sections=sections,
    )


def _shown(value: Any) -> Any:
    """For people: of a mapping what is set, of a list its items."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(one)}" for name, one in value.items() if one is not None)
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else value


def _metric_rows(metrics: Mapping[str, float]) -> dict[Section, list[list[Any]]]:
    """Rows by section; a metric that no panel lists is shown with the agreement, never left out."""
    rows: dict[Section, list[list[Any]]] = {}
    for name, value in metrics.items():
        panel = panel_of(name)
        rows.setdefault(panel.section if panel else "Agreement", []).append([name, value])
    return rows
