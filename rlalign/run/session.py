"""A run while it lasts: phases and their seconds, the verdict on every step, checkpoints, and the summary.

Totals are part of every checkpoint, so that a resumed run ends with the numbers of an uninterrupted one.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from rlalign.config import Config, config_to_dict
from rlalign.dashboards import MetricsFile, NullSink, PictureData, Sink, make_sink
from rlalign.dashboards.snapshot import snapshot_to_dict, take_snapshot
from rlalign.generators import Generators
from rlalign.records import Sample, derive_seed
from rlalign.run.facts import git_commit, versions
from rlalign.run.folder import RunFolder
from rlalign.run.interrupts import Interrupts
from rlalign.run.mismatch import SaveWeights, write_mismatch
from rlalign.run.pictures import picture_data
from rlalign.run.progress import Progress
from rlalign.verifier.compare import compare, pairs_from_samples
from rlalign.verifier.decide import MismatchHalt, enforce, policy_of
from rlalign.verifier.metrics import Provenance, align_metrics
from rlalign.verifier.report import Report, build_report, record

# sets this purpose apart from others of the same run seed
_GENERATORS = 0x72657764


class Checkpointer(Protocol):
    """Whoever holds the weights: the trainer actor."""

    def save(self, path: Path, data_state: dict[str, Any]) -> None: ...

    def resume(self, path: Path) -> dict[str, Any]: ...

    def discard(self) -> None: ...


@dataclass
class Totals:
    """Sums over all steps, earlier parts of a resumed run included."""

    steps: int = 0
    tokens: int = 0
    mismatch_count: int = 0
    logp_abs_diff_max: float = 0.0
    reward_first: float | None = None
    reward_last: float | None = None
    eval_first: float | None = None
    eval_last: float | None = None
    eval_best: float | None = None
    last_eval_step: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)


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
        self._report: Report | None = None
        self._pictures: PictureData | None = None
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
            self.folder.write_json(self.folder.summary, self._summary())
            self.sink.close(exit_code=0 if error is None else 1)

    def restore(self, trainer: Checkpointer) -> int:
        """The number of finished steps: 0, or those of the checkpoint that the trainer now goes on from."""
        if self.config.run.resume is not None:
            data_state = trainer.resume(self.folder.last)
            self.totals = _totals(data_state["totals"])
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
        comparison = compare(pairs_from_samples(samples, train_logprobs))
        report = build_report(comparison, samples, worst_tokens=self.config.align.worst_tokens, decode=decode)
        self.metrics |= align_metrics(comparison, advantages=advantages, provenance=provenance)
        self._report = report
        self._pictures = picture_data(
            comparison,
            report,
            names=["/".join(map(str, sample.key)) for sample in samples],
            token_ids=[sample.completion.token_ids for sample in samples],
            decode=decode,
        )
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
            self._count(report)
            # the step that stops a run is the one that people want to look at
            self._log(self.totals.steps + 1, with_pictures=True)
            raise

    def _dump(
        self,
        report: Report,
        samples: Sequence[Sample],
        train_logprobs: Sequence[np.ndarray],
        save_weights: SaveWeights | None,
    ) -> None:
        folder = self.folder.mismatches / f"step_{self.totals.steps + 1:05d}"
        kept = [path for path in self.folder.mismatches.glob("step_*") if path != folder]
        if len(kept) >= self.config.align.max_dumps:
            return
        shutil.rmtree(folder, ignore_errors=True)  # of the same step, before a resume
        path = write_mismatch(
            folder,
            samples,
            train_logprobs,
            verdict=report.verdict,
            config=self.config,
            plan=self.facts.get("plan", {}),
            save_weights=save_weights,
        )
        self.progress.say(f"replay it with: rlalign-verify replay {path}")

    def end_step(self, step: int, samples: Sequence[Sample], *, rollout_stats: Mapping[str, float]) -> None:
        """Write the finished step to every place, and show it."""
        self.totals.steps = step
        self.generators.commit()
        if self._report is not None:
            self._count(self._report)
        self.metrics |= _rewards(samples) | _speed(samples, self._seconds, rollout_stats)
        self.totals.reward_last = self.metrics["reward/mean"]
        if self.totals.reward_first is None:
            self.totals.reward_first = self.totals.reward_last
        for name, seconds in self._seconds.items():
            self.totals.seconds[name] = self.totals.seconds.get(name, 0.0) + seconds
        self.folder.write_samples(step, samples)
        self.progress.step(step, self.metrics, self._seconds)
        self._log(step, with_pictures=step == 1 or step % self.config.tracking.media_every == 0)
        self.metrics, self._seconds, self._report = {}, {}, None

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
        totals.eval_last, totals.last_eval_step = accuracy, totals.steps
        if totals.eval_first is None:
            totals.eval_first = accuracy
        if totals.eval_best is None or accuracy > totals.eval_best:
            totals.eval_best = accuracy
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
        self.progress.table(f"{self.recipe}, numerics={self.config.numerics}", _closing_rows(self))

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

    def _count(self, report: Report) -> None:
        """Only for a step that finished or stopped the run: an interrupted one comes again."""
        totals = self.totals
        totals.tokens += report.num_tokens
        totals.mismatch_count += report.mismatch_count
        totals.logp_abs_diff_max = max(totals.logp_abs_diff_max, report.max_abs_delta)

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

    def _log(self, step: int, *, with_pictures: bool) -> None:
        self._metrics_file.log(step, self.metrics)
        self.sink.log(step, self.metrics)
        if self._pictures is None:
            return
        self._pictures_file.log(step, snapshot_to_dict(take_snapshot(self._pictures, full=with_pictures)))
        if with_pictures:
            self.sink.pictures(step, self._pictures)

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


def _totals(values: Mapping[str, Any]) -> Totals:
    """A checkpoint's. A field that is missing is an error too: its sum would begin anew without a word."""
    if others := values.keys() ^ {one.name for one in fields(Totals)}:
        named = ", ".join(f"{'unknown' if name in values else 'missing'} field {name!r}" for name in sorted(others))
        raise ValueError(f"the checkpoint's totals are of another version of rlalign: {named}")
    return Totals(**values)


def _rewards(samples: Sequence[Sample]) -> dict[str, float]:
    rewards = np.array([sample.reward for sample in samples], np.float64)
    lengths = np.array([len(sample.completion.token_ids) for sample in samples], np.float64)
    cut = np.array([sample.completion.finish_reason == "length" for sample in samples])
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/min": float(rewards.min()),
        "reward/max": float(rewards.max()),
        "response_length/mean": float(lengths.mean()),
        "response_length/max": float(lengths.max()),
        "response_length/cut_frac": float(cut.mean()),
    }


def _speed(samples: Sequence[Sample], seconds: Mapping[str, float], stats: Mapping[str, float]) -> dict[str, float]:
    tokens = sum(len(sample.completion.token_ids) for sample in samples)
    total = sum(sample.num_tokens for sample in samples)
    return {
        **{f"perf/seconds/{name}": value for name, value in seconds.items()},
        **{f"perf/{name}": float(value) for name, value in stats.items()},
        "perf/step_seconds": sum(seconds.values()),
        "perf/rollout_tokens_per_s": tokens / seconds["rollout"],
        "perf/train_tokens_per_s": total / seconds["train"],
    }


def _closing_rows(run: Run) -> list[tuple[str, str]]:
    totals = run.totals
    seconds = "  ".join(f"{name} {value:.1f}" for name, value in totals.seconds.items())
    rows = [
        ("held-out accuracy", f"{totals.eval_first:.3f} before, {totals.eval_last:.3f} after"),
        ("mean reward", f"{totals.reward_first:.3f} first step, {totals.reward_last:.3f} last step"),
        ("response tokens", f"{totals.tokens:,} in {totals.steps} steps"),
        ("tokens that differ", f"{totals.mismatch_count:,}"),
        ("max |Δ log-prob|", f"{totals.logp_abs_diff_max:.3g}"),
        ("seconds", seconds),
        ("final weights", f"SHA-256 {run.facts['final_weights_sha256']}"),
        ("run folder", f"{run.folder.path}: config, metrics, samples, checkpoints, summary.json"),
    ]
    tracked = getattr(run.sink, "folder", None)
    return rows if tracked is None else [*rows, ("look at it", f"wandb leet {tracked}")]
