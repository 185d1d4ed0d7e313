"""Supervised steps: Hugging Face's cross-entropy, the same under any micro-batch, and it learns."""

from __future__ import annotations

import pytest
import torch
from support.models import tiny_model
from support.trainers import make_policy

from rlalign.config import TrainerConfig
from rlalign.trainer import SftTrainer

Pairs = list[tuple[list[int], list[int]]]


def pairs() -> Pairs:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(97, (length,), generator=generator).tolist()

    return [(ids(p), ids(n)) for p, n in [(3, 4), (1, 1), (5, 2), (2, 0), (4, 6)]]


def hugging_face_loss() -> float:
    model, total, count = tiny_model("qwen3"), 0.0, 0
    for prompt, answer in pairs():
        if answer:
            labels = torch.tensor([[-100] * len(prompt) + answer])
            with torch.no_grad():
                total += float(model(torch.tensor([prompt + answer]), labels=labels).loss) * len(answer)
            count += len(answer)
    return total / count


@pytest.mark.parametrize("budget", [1, 8, 1000])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_loss_is_the_mean_over_answer_tokens(backend: str, budget: int) -> None:
    trainer = SftTrainer(make_policy(backend), TrainerConfig(micro_batch_tokens=budget), total_steps=1)
    metrics = trainer.step(pairs())
    assert metrics["loss"] == pytest.approx(hugging_face_loss(), rel=1e-4)
    assert metrics["tokens"] == 13


def test_it_learns_the_answers_the_same_way_every_time() -> None:
    hashes = set()
    for checkpointing in (False, False, True):
        config = TrainerConfig(lr=1e-2, micro_batch_tokens=10, gradient_checkpointing=checkpointing)
        trainer = SftTrainer(make_policy(), config, total_steps=5)
        losses = [trainer.step(pairs())["loss"] for _ in range(5)]
        assert losses[-1] < 0.5 * losses[0]
        hashes.add(trainer.optimizer.masters_sha256())
    assert len(hashes) == 1


def test_bad_batches_are_refused() -> None:
    trainer = SftTrainer(make_policy(), TrainerConfig(), total_steps=1)
    with pytest.raises(ValueError, match="no answer token"):
        trainer.step([([1, 2], [])])
    with pytest.raises(ValueError, match="pair 1: response token id 97"):
        trainer.step([([1, 2], [3]), ([1], [97])])
    with pytest.raises(ValueError, match="pair 0 has an empty prompt"):
        trainer.step([([], [3])])
