"""What a bisection shows: tables for people, JSON for programs, the heat map as a picture and on a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlalign.verifier.bisect import Bisection, SiteDifference

Facts = dict[str, Any]
_COLUMNS = ("output", "operator", "differing", "tokens", "max |Δ|", "max ULP")
_MOST_TOKENS = 2000


def show(outcome: Bisection, facts: Facts, worst: int, console: Console) -> None:
    """Print the way up, the first sites that differ and, last, the verdict."""
    if outcome.sites:
        console.print(_table(f"{facts['a']} against {facts['b']}: how the difference grows", outcome.depth))
    differing = [d for d in outcome.sites if d.differing]
    if differing and worst:
        title = f"First {min(worst, len(differing))} of {len(differing)} outputs that differ"
        console.print(_table(title, differing[:worst]))
    for one in facts["failed"]:
        console.print(f"sequence {one['id']} was not compared: {one['error']}", markup=False, soft_wrap=True)
    for name in facts["not_recorded"]:
        console.print(f"not compared: {name}: its output has no row per token", markup=False, soft_wrap=True)
    for field in facts["without_effect"]:
        console.print(f"{field} changes nothing on these tokens", markup=False, soft_wrap=True)
    good = facts["exit_code"] == 0
    lines = [outcome.verdict]
    if outcome.first is not None:
        beyond = "; ".join(facts["exceeded"]) or "within the thresholds"
        lines.insert(1 if good else 0, f"log-probs at the end: {beyond}")  # last is what the exit code is about
    *before, last = lines
    for line in before:
        console.print(line, markup=False, soft_wrap=True)
    console.print(last, markup=False, soft_wrap=True, style="green" if good else "red")


def write_json(outcome: Bisection, facts: Facts, path: Path) -> None:
    """All of it as strict JSON, the heat map's data included; NaN and infinities are strings."""
    from rlalign.dashboards.jsonl import to_json

    content = {**facts, **outcome.record()}
    path.write_text(json.dumps(to_json(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_png(outcome: Bisection, facts: Facts, path: Path) -> None:
    """The heat map, layer by token; no picture of nothing."""
    if not outcome.sites:
        return
    from rlalign.dashboards.heat_map import draw_heat_map

    title = f"{facts['a']} against {facts['b']}"
    names = [_station(d) for d in outcome.depth]
    draw_heat_map(outcome.heat_map(), names, title=title).savefig(path, format="png")


def write_page(outcome: Bisection, facts: Facts, path: Path) -> None:
    """A page that opens offline: the heat map, each station and the first sites that differ."""
    from rlalign.cli.html import HtmlOutcome, write_html
    from rlalign.dashboards.page import Chart
    from rlalign.dashboards.page import Table as PageTable

    differing = [_cells(d) for d in outcome.sites if d.differing]
    failed = [[one["id"], one["error"]] for one in facts["failed"]]
    tables = [
        PageTable("not compared", ["sequence", "why"], failed),
        PageTable("how the difference grows", _COLUMNS, [_cells(d) for d in outcome.depth]),
        PageTable("outputs that differ, in the model's order", _COLUMNS, differing),
    ]
    note = "The lowest layer that isn't green is where the difference begins; one column per token."
    charts = [Chart("which layer, which token", {"": _figure(outcome)}, note, "full")] if outcome.sites else []
    hidden = ("logprobs", "exit_code", "failed")
    page = HtmlOutcome(
        title=f"Bisection: {facts['a']} against {facts['b']}",
        verdict=outcome.verdict,
        good=facts["exit_code"] == 0,
        facts={name: value for name, value in facts.items() if value and name not in hidden},
        charts=[("Where", chart) for chart in charts],
        tables=[("Where", table) for table in tables if table.rows],
    )
    write_html(page, path)


def _figure(outcome: Bisection) -> dict[str, Any]:
    """Layers upwards, tokens to the right; beyond ``_MOST_TOKENS`` the first ones."""
    from rlalign.dashboards.charts import layer_figure
    from rlalign.dashboards.snapshot import LayerRow

    heat, tokens = outcome.heat_map(), outcome.tokens
    names = tuple(_station(d) for d in outcome.depth)
    columns = {
        f"{tokens.sequence[t]}:{tokens.position[t]} (id {tokens.token_id[t]})": LayerRow(
            names, tuple(heat[:, t].tolist()), "max |Δ|"
        )
        for t in range(min(heat.shape[1], _MOST_TOKENS))
    }
    figure = layer_figure(columns)
    figure["data"][0]["hovertemplate"] = "token %{x}<br>%{y}<br>max |Δ| %{customdata[1]}<extra></extra>"
    figure["layout"]["xaxis"]["title"] = {"text": "sequence:position of the token"}
    return figure


def _table(title: str, differences: Sequence[SiteDifference]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(_COLUMNS[0], overflow="fold")
    table.add_column(_COLUMNS[1])
    for name in _COLUMNS[2:]:
        table.add_column(name, justify="right")
    for difference in differences:
        table.add_row(*_cells(difference))
    return table


def _cells(d: SiteDifference) -> list[str]:
    tokens = f"{d.tokens_differing:,}/{len(d.token_abs):,}"
    share = f"{d.share:.2%}" if d.share >= 1e-4 else f"{d.differing:,}"
    return [d.site.module, d.site.operator, share, tokens, f"{d.max_abs:.3g}", f"{d.max_ulp:,}"]


def _station(difference: SiteDifference) -> str:
    site = difference.site
    return site.module.rpartition(".")[2] if site.layer is None else f"layer {site.layer}"
