"""PPO through the trainer: the critic learns, apart from the policy, and its values ignore packing."""

from __future__ import annotations

import numpy as np
import pytest
from support.models import tiny_model
from support.samples import make_samples
from support.trainers import GAE, make_policy, make_trainer, ppo_step

from rlalign.config import AlgorithmConfig, TrainerConfig
from rlalign.modeling import Policy, align
from rlalign.trainer import Critic, Trainer

SHAPES = [(3, 4), (1, 1), (5, 2), (2, 6), (4, 3), (1, 9)]


def test_first_values_are_zero_and_later_ones_ignore_packing() -> None:
    samples = make_samples(SHAPES)
    results = []
    for budget in (5, 1000):
        trainer = make_trainer(algorithm=GAE, micro_batch_tokens=budget)
        assert all((v == 0).all() for v in trainer.compute_values(samples))
        # A head that is not 0; gradients themselves may depend on packing.
        trainer.critic.head_weight.data.copy_(trainer.critic.backbone.head.weight[:1])
        results.append([v.tobytes() for v in trainer.compute_values(samples)])
    assert results[0] == results[1]


def test_the_critic_learns_the_return() -> None:
    trainer, samples = make_trainer(algorithm=GAE, lr=1e-4), make_samples(SHAPES)
    first = ppo_step(trainer, samples)
    for step in range(1, 4):
        last = ppo_step(trainer, samples, step)
    assert last["critic/squared_error"] < first["critic/squared_error"]
    assert last["critic/lr"] == 1e-2
    assert last["lr"] == 1e-4


def test_ppo_is_deterministic_and_keeps_its_models_apart() -> None:
    samples = make_samples(SHAPES)
    hashes = []
    for _ in range(2):
        trainer = make_trainer(algorithm=GAE)
        ppo_step(trainer, samples)
        hashes.append((trainer.masters_sha256(), trainer.critic_sha256()))
        assert trainer.version == 4
        assert not any("critic" in name or name.startswith("head") for name in trainer.weights()[0])
    assert hashes[0] == hashes[1]
    assert hashes[0][0] != hashes[0][1]


def test_critic_gradients_do_not_touch_the_policy() -> None:
    trainer, samples = make_trainer(algorithm=GAE), make_samples(SHAPES)
    before = trainer.masters_sha256(), trainer.critic_sha256()
    ones = [np.ones(n, np.float32) for _, n in SHAPES]
    zeros = [np.zeros(n, np.float32) for _, n in SHAPES]
    trainer.accumulate(samples, zeros, old_logprobs=trainer.compute_logprobs(samples), values=zeros, returns=ones)
    trainer.apply_update()
    assert trainer.masters_sha256() == before[0]
    assert trainer.critic_sha256() != before[1]


def test_a_frozen_output_embedding_is_not_the_critics() -> None:
    names = Critic(make_policy()).named_parameters()
    assert {"head.weight", "head.bias", "backbone.model.embed_tokens.weight"} <= names.keys()
    assert "backbone.lm_head.weight" not in names
    untied = Critic(Policy(align(tiny_model("llama"), backend="reference"))).named_parameters()
    assert "backbone.model.embed_tokens.weight" in untied
    assert "backbone.lm_head.weight" not in untied


def test_missing_and_useless_parts_are_refused() -> None:
    gae, grpo = AlgorithmConfig(adv_estimator="gae"), AlgorithmConfig()
    with pytest.raises(ValueError, match="adv_estimator=gae needs a critic"):
        Trainer(make_policy(), TrainerConfig(), gae, total_steps=1)
    with pytest.raises(ValueError, match="adv_estimator=grpo would not use the critic"):
        Trainer(make_policy(), TrainerConfig(), grpo, total_steps=1, critic=Critic(make_policy()))
    with pytest.raises(ValueError, match=r"kl_coef=0\.5 needs a reference"):
        Trainer(make_policy(), TrainerConfig(), AlgorithmConfig(kl_coef=0.5), total_steps=1)
    samples = make_samples(SHAPES)
    zeros = [np.zeros(n, np.float32) for _, n in SHAPES]
    with pytest.raises(ValueError, match="values is missing"):
        make_trainer(algorithm=GAE).accumulate(samples, zeros, old_logprobs=zeros)
