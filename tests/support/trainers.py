"""Tiny policies, trainers and one PPO step, for tests that need a trainer and not its details."""

from __future__ import annotations

from typing import Any

import torch

from rlalign.algorithms.estimate import estimate_gae
from rlalign.algorithms.minibatches import split_minibatches
from rlalign.config import AlgorithmConfig, Correction, TrainerConfig
from rlalign.modeling import Policy, align
from rlalign.records import Sample
from rlalign.trainer import Critic, Trainer
from support.models import tiny_model

GAE = {"adv_estimator": "gae", "gae_lambda": 1.0, "value_clip": 10.0, "critic_lr": 1e-2, "epochs": 2, "minibatches": 2}


def make_policy(backend: str = "reference", dtype: torch.dtype = torch.float32, seed: int = 0) -> Policy:
    """A tiny Qwen3 with tied embeddings; the same seed gives the same weights."""
    return Policy(align(tiny_model("qwen3", dtype, seed), backend=backend))


def make_trainer(
    backend: str = "reference",
    dtype: torch.dtype = torch.float32,
    algorithm: dict[str, Any] | None = None,
    eos_ids: tuple[int, ...] | None = None,
    correction: Correction | None = None,
    **settings: Any,
) -> Trainer:
    """Trainer of a fresh tiny policy; keywords are those of TrainerConfig, ``algorithm`` those of AlgorithmConfig."""
    config = AlgorithmConfig(**(algorithm or {}))
    gae, kl = config.adv_estimator == "gae", config.kl_coef > 0
    return Trainer(
        make_policy(backend, dtype),
        TrainerConfig(**settings),
        config,
        total_steps=10,
        critic=Critic(make_policy(backend, dtype, seed=1)) if gae else None,
        reference=make_policy(backend, dtype, seed=2) if kl else None,
        eos_ids=eos_ids,
        correction=correction,
    )


def choose_tokens(samples: list[Sample], rank: int = 1) -> list[Sample]:
    """The same samples with every token the tiny policy's choice of that rank: inside any support that keeps more."""
    model = tiny_model("qwen3")
    for sample in samples:
        ids = torch.from_numpy(sample.completion.prompt_ids)
        for place in range(len(sample.completion.token_ids)):
            with torch.no_grad():
                token = model(ids.unsqueeze(0)).logits[0, -1].argsort(descending=True)[rank]
            sample.completion.token_ids[place] = int(token)
            ids = torch.cat([ids, token[None]])
    return samples


def ppo_step(trainer: Trainer, samples: list[Sample], step: int = 0) -> dict[str, float]:
    """One batch: score, estimate, several epochs of minibatches."""
    trainer.begin_batch()
    old, values = trainer.compute_logprobs(samples), trainer.compute_values(samples)
    estimate = estimate_gae(samples, trainer.algorithm, values)
    metrics: dict[str, float] = {}
    for epoch in range(trainer.algorithm.epochs):
        for part in split_minibatches(len(samples), trainer.algorithm.minibatches, seed=10 * step + epoch):
            result = trainer.accumulate(
                [samples[i] for i in part],
                [estimate.advantages[i] for i in part],
                old_logprobs=[old[i] for i in part],
                values=[values[i] for i in part],
                returns=[estimate.returns[i] for i in part],
            )
            metrics = {**result.metrics, **trainer.apply_update()}
    return metrics
