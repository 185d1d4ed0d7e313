"""A step on which rollout and trainer differed, written so that ``rlalign-verify replay`` can look into it later.

mismatches/step_00003/
    replay.json          settings, versions, and how each request was sampled
    rollout.jsonl        every sequence of the step with the rollout's log-probs, as docs/dumps.md has it
    train.jsonl          the same with the trainer's
    weights/             the trainer's weights in that moment, an ordinary Hugging Face folder
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rlalign.config import Config, config_to_dict
from rlalign.dashboards.jsonl import to_json
from rlalign.records import Sample
from rlalign.run.facts import git_commit, versions
from rlalign.verifier.dumps import DumpSequence, write_dump

FORMAT = 1
SaveWeights = Callable[[Path], Mapping[str, Any]]
"""Writes the trainer's weights to a new folder; returns their ``version`` and ``sha256``, and ``synced_sha256``:
that of the weights which the engines were last given."""


def keep_mismatch(
    parent: Path, step: int, max_dumps: int, write: Callable[[Path], Path], say: Callable[[str], None]
) -> None:
    """Write the step's folder below ``parent``, unless ``max_dumps`` others are there; say how it is replayed."""
    folder = parent / f"step_{step:05d}"
    if len([path for path in parent.glob("step_*") if path != folder]) >= max_dumps:
        return
    shutil.rmtree(folder, ignore_errors=True)  # of the same step, before a resume
    say(f"replay it with: rlalign-verify replay {write(folder)}")


def write_mismatch(
    folder: Path,
    samples: Sequence[Sample],
    train_logprobs: Sequence[np.ndarray],
    *,
    verdict: str,
    config: Config,
    plan: Mapping[str, str],
    save_weights: SaveWeights | None = None,
) -> Path:
    """Write the step's folder; returns its ``replay.json``. Without ``save_weights`` a replay needs weights by hand.

    All samples are kept, those that agree too: ordinary operators depend on what else is in a batch.
    """
    folder.mkdir(parents=True)
    weights = None if save_weights is None else {"path": "weights", **save_weights(folder / "weights")}
    write_dump(folder / "rollout.jsonl", _sequences(samples, [sample.completion.logprobs for sample in samples]))
    write_dump(folder / "train.jsonl", _sequences(samples, train_logprobs))
    content = {
        "format": FORMAT,
        "verdict": verdict,
        "weights": weights,
        "plan": dict(plan),
        "samples": [_request(sample) for sample in samples],
        "config": config_to_dict(config),
        "versions": versions(),
        "git_commit": git_commit(),
    }
    path = folder / "replay.json"
    path.write_text(json.dumps(to_json(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def _sequences(samples: Sequence[Sample], logprobs: Sequence[np.ndarray]) -> Iterator[DumpSequence]:
    for sample, values in zip(samples, logprobs, strict=True):
        completion, length = sample.completion, len(sample.completion.token_ids)
        # as many as there are tokens: a missing one is NaN, one too many belongs to no token
        fitted = np.full(length, np.nan, np.float32)
        fitted[: len(values)] = values[:length]
        yield DumpSequence(
            id="/".join(map(str, sample.key)),
            prompt_token_ids=np.asarray(completion.prompt_ids, np.int64),
            token_ids=np.asarray(completion.token_ids, np.int64),
            logprobs=fitted,
            sampling=sample.sampling,
            processed=True,
            weights_version=completion.weights_version,
            finish_reason=completion.finish_reason,
            text=completion.text,
        )


def _request(sample: Sample) -> dict[str, Any]:
    step, prompt_id, index = sample.key
    return {
        "id": "/".join(map(str, sample.key)),
        "step": step,
        "prompt_id": prompt_id,
        "sample": index,
        "seed": sample.completion.seed,
        "weights_version": sample.completion.weights_version,
        "finish_reason": sample.completion.finish_reason,
        "batch_sizes": sample.completion.batch_sizes.tolist(),
        "sampling": asdict(sample.sampling),
    }
