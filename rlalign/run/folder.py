"""A run's folder.

config.yaml          every setting, resolved
metrics.jsonl        one line per step
pictures.jsonl       what the pictures of each step show, reduced: 0.3-3 KB a step, 30-60 KB every tracking.media_every
samples/             step_00001.jsonl, …: every sample with its reward
checkpoints/         initial (a model made on the spot), last, best: Hugging Face folders
wandb/               the offline run
mismatches/          step_00003, …: steps that differed, to be replayed (rlalign/run/mismatch.py)
mismatch.json        worst tokens of the last step that differed, if one did
summary.json         what it came to
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from rlalign.config import Config, config_to_dict
from rlalign.dashboards.jsonl import to_json
from rlalign.records import Sample


class RunFolder:
    """Paths inside one folder, and the files that are written there once or once per step."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.pictures = self.path / "pictures.jsonl"
        self.samples = self.path / "samples"
        self.summary = self.path / "summary.json"
        self.mismatch = self.path / "mismatch.json"
        self.mismatches = self.path / "mismatches"
        self.initial, self.last, self.best = (self.path / "checkpoints" / name for name in ("initial", "last", "best"))

    @classmethod
    def create(cls, recipe: str, config: Config) -> RunFolder:
        """A new folder: ``run.dir``, or a fresh one under ``runs/``. Raises ValueError if a run is there already."""
        folder = cls(config.run.dir or _fresh(Path("runs"), f"{recipe}-{datetime.now():%Y%m%d-%H%M%S}"))
        if folder.config.exists():
            raise ValueError(
                f"run.dir={folder.path} holds a run already: continue it with run.resume, choose another folder, "
                "or delete this one to start over"
            )
        folder.begin(config)
        return folder

    @classmethod
    def existing(cls, path: Path, find_checkpoint: Callable[[Path], Path]) -> RunFolder:
        """The folder of a run that may go on; nothing is written. FileNotFoundError if it has no checkpoint."""
        folder = cls(path)
        try:
            find_checkpoint(folder.last)
        except FileNotFoundError as error:
            start_over = f"nothing to continue from; delete the folder and start again with run.dir={path}"
            raise FileNotFoundError(f"run.resume={path}: {error}: {start_over}") from None
        return folder

    def begin(self, config: Config) -> None:
        """Write the settings of a run that begins or goes on here."""
        self.samples.mkdir(parents=True, exist_ok=True)
        self.config.write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False), encoding="utf-8")

    def finished_steps(self) -> int | None:
        """Steps of the run that finished here, as its summary says; None if it didn't."""
        if not self.summary.is_file():
            return None
        summary = json.loads(self.summary.read_text(encoding="utf-8"))
        return summary["steps"] if summary.get("status") == "finished" else None

    def write_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """All samples of a step, one per line, in order of key."""
        lines = [json.dumps(_row(sample), ensure_ascii=False) for sample in samples]
        (self.samples / f"step_{step:05d}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def write_json(self, path: Path, content: dict[str, Any]) -> None:
        """Strict JSON; NaN and infinities are strings."""
        path.write_text(json.dumps(to_json(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _fresh(parent: Path, name: str) -> Path:
    """A folder that doesn't exist yet: two runs may start within one second."""
    candidates = (parent / (name if number == 1 else f"{name}-{number}") for number in range(1, 1000))
    return next(path for path in candidates if not path.exists())


def _row(sample: Sample) -> dict[str, Any]:
    step, prompt_id, index = sample.key
    completion = sample.completion
    return {
        "step": step,
        "prompt_id": prompt_id,
        "sample": index,
        "prompt": sample.prompt.text,
        "completion": completion.text,
        "ground_truth": sample.prompt.ground_truth,
        "reward": sample.reward,
        "tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "weights_version": completion.weights_version,
        "seed": completion.seed,
    }
