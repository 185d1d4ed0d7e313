"""What the recipes share around and within their loops; what is theirs is the step between rollout and verification."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from sft import check_files, held_out, validated, warm_start

from rlalign.actors import Controller
from rlalign.actors.controller import Rollout
from rlalign.actors.process import attention_of, set_up, settled
from rlalign.config import Config
from rlalign.generators import Generators
from rlalign.modeling import load_tokenizer
from rlalign.records import Sample, derive_seed
from rlalign.run import Run, check_estimator, prompts_of_step, resumed_config
from rlalign.tasks import Task, make_task, score_samples
from rlalign.trainer.checkpoint import existing_folder
from rlalign.verifier.metrics import Provenance

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Job:
    """What a loop works with. ``first_step``: 1, or the one after the checkpoint's of a resumed run."""

    run: Run
    actors: Controller
    task: Task
    tokenizer: PreTrainedTokenizerBase
    first_step: int


def read_config(settings: DictConfig) -> Config:
    """Validated settings; with ``run.resume`` those of that run, and this command line's on top."""
    config = validated(settings)
    if config.run.resume is not None:
        config = resumed_config(config.run.resume, HydraConfig.get().overrides.task)
    check_files(config)
    attention_of(config)
    return config


@contextmanager
def started(recipe: str, config: Config, *, estimator: str) -> Iterator[Job]:
    """Around a loop: folder, actors, weights and the first evaluation before it, the summary after it.

    ``estimator`` is the ``algorithm.adv_estimator`` that the recipe computes; another one is a ValueError.
    """
    check_estimator(config, recipe, estimator)
    actors = Controller(config)
    with Run(recipe, config, find_checkpoint=existing_folder) as run, actors:
        checkpoint = _initial_checkpoint(config, run)
        tokenizer = load_tokenizer(checkpoint)
        task = make_task(config.task, tokenizer, seed=config.run.seed)
        if actors.device == "cuda" and config.numerics == "invariant":
            run.progress.say(
                "getting the GPU's kernels ready; the first run on a machine compiles them for two minutes"
            )
        actors.load(checkpoint)
        done = run.restore(actors.trainer)
        actors.sync_weights()
        run.facts |= actors.facts()
        job = Job(run, actors, task, tokenizer, first_step=done + 1)
        with run.saved_on_interrupt(actors.trainer), settled():
            # before the first step, or where an interrupt came in between
            if run.evaluation_due():
                run.evaluated(evaluate(actors, task, run), actors.trainer)
                if done > 0:
                    run.save(actors.trainer)
            yield job
        run.facts |= actors.facts()
        run.finish(actors.trainer.masters_sha256())


def roll_out(job: Job, step: int) -> Rollout:
    """The step's prompts, sampled. Says which could not be served; ValueError if none could."""
    config = job.run.config
    prompts = prompts_of_step(
        job.task.prompts("train"), step=step, count=config.algorithm.prompts_per_step, seed=config.run.seed
    )
    rollout = job.actors.generate(prompts, step=step, plant_fault=_fault(config, step) == "kv_page")
    job.run.note_failed(rollout.failed, served=len(rollout.samples))
    return rollout


def begin_batch(job: Job, samples: Sequence[Sample], step: int) -> None:
    """Hand the batch to the trainer, with the fault that the settings plant there."""
    job.actors.begin_batch(samples)
    if (fault := _fault(job.run.config, step)) in ("trainer_weight", "position"):
        job.run.progress.say(f"fault planted: {job.actors.trainer.plant_fault(fault)}")


def check(job: Job, samples: Sequence[Sample], step: int) -> None:
    """All logits and every layer's output of a few sequences, both sides, every so many steps; ``verify`` judges."""
    job.run.check(samples, partial(job.actors.inspectors, step))


def verify(
    job: Job, samples: Sequence[Sample], train_logprobs: Sequence[np.ndarray], advantages: Sequence[np.ndarray]
) -> None:
    """Compare both sides bit for bit. Raises MismatchHalt where the run must stop."""
    config = job.run.config
    provenance = Provenance(
        trainer_version=job.actors.trainer_version,
        weights_equal=job.actors.weights_equal,
        weights_version=job.actors.weights_version,
        correction=config.align.correction,
    )
    decode = job.tokenizer.decode
    job.run.verify(
        samples,
        train_logprobs,
        advantages=advantages,
        provenance=provenance,
        decode=decode,
        save_weights=lambda path: {
            **job.actors.trainer.save_weights(path),
            "synced_sha256": job.actors.weights_sha256,
        },
    )


def after_step(job: Job, step: int) -> None:
    """Evaluate and write a checkpoint where they are due."""
    if job.run.evaluation_due():
        job.run.evaluated(evaluate(job.actors, job.task, job.run), job.actors.trainer)
    if step == job.run.config.run.steps or step % job.run.config.run.save_every == 0:
        job.run.save(job.actors.trainer)


def evaluate(actors: Controller, task: Task, run: Run) -> float:
    """Mean reward of greedy responses to held-out prompts. Raises ValueError if one can't be served or is missing."""
    prompts = held_out(task, run.config)
    greedy = replace(run.config.sampling, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
    rollout = actors.generate(prompts, step=0, sampling=greedy)
    if rollout.failed:
        raise ValueError(f"held-out {rollout.failed[0]}")
    # generators of its own, so that no evaluation reaches a reward of training
    with Generators(derive_seed(run.config.run.seed, run.totals.steps)):
        return sum(sample.reward for sample in score_samples(task, rollout.samples)) / len(prompts)


def _initial_checkpoint(config: Config, run: Run) -> Path:
    """``model.path``, or a small model made on the spot and warmed up by ``recipes/sft.py``."""
    if config.model.path is not None:
        return config.model.path
    if config.run.resume is None:
        set_up(config.cluster.threads)
        warm_start(config, run.folder.initial, say=run.progress.say)
    return run.folder.initial


def _fault(config: Config, step: int) -> str:
    return config.align.fault.kind if step == config.align.fault.step else "none"
