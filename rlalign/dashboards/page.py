"""One HTML file that opens anywhere: charts, tables and words, with everything they need inside.

Charts are drawn by plotly.js, which is part of the file (4.8 MB of it); the extra ``report`` has it. The page's own
policy (its Content-Security-Policy) forbids it to load anything from anywhere.
"""

from __future__ import annotations

import html
import importlib.resources
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlalign.dashboards.charts import Figure
from rlalign.dashboards.panels import Section

QUESTIONS: dict[Section, str] = {
    "Agreement": "Are they the same?",
    "Where": "Which tokens, how far?",
    "Policy": "Does it matter for learning?",
    "Performance": "What does it cost?",
    "Reward": "Does it learn?",
}
"""What each section answers, in the order in which they are read."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure with its heading. note: what to look for. figures: one, or several to choose from by their names."""

    title: str
    figures: Mapping[str, Figure]
    note: str = ""
    width: Literal["third", "half", "full"] = "half"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under a heading; each cell is shown as text."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """A whole report. good: the verdict's colour. sections: only those that have something to show."""

    title: str
    verdict: Sequence[tuple[str, bool]]
    facts: Table
    sections: Mapping[Section, Sequence[Chart | Table]]


def require_plotly() -> None:
    """Raises ValueError in one line if plotly is not installed: to be asked before any work is done."""
    _plotly_file()


def render(page: Page) -> str:
    """The file's text. Raises ValueError if plotly, whose script is part of it, is not installed."""
    shown = {name: page.sections[name] for name in QUESTIONS if page.sections.get(name)}
    charts: list[Chart] = [block for blocks in shown.values() for block in blocks if isinstance(block, Chart)]
    numbers = iter(range(len(charts)))
    body = [
        f"<h1>{_text(page.title)}</h1>",
        *(f'<p class="verdict {"good" if good else "bad"}">{_text(line)}</p>' for line, good in page.verdict),
        "<nav>" + "".join(f'<a href="#{name}">{name}</a>' for name in shown) + "</nav>",
        _table(page.facts),
    ]
    for name, blocks in shown.items():
        body.append(f'<section id="{name}"><h2>{name}</h2><p class="question">{QUESTIONS[name]}</p><div class="grid">')
        body.extend(_chart(block, next(numbers)) if isinstance(block, Chart) else _table(block) for block in blocks)
        body.append("</div></section>")
    figures = [[figure for figure in chart.figures.values()] for chart in charts]
    return _PAGE.format(
        policy=_POLICY,
        title=_text(page.title),
        style=_STYLE,
        body="\n".join(body),
        figures=_json(figures),
        plotly=_plotly_file().read_text(encoding="utf-8"),
        script=_SCRIPT,
    )


def _chart(chart: Chart, number: int) -> str:
    names = list(chart.figures)
    choice = ""
    if len(names) > 1:
        options = "".join(f'<option value="{i}">{_text(name)}</option>' for i, name in enumerate(names))
        choice = f'<select data-chart="{number}" aria-label="{_text(chart.title)}">{options}</select>'
    head = f"<h3>{_text(chart.title)}{choice}</h3>" + (f"<p>{_text(chart.note)}</p>" if chart.note else "")
    return f'<figure class="{chart.width}">{head}<div class="chart" id="chart-{number}"></div></figure>'


def _table(table: Table) -> str:
    # a narrow column of numbers may break its long heading
    head = "".join(f"<th>{_text(name).replace('_', '_<wbr>')}</th>" for name in table.columns)
    rows = "".join("<tr>" + "".join(_cells(row)) + "</tr>" for row in table.rows)
    note = f"<p>{_text(table.note)}</p>" if table.note else ""
    title = f"<h3>{_text(table.title)}</h3>" if table.title else ""
    body = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<figure class="full">{title}{note}<div class="scroll">{body}</div></figure>'


def _cells(row: Sequence[Any]) -> Iterator[str]:
    for value in row:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number:
            yield f'<td class="number">{_number(value)}</td>'
        else:
            text = "" if value is None else str(value)
            yield f'<td class="{"long" if len(text) > _LINE else "short"}">{_text(text)}</td>'


def _number(value: float) -> str:
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:.9g}"


def _text(value: Any) -> str:
    return html.escape("" if value is None else str(value))


def _json(values: Any) -> str:
    # "<" could end the script element, or begin a comment in it
    return json.dumps(values, allow_nan=False, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def _plotly_file() -> Any:
    try:
        return importlib.resources.files("plotly") / "package_data" / "plotly.min.js"
    except ModuleNotFoundError as error:
        raise ValueError("an HTML report needs plotly, not installed here: pip install 'rlalign[report]'") from error


# a longer text wraps, a shorter one never does: narrow columns of many words can't be read
_LINE = 48

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2125; background: #f5f6f7; margin: 0 auto; padding: 1.5rem;
       max-width: 1500px; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2rem 0 0; }
h3 { font-size: .95rem; margin: 0 0 .25rem; display: flex; justify-content: space-between; gap: 1rem; }
p { margin: .2rem 0 .6rem; }
figure > p, .question { color: #5b6269; font-size: .88rem; }
.verdict { padding: .6rem .9rem; border-left: 5px solid; background: #fff; }
.good { border-color: #2a9d4f; }
.bad { border-color: #c8352b; }
nav { position: sticky; top: 0; z-index: 5; background: #f5f6f7; padding: .5rem 0; }
nav a { margin-right: 1.2rem; color: #2f6fb0; text-decoration: none; font-weight: 600; }
.grid { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: .9rem; }
figure { margin: 0; padding: .8rem; background: #fff; border: 1px solid #e2e4e6; border-radius: 6px;
         grid-column: span 6; min-width: 0; }
figure.half { grid-column: span 3; }
figure.third { grid-column: span 2; }
@media (max-width: 900px) { figure.half, figure.third { grid-column: span 6; } }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #eceeef; vertical-align: top; }
td.number { text-align: right; white-space: nowrap; }
td.short { white-space: pre; }
td.long { white-space: pre-wrap; min-width: 32ch; }
"""

# each figure is drawn when it comes near the window: fifty at once would hold up the page
_SCRIPT = """
const figures = JSON.parse(document.getElementById("figures").textContent);
const buttons = [["toImage", "resetScale2d"]];
const options = {responsive: true, displaylogo: false, modeBarButtons: buttons};
const drawn = new Set();
function draw(number, which) {
  const figure = figures[number][which];
  Plotly.react("chart-" + number, figure.data, figure.layout, options);
  drawn.add(number);
}
const seen = new IntersectionObserver(entries => {
  for (const entry of entries) {
    const number = Number(entry.target.id.slice(6));
    if (entry.isIntersecting && !drawn.has(number)) draw(number, 0);
  }
}, {rootMargin: "600px"});
document.querySelectorAll(".chart").forEach((place, number) => {
  place.style.minHeight = figures[number][0].layout.height + "px";
  seen.observe(place);
});
addEventListener("beforeprint", () => figures.forEach((_, number) => drawn.has(number) || draw(number, 0)));
document.querySelectorAll("select").forEach(select =>
  select.addEventListener("change", () => draw(Number(select.dataset.chart), Number(select.value))));
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
<script type="application/json" id="figures">{figures}</script>
<script>{plotly}</script>
<script>{script}</script>
</body>
</html>
"""
