"""What the terminal shows of a run: a heading, one live line, a table at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

_LOG_WIDTH = 120
# seconds of a phase
_SHOWN = 0.005
_PHASES = ("rollout", "reward", "train", "check", "verify", "update", "sync")


class Progress:
    """A live line in a terminal; one plain line per step anywhere else, such as in a log."""

    def __init__(self, total_steps: int, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        if not self.console.is_terminal:
            self.console.width = _LOG_WIDTH
        self._total = total_steps
        self._live: Live | None = None

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, markup=False)

    def step(self, step: int, metrics: Mapping[str, float], seconds: Mapping[str, float]) -> None:
        """Show a finished step."""
        line = step_line(step, self._total, metrics, seconds)
        if not self.console.is_terminal:
            self.console.print(line)
            return
        if self._live is None:
            self._live = Live(console=self.console, refresh_per_second=4)
            self._live.start()
        self._live.update(line)

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """The closing table."""
        self.close()
        table = Table(title=title, title_justify="left", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self.console.print(table, soft_wrap=False)

    def close(self) -> None:
        """Leave the live line as it stands."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def step_line(step: int, total: int, metrics: Mapping[str, float], seconds: Mapping[str, float]) -> Text:
    """``step 7/60  reward 0.412  9,120 tok/s  max|Δlogp| 0  mismatches 0  rollout 0.6s …``."""
    mismatches = int(metrics["align/mismatch_count"])
    line = Text(f"step {step}/{total}  ")
    line.append(f"reward {metrics['reward/mean']:.3f}  ", style="bold")
    line.append(f"{metrics['perf/rollout_tokens_per_s']:,.0f} tok/s  ")
    line.append(
        f"max|Δlogp| {metrics['align/logp_abs_diff/max']:.3g}  mismatches {mismatches:,}  ",
        style="green" if mismatches == 0 else "red",
    )
    line.append(
        "  ".join(f"{name} {seconds[name]:.2f}s" for name in _PHASES if seconds.get(name, 0) >= _SHOWN), style="dim"
    )
    return line
