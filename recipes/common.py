"""What the recipes share around their loops: settings from hydra, the first checkpoint, held-out accuracy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from sft import warm_start

from rlalign.actors import Controller
from rlalign.config import Config, config_from_dict
from rlalign.run import Run, resumed_config
from rlalign.tasks import Task, score_samples


def read_config(settings: DictConfig) -> Config:
    """Validated settings; with ``run.resume`` those of that run, and this command line's on top."""
    config = config_from_dict(OmegaConf.to_container(settings, resolve=True, throw_on_missing=True))
    if config.run.resume is None:
        return config
    return resumed_config(config.run.resume, HydraConfig.get().overrides.task)


def initial_checkpoint(config: Config, run: Run) -> Path:
    """``model.path``, or a small model made on the spot and warmed up by ``recipes/sft.py``."""
    if config.model.path is not None:
        return config.model.path
    if config.run.resume is None:
        torch.set_num_threads(config.cluster.threads)
        warm_start(config, run.folder.initial, say=run.progress.say)
    return run.folder.initial


def evaluate(actors: Controller, task: Task, config: Config) -> float:
    """Mean reward of greedy responses to held-out prompts. Raises ValueError if one can't be served."""
    prompts = task.prompts("eval")[: config.eval.num_prompts]
    greedy = replace(config.sampling, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
    rollout = actors.generate(prompts, step=0, sampling=greedy)
    if rollout.failed:
        raise ValueError(f"held-out {rollout.failed[0]}")
    return sum(sample.reward for sample in score_samples(task, rollout.samples)) / len(prompts)
