"""What the recipes share around their loops: settings from hydra, the first checkpoint, held-out accuracy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from sft import held_out, warm_start

from rlalign.actors import Controller
from rlalign.actors.process import set_up
from rlalign.config import Config, config_from_dict
from rlalign.generators import Generators
from rlalign.records import derive_seed
from rlalign.run import Run, resumed_config
from rlalign.tasks import Task, score_samples


def read_config(settings: DictConfig) -> Config:
    """Validated settings; with ``run.resume`` those of that run, and this command line's on top."""
    config = config_from_dict(OmegaConf.to_container(settings, resolve=True, throw_on_missing=True))
    if config.run.resume is not None:
        config = resumed_config(config.run.resume, HydraConfig.get().overrides.task)
    _check_files(config)
    return config


def initial_checkpoint(config: Config, run: Run) -> Path:
    """``model.path``, or a small model made on the spot and warmed up by ``recipes/sft.py``."""
    if config.model.path is not None:
        return config.model.path
    if config.run.resume is None:
        set_up(config.cluster.threads)
        warm_start(config, run.folder.initial, say=run.progress.say)
    return run.folder.initial


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


def _check_files(config: Config) -> None:
    """Say what is missing before anything is started. Raises FileNotFoundError."""
    if config.model.path is not None and not (config.model.path / "config.json").is_file():
        raise FileNotFoundError(f"model.path={config.model.path}: no such folder, or no config.json in it")
    for name in ("path", "eval_path"):
        file = getattr(config.task, name)
        if file is not None and not file.is_file():
            raise FileNotFoundError(f"task.{name}={file}: no such file")
