"""Trackers. One protocol, one class per tracker; a tracker that breaks mid-run is switched off, never the run.

Set-up fails hard: a run that should be tracked and can't be says so before the first step. After that, logging fails
softly: one warning, then silence.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from queue import Full, Queue
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from rlalign.config import TrackingConfig
from rlalign.dashboards.alerts import Alert
from rlalign.dashboards.aliases import ALIASES, Framework, aliased
from rlalign.dashboards.heat_map import draw_heat_map
from rlalign.dashboards.panels import STEP, definitions
from rlalign.dashboards.pictures import PictureData, draw_histogram, draw_scatter, draw_trace, table_rows, to_image
from rlalign.dashboards.snapshot import LayerRow, PositionRow, position_cells, position_row

if TYPE_CHECKING:
    import wandb

_LOG = logging.getLogger(__name__)
_CLOSE_SECONDS = 60.0
# each may hold a step's log-probs
_WAITING_CALLS = 16
# wandb would put these under the home folder; with the run they make its folder complete, and able to be synced later
_FOLDERS = ("WANDB_DATA_DIR", "WANDB_CACHE_DIR")


class Sink(Protocol):
    """Where metrics and pictures go."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Flat metrics of one step."""
        ...

    def pictures(self, step: int, data: PictureData) -> None:
        """Pictures of one step's comparison."""
        ...

    def layers(self, step: int, row: LayerRow) -> None:
        """How far every layer's output differs in one step."""
        ...

    def alert(self, alert: Alert) -> None:
        """Tell whoever watches."""
        ...

    def close(self, exit_code: int = 0) -> None:
        """Finish within bounded time. Safe to call twice."""
        ...


class NullSink:
    """Tracking switched off."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def pictures(self, step: int, data: PictureData) -> None:
        pass

    def layers(self, step: int, row: LayerRow) -> None:
        pass

    def alert(self, alert: Alert) -> None:
        pass

    def close(self, exit_code: int = 0) -> None:
        pass


class WandbSink:
    """A wandb run, online or offline; ``run_dir`` gets its ``wandb/`` folder.

    A thread of its own draws and logs, in the order of the calls: a step's pictures take half a second to draw.
    ``close_seconds`` bounds every stage of ``close``: what is still to be logged, wandb's own end (twice that) and, if
    one of them hangs, what it leaves behind. What could not be uploaded by then stays on disk for ``wandb sync``.
    """

    def __init__(
        self,
        config: TrackingConfig,
        run_dir: Path,
        run_config: Mapping[str, Any],
        *,
        close_seconds: float = _CLOSE_SECONDS,
    ) -> None:
        """Raises ValueError in one line if wandb can't start."""
        self._close_seconds = close_seconds
        self._aliases = config.aliases
        self._positions: dict[int, PositionRow] = {}
        self._layers: dict[int, LayerRow] = {}
        self._run: wandb.Run | None = None
        self._restore = contextlib.ExitStack()
        self._restore.enter_context(_environment(config, run_dir / "wandb"))
        try:
            self._run = _start(config, run_dir, run_config, close_seconds)
            self.folder = Path(self._run.dir).parent
            _define(self._run, self._aliases)
            self._thread = _InOrder()
        except Exception as error:
            self._finish(exit_code=1)
            raise ValueError(f"tracking.mode={config.mode}: wandb could not start: {_describe(error)}") from error

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        metrics = dict(metrics)  # the caller may go on with its own
        self._softly(lambda run: run.log({STEP: step, **aliased(metrics, self._aliases), **metrics}))

    def pictures(self, step: int, data: PictureData) -> None:
        def draw(run: wandb.Run) -> None:
            if data.position is not None and len(data.position):
                self._positions[step] = position_row(data)
            run.log({STEP: step, **_media(step, data), **self._heat_map()})

        self._softly(draw)

    def layers(self, step: int, row: LayerRow) -> None:
        def draw(run: wandb.Run) -> None:
            self._layers[step] = row
            run.log({STEP: step, **self._layer_map()})

        self._softly(draw)

    def alert(self, alert: Alert) -> None:
        # the wait is ours (AlertGate), whatever the title; wandb takes 0 for a minute
        self._softly(lambda run: run.alert(alert.title, alert.text, level=alert.level, wait_duration=1))

    def close(self, exit_code: int = 0) -> None:
        late = _bounded(self._thread.finish, self._close_seconds)
        problem = self._finish(exit_code)
        if late and not problem:
            _bounded(_teardown, self._close_seconds)
        if problem := problem or late:
            _LOG.warning("wandb did not finish: %s; what it has is in %s", problem, self.folder)

    def _heat_map(self) -> dict[str, Any]:
        """Position × step, over the steps that had pictures so far."""
        import wandb

        if not self._positions:
            return {}
        cells, width, steps = position_cells(self._positions)
        rows = [str(index * width) for index in range(len(cells))]
        figure = draw_heat_map(
            cells,
            rows,
            title="position in the response × step",
            x_label="step, of those with pictures",
            columns=[str(first) for first, _ in steps],
            blank_nan=True,
        )
        return {"where/position_heat_map": wandb.Image(to_image(figure))}

    def _layer_map(self) -> dict[str, Any]:
        """Layer × step, over the steps with a bisection so far."""
        import wandb

        steps = sorted(self._layers)
        rows = [self._layers[step] for step in steps]
        cells = np.array([row.difference for row in rows], np.float64).T
        figure = draw_heat_map(
            cells,
            rows[0].names,
            title="layer × step",
            x_label="step, of those with a bisection",
            columns=[str(step) for step in steps],
            what=f"max {rows[0].unit}",
        )
        return {"where/layer_heat_map": wandb.Image(to_image(figure))}

    def _softly(self, call: Callable[[wandb.Run], None]) -> None:
        def try_it() -> None:
            if self._run is None:
                return
            try:
                call(self._run)
            except BaseException as error:  # whatever wandb does, training goes on
                self._switch_off(_describe(error))

        if self._run is not None and not self._thread.call(try_it, self._close_seconds):
            self._switch_off(f"no answer within {self._close_seconds:g} s")

    def _switch_off(self, why: str) -> None:
        _LOG.warning("wandb failed and is switched off for the rest of the run: %s", why)
        self._finish(exit_code=1)

    def _finish(self, exit_code: int) -> str | None:
        """End the run, once; returns what went wrong."""
        run, self._run = self._run, None
        problem = None
        if run is not None:
            problem = _bounded(lambda: run.finish(exit_code=exit_code), 2 * self._close_seconds)
        if problem:
            # its service is gone or stuck: without this, its exit hook would fail or hang once more at interpreter exit
            _bounded(_teardown, self._close_seconds)
        self._restore.close()
        return problem


def make_sink(config: TrackingConfig, run_dir: Path, run_config: Mapping[str, Any]) -> Sink:
    """The configured tracker. Raises ValueError if it can't start; ``disabled`` doesn't even import wandb."""
    return NullSink() if config.mode == "disabled" else WandbSink(config, run_dir, run_config)


def _start(config: TrackingConfig, run_dir: Path, run_config: Mapping[str, Any], close_seconds: float) -> wandb.Run:
    import wandb

    run_dir.mkdir(parents=True, exist_ok=True)
    return wandb.init(
        mode=config.mode,
        project=config.project,
        name=config.name,
        dir=str(run_dir),
        config=dict(run_config),
        # quiet, and hands off the terminal: the progress line is ours
        settings=wandb.Settings(silent=True, console="off", finish_timeout=close_seconds),
    )


def _define(run: wandb.Run, aliases: Sequence[Framework]) -> None:
    run.define_metric(STEP, hidden=True)
    for pattern, summary in definitions():
        run.define_metric(pattern, step_metric=STEP, summary=summary)
    ours = {pattern for pattern, _ in definitions()}
    for name in {theirs for framework in aliases for theirs in ALIASES[framework]} - ours:
        run.define_metric(name, step_metric=STEP)


def _media(step: int, data: PictureData) -> dict[str, Any]:
    import wandb

    columns, title = WORST_COLUMNS, f"step {step}"
    media = {
        "where/abs_diff_histogram": wandb.Image(to_image(draw_histogram(data, title=title))),
        "where/prob_scatter": wandb.Image(to_image(draw_scatter(data, title=title))),
        "where/worst_tokens": wandb.Table(columns=list(columns), data=table_rows(data.worst, columns)),
    }
    if data.trace is not None:
        media["where/trace"] = wandb.Image(to_image(draw_trace(data.trace, title=title)))
    return media


WORST_COLUMNS = (
    "kind", "key", "position", "token_id", "context", "rollout", "train", "delta", "ulp", "sequence_length",
    "batch_size", "weights_version", "finish_reason",
)  # fmt: skip
"""Columns of the worst-token table, whether it has rows or not."""


@contextlib.contextmanager
def _environment(config: TrackingConfig, folder: Path) -> Iterator[None]:
    """wandb's environment while the run lasts; put back afterwards.

    The mode is the config's, whatever WANDB_MODE says. Staging folders are inside ``folder`` unless the user chose, and
    offline means that nothing is sent.
    """
    mine = {name: str(folder.absolute() / ".staging") for name in _FOLDERS if name not in os.environ}
    # silent also means that it asks nothing: without a key an online run fails instead of prompting
    mine |= {"WANDB_MODE": config.mode, "WANDB_SILENT": "true"}
    if config.mode == "offline":
        mine["WANDB_ERROR_REPORTING"] = "false"  # wandb reports its own errors over the network
    before = {name: os.environ.get(name) for name in mine}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


class _InOrder:
    """Makes calls one after another in a thread of its own; who brings many at once waits for it."""

    def __init__(self) -> None:
        self._calls: Queue[Callable[[], None] | None] = Queue(_WAITING_CALLS)
        self._thread = threading.Thread(target=self._work, name="wandb-log", daemon=True)
        self._thread.start()

    def call(self, call: Callable[[], None], seconds: float) -> bool:
        """Whether there was room for it within that time."""
        with contextlib.suppress(Full):
            self._calls.put(call, timeout=seconds)
            return True
        return False

    def finish(self) -> None:
        """Return when all calls were made. Safe to call twice."""
        if self._thread.is_alive():
            self._calls.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()


def _bounded(call: Callable[[], object], seconds: float) -> str | None:
    """Run ``call`` for at most ``seconds``; returns what went wrong. A call that hangs is left behind."""
    problems: list[str] = []

    def run() -> None:
        try:
            call()
        except Exception as error:
            problems.append(_describe(error))

    thread = threading.Thread(target=run, name="wandb-finish", daemon=True)
    thread.start()
    thread.join(seconds)
    return f"no answer within {seconds:g} s" if thread.is_alive() else next(iter(problems), None)


def _teardown() -> None:
    import wandb

    wandb.teardown()


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
