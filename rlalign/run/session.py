"""A run while it lasts: phases and their seconds, the verdict on every step, checkpoints, and the summary.

Totals are part of every checkpoint, so that a resumed run ends with the numbers of an uninterrupted one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from rlalign.config import Config, config_to_dict
from rlalign.dashboards import MetricsFile, NullSink, Sink, make_sink
from rlalign.dashboards.alerts import AlertGate, alerts_of
from rlalign.dashboards.snapshot import snapshot_to_dict, take_snapshot
from rlalign.generators import Generators
from rlalign.records import Sample, derive_seed
from rlalign.run.comparison import Checks, Compared, Sides, compare_step, run_checks
from rlalign.run.facts import git_commit, versions
from rlalign.run.folder import RunFolder
from rlalign.run.interrupts import Interrupts
from rlalign.run.mismatch import SaveWeights, keep_mismatch, write_mismatch
from rlalign.run.numbers import reward_numbers, speed_numbers
from rlalign.run.progress import Progress
from rlalign.run.totals import Totals, totals_of
from rlalign.verifier.decide import MismatchHalt, enforce, policy_of
from rlalign.verifier.metrics import Provenance
from rlalign.verifier.report import Report, record

# sets this purpose apart from others of the same run seed
_GENERATORS = 0x72657764


class Checkpointer(Protocol):
    """Whoever holds the weights: the trainer actor."""

    def save(self, path: Path, data_state: dict[str, Any]) -> None: ...

    def resume(self, path: Path) -> dict[str, Any]: ...

    def discard(self) -> None: ...


class Run:
    """Context manager around one run. ``recipe`` names it; ``config.run.resume`` makes it go on.

    ``find_checkpoint``: the trainer's rule for which folder it resumes from; FileNotFoundError if there is none.
    Within a step: ``phase`` around its parts, ``verify`` before the update, ``end_step`` at its end.
    """

    def __init__(self, recipe: str, config: Config, *, find_checkpoint: Callable[[Path], Path]) -> None:
        self.recipe, self.config, self._find_checkpoint = recipe, config, find_checkpoint
        self.totals = Totals()
        self.metrics: dict[str, float] = {}
        self.facts: dict[str, Any] = {}
        self.status = "failed"
        self._seconds: dict[str, float] = {}
        self._interrupts = Interrupts()
        self._alerts = AlertGate(config.align.alert.wait_seconds)
        self._checks = Checks()
        self._compared: Compared | None = None
        self.sink: Sink = NullSink()
        self._begun = False
        self._said_no_signal = False
        self._exit = ExitStack()
        self.generators = Generators(derive_seed(config.run.seed, _GENERATORS))
        """Python's, NumPy's, torch's: entered around the rewards of a step, as a user's own may draw from them."""

    def __enter__(self) -> Run:
        config, path = self.config, self.config.run.resume
        self.folder = (
            RunFolder.create(self.recipe, config) if path is None else RunFolder.existing(path, self._find_checkpoint)
        )
        self.progress = Progress(config.run.steps)
        # the record of an earlier run is not touched before ``restore`` knows that it goes on
        if path is None:
            self._begin()
        self.progress.say(f"{self.recipe}: numerics={config.numerics}, run folder {self.folder.path}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.close()
        self._exit.close()
        if isinstance(error, MismatchHalt):
            self.status = "halted"
        elif isinstance(error, KeyboardInterrupt | SystemExit):
            self.status = "interrupted"
        if self._begun:
            try:
                self.folder.write_json(self.folder.summary, self._summary())
            finally:
                self.sink.close(exit_code=0 if error is None else 1)

    def restore(self, trainer: Checkpointer) -> int:
        """The number of finished steps: 0, or those of the checkpoint that the trainer now goes on from."""
        if self.config.run.resume is not None:
            data_state = trainer.resume(self.folder.last)
            self.totals = totals_of(data_state["totals"])
            self.generators.load_state(data_state["generators"])
            done, wanted = self.totals.steps, self.config.run.steps
            # all steps done, but not what follows them: that run may still come to its end
            if done > wanted or done == wanted == self.folder.finished_steps():
                raise ValueError(f"run.steps={wanted}: {self.folder.path} has finished {done} steps already")
            self._check_fault(done)
            self.folder.begin(self.config)
            self._begin()
            self.progress.say(f"continuing after step {self.totals.steps}")
        first = self.totals.steps + 1
        self._metrics_file = self._exit.enter_context(closing(MetricsFile(self.folder.metrics, first_step=first)))
        self._pictures_file = self._exit.enter_context(closing(MetricsFile(self.folder.pictures, first_step=first)))
        return self.totals.steps

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of a part of the step."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begin

    @contextmanager
    def saved_on_interrupt(self, trainer: Checkpointer) -> Iterator[None]:
        """Around the loop: Ctrl-C or SIGTERM write a checkpoint of the last finished step on their way out."""
        with self._interrupts:
            try:
                yield
            except (KeyboardInterrupt, SystemExit):
                self.progress.close()
                self._save_interrupted(trainer)
                raise

    def uninterrupted(self) -> Any:
        """Context of a step's part after which weights, version and totals belong together again."""
        return self._interrupts.shield()

    def note_failed(self, failed: Sequence[str], *, served: int) -> None:
        """Say which requests could not be served; the batch goes on without them. ValueError if none could."""
        if served == 0:
            raise ValueError(f"no request of this step could be served: {failed[0]}")
        for line in failed:
            self.progress.say(f"left out: {line}")
        self.metrics["rollout/failed"] = float(len(failed))

    def note_signal(self, no_signal_frac: float) -> None:
        """Log the share of groups whose rewards tell nothing; a step of only such is said, the first time."""
        self.metrics["reward/no_signal_frac"] = no_signal_frac
        if no_signal_frac == 1.0 and not self._said_no_signal:
            self._said_no_signal = True
            self.progress.say(
                "all samples of every prompt got the same reward: nothing to learn from in this step (said once; "
                "reward/no_signal_frac is logged)"
            )

    def check(self, samples: Sequence[Sample], sides: Sides) -> None:
        """The periodic checks, where they are due; ``verify`` takes in what they find."""
        step, seed = self.totals.steps + 1, self.config.run.seed
        self._checks = run_checks(self.config.align, samples, sides, seed=seed, step=step)

    def verify(
        self,
        samples: Sequence[Sample],
        train_logprobs: Sequence[np.ndarray],
        *,
        advantages: Sequence[np.ndarray],
        provenance: Provenance,
        decode: Callable[[Sequence[int]], str],
        save_weights: SaveWeights | None = None,
    ) -> None:
        """Compare both sides bit for bit, and act on a difference. Raises MismatchHalt where the run must stop.

        save_weights: writes the trainer's weights beside a step that is kept to be replayed.
        """
        self._compared = compare_step(
            samples,
            train_logprobs,
            config=self.config.align,
            checks=self._checks,
            advantages=advantages,
            provenance=provenance,
            decode=decode,
        )
        report = self._compared.report
        self.metrics |= self._compared.metrics
        if not report.equal:
            worst = [record(token) for token in report.worst]
            self.folder.write_json(self.folder.mismatch, {"verdict": report.verdict, "worst_tokens": worst})
        try:
            enforce(
                report,
                policy_of(self.config),
                warn=self.progress.say,
                dump=lambda: self._dump(report, samples, train_logprobs, save_weights),
            )
        except MismatchHalt:
            self.totals.count(report)
            # the step that stops a run is the one that people want to look at
            self._log(self.totals.steps + 1, with_pictures=True, halted=True)
            raise

    def _dump(
        self,
        report: Report,
        samples: Sequence[Sample],
        train_logprobs: Sequence[np.ndarray],
        save_weights: SaveWeights | None,
    ) -> None:
        def write(folder: Path) -> Path:
            return write_mismatch(
                folder,
                samples,
                train_logprobs,
                verdict=report.verdict,
                config=self.config,
                plan=self.facts.get("plan", {}),
                save_weights=save_weights,
            )

        step, limit = self.totals.steps + 1, self.config.align.max_dumps
        keep_mismatch(self.folder.mismatches, step, limit, write, self.progress.say)

    def end_step(self, step: int, samples: Sequence[Sample], *, rollout_stats: Mapping[str, float]) -> None:
        """Write the finished step to every place, and show it."""
        self.totals.steps = step
        self.generators.commit()
        # only of a step that finished or stopped the run: an interrupted one comes again
        if self._compared is not None:
            self.totals.count(self._compared.report)
        compute, epochs = self.facts.get("compute", {}), self.config.algorithm.epochs
        speed = speed_numbers(samples, self._seconds, rollout_stats, compute=compute, epochs=epochs)
        self.metrics |= reward_numbers(samples) | speed
        self.totals.add_step(self.metrics["reward/mean"], self._seconds)
        self.folder.write_samples(step, samples)
        self.progress.step(step, self.metrics, self._seconds)
        self._log(step, with_pictures=step == 1 or step % self.config.tracking.media_every == 0)
        self.metrics, self._seconds, self._checks, self._compared = {}, {}, Checks(), None

    def evaluation_due(self) -> bool:
        """Before the first step, every ``eval.every`` steps and after the last one; once each, resumed or not."""
        step, every = self.totals.steps, self.config.eval.every
        wanted = step in (0, self.config.run.steps) or (every > 0 and step % every == 0)
        return wanted and self.totals.last_eval_step != step

    def evaluated(self, accuracy: float, trainer: Checkpointer) -> None:
        """Take a held-out accuracy, and keep the weights if it is the best so far."""
        with self.uninterrupted():
            self._evaluated(accuracy, trainer)

    def _evaluated(self, accuracy: float, trainer: Checkpointer) -> None:
        totals = self.totals
        if totals.add_evaluation(accuracy):
            trainer.save(self.folder.best, self._data_state())
        for place in (self._metrics_file, self.sink):
            place.log(totals.steps, {"eval/accuracy": accuracy})
        self.progress.say(f"held-out accuracy after {totals.steps} steps: {accuracy:.3f}")

    def save(self, trainer: Checkpointer) -> None:
        """Write the last checkpoint."""
        trainer.save(self.folder.last, self._data_state())

    def finish(self, final: Mapping[str, str | None]) -> None:
        """The closing table. final: SHA-256 of the masters, ``policy`` and ``critic``."""
        self.status = "finished"
        self.facts |= {"final_weights_sha256": final["policy"], "critic_sha256": final["critic"]}
        self.progress.table(f"{self.recipe}, numerics={self.config.numerics}", self._closing_rows())

    def _check_fault(self, done: int) -> None:
        fault = self.config.align.fault
        if fault.kind != "none" and fault.step <= done:
            raise ValueError(
                f"align.fault.step={fault.step}: {self.folder.path} has finished {done} steps already: nothing would "
                "be planted; choose a later step or align.fault.kind=none"
            )

    def _begin(self) -> None:
        """From here on this run leaves its marks in the folder."""
        self.sink = make_sink(self.config.tracking, self.folder.path, config_to_dict(self.config))
        self._begun = True

    def _data_state(self) -> dict[str, Any]:
        """What a resumed run needs besides weights, as of the last finished step."""
        return {"totals": asdict(self.totals), "generators": self.generators.state()}

    def _save_interrupted(self, trainer: Checkpointer) -> None:
        if self._interrupts.torn:
            self.progress.say(f"interrupted twice, within a step: the checkpoint before it stays in {self.folder.last}")
            return
        trainer.discard()
        self.save(trainer)
        self.progress.say(
            f"checkpoint written after step {self.totals.steps}; "
            f"continue with: python recipes/{self.recipe}.py run.resume={self.folder.path}"
        )

    def _log(self, step: int, *, with_pictures: bool, halted: bool = False) -> None:
        self._metrics_file.log(step, self.metrics)
        self.sink.log(step, self.metrics)
        if self._compared is None:
            return
        settings, verdict = self.config.align.alert, self._compared.report.verdict
        found = alerts_of(self.metrics, settings, self.config.numerics, step=step, verdict=verdict, halted=halted)
        for alert in self._alerts.passing(found):
            self.sink.alert(alert)
        pictures, layers = self._compared.pictures(full=with_pictures), self._compared.layers
        snapshot = take_snapshot(pictures, full=with_pictures, layers=layers)
        self._pictures_file.log(step, snapshot_to_dict(snapshot))
        if layers is not None:
            self.sink.layers(step, layers)
        if with_pictures:
            self.sink.pictures(step, pictures)

    def _summary(self) -> dict[str, Any]:
        totals = asdict(self.totals)
        return {
            "status": self.status,
            "recipe": self.recipe,
            "numerics": self.config.numerics,
            "final_weights_sha256": None,
            **self.facts,
            **totals,
            "seed": self.config.run.seed,
            "versions": versions(),
            "git_commit": git_commit(),
        }

    def _closing_rows(self) -> list[tuple[str, str]]:
        rows = [
            *self.totals.rows(),
            ("final weights", f"SHA-256 {self.facts['final_weights_sha256']}"),
            ("run folder", f"{self.folder.path}: config, metrics, samples, checkpoints, summary.json"),
        ]
        tracked = getattr(self.sink, "folder", None)
        return rows if tracked is None else [*rows, ("look at it", f"wandb leet {tracked}")]
