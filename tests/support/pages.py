"""HTML reports as a test sees them: parsed, and in a browser if there is one."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
_VOID = {"meta", "link", "br", "wbr", "img", "input", "hr"}


@dataclass
class Parsed:
    """titles: h3 texts. sections: their ids. cells: texts of all table cells. figures: per chart, what it can show."""

    titles: list[str] = field(default_factory=list)
    sections: list[str] = field(default_factory=list)
    cells: list[str] = field(default_factory=list)
    charts: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)
    figures: list[list[dict[str, Any]]] = field(default_factory=list)
    text: str = ""


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page, self.open = Parsed(), []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in _VOID:
            self.open.append(tag)
        if tag == "section":
            self.page.sections.append(values["id"] or "")
        if values.get("class") == "chart":
            self.page.charts.append(values["id"] or "")
        self.page.addresses += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith("#")]
        for tags, found in ((("h3",), self.page.titles), (("td",), self.page.cells), (("option",), self.page.options)):
            if tag in tags:
                found.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        where = self.open[-1] if self.open else ""
        found = {"h3": self.page.titles, "td": self.page.cells, "option": self.page.options}.get(where)
        if found is not None:
            found[-1] += data
        if where not in ("script", "style"):
            self.page.text += data


def parse(path: Path) -> Parsed:
    """The page's structure; every element must be closed where it belongs."""
    text = path.read_text(encoding="utf-8")
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    match = re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, re.DOTALL)
    assert match is not None
    reader.page.figures = json.loads(match[1], parse_constant=pytest.fail)
    return reader.page


@dataclass(frozen=True)
class Browsed:
    """dom: the page's elements after its scripts ran. console: what they printed, errors and refused loads included."""

    dom: str
    console: list[str]

    @property
    def drawn(self) -> int:
        """Charts that plotly.js has drawn."""
        return len(re.findall(r'class="[^"]*js-plotly-plot', self.dom))


def browse(path: Path, folder: Path, *, height: int = 9_000) -> Browsed:
    """Open the page in headless Chromium, whose window is so high that every chart is in it; skips without one."""
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser is installed (looked for {', '.join(_BROWSERS)})")
    command = [
        browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size=1400,{height}",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=4000", "--enable-logging=stderr",
        "--dump-dom", path.absolute().as_uri(),
    ]  # fmt: skip
    environment = {**os.environ, "HOME": str(folder), "DBUS_SESSION_BUS_ADDRESS": "disabled:"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True)
    return Browsed(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line])
