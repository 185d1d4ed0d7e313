"""AdamW on masters: PyTorch's own as the reference, plus what it doesn't do (rounding, accumulation, refusal)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rlalign.config import TrainerConfig
from rlalign.trainer import MasterAdamW
from rlalign.trainer.optimizer import trainable_parameters


class Tiny(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.to(dtype)

    def loss(self, seed: int) -> torch.Tensor:
        ids = torch.randint(11, (6,), generator=torch.Generator().manual_seed(seed))
        return self.head(self.norm(self.embed(ids))).float().logsumexp(-1).square().mean()


def make(model: nn.Module, **settings: float) -> MasterAdamW:
    return MasterAdamW(trainable_parameters(model), TrainerConfig(**settings), total_steps=10)


def test_agrees_with_pytorch_on_float32() -> None:
    ours, theirs = Tiny(), Tiny()
    optimizer = make(ours, lr=1e-2, weight_decay=0.1, grad_clip=0.5, beta1=0.8, beta2=0.9, eps=1e-6)
    matrices = [p for p in theirs.parameters() if p.dim() >= 2]
    vectors = [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.9), eps=1e-6)
    for step in range(5):
        ours.loss(step).backward()
        optimizer.accumulate()
        metrics = optimizer.apply()
        reference.zero_grad()
        theirs.loss(step).backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        assert norm > 0.5, "the clip must be at work"
        reference.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine, other, rtol=1e-5, atol=1e-7)


def test_tied_weights_have_one_master_and_frozen_ones_none() -> None:
    model = Tiny()
    assert sorted(trainable_parameters(model)) == ["embed.weight", "norm.bias", "norm.weight"]
    model.norm.requires_grad_(False)
    assert sorted(trainable_parameters(model)) == ["embed.weight"]


def test_parameters_are_masters_rounded_to_the_compute_dtype() -> None:
    model = Tiny(torch.bfloat16)
    optimizer = make(model, lr=1e-5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(4):
        model.loss(step).backward()
        optimizer.accumulate()
        optimizer.apply()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, optimizer.masters[name].bfloat16())
    # Updates far below a bfloat16 step survive in the masters.
    assert torch.equal(model.norm.weight, before["norm.weight"])
    assert not torch.equal(optimizer.masters["norm.weight"], before["norm.weight"].float())


def test_an_update_says_what_share_of_the_weights_it_changed() -> None:
    model = Tiny(torch.bfloat16)
    optimizer = make(model, lr=1e-5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.loss(0).backward()
    optimizer.accumulate()
    found = optimizer.apply()["weights_changed_frac"]
    changed = {name: int((p != before[name]).sum()) for name, p in model.named_parameters()}
    assert changed["norm.weight"] == 0 < changed["embed.weight"] < 88, "too small for some of them"
    assert found == sum(changed.values()) / (88 + 8 + 8)
    assert optimizer.copy_to_parameters() == 0.0


def test_without_a_learning_rate_nothing_changes() -> None:
    model = Tiny()
    optimizer = make(model, lr=1e-3, schedule="cosine", min_lr_ratio=0.0)
    shares = []
    for step in range(12):  # the schedule ends after 10
        model.loss(step).backward()
        optimizer.accumulate()
        shares.append(optimizer.apply())
    assert [one["weights_changed_frac"] > 0 for one in shares] == [one["lr"] > 0 for one in shares]
    assert shares[-1]["lr"] == 0 and shares[-1]["grad_norm"] > 0


def test_gradients_add_up_in_float32_and_are_freed() -> None:
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = MasterAdamW({"w": parameter}, TrainerConfig(grad_clip=1e9), total_steps=1)
    for value in (256.0, 1.0, 1.0):
        parameter.grad = torch.tensor([value], dtype=torch.bfloat16)
        optimizer.accumulate()
        assert parameter.grad is None
    assert optimizer.grad_norm() == 258.0  # in bfloat16 256 + 1 is 256


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_updates_nothing(bad: float) -> None:
    model = Tiny()
    optimizer = make(model)
    before = optimizer.masters_sha256()
    model.loss(0).backward()
    model.norm.bias.grad[3] = bad
    optimizer.accumulate()
    with pytest.raises(FloatingPointError, match="at update 0"):
        optimizer.apply()
    assert (optimizer.masters_sha256(), optimizer.num_updates) == (before, 0)
    assert all(torch.equal(p, optimizer.masters[name]) for name, p in model.named_parameters())


def test_an_update_needs_a_gradient() -> None:
    optimizer = make(Tiny())
    with pytest.raises(RuntimeError, match="without a gradient"):
        optimizer.apply()
    optimizer.accumulate()
    optimizer.discard()
    with pytest.raises(RuntimeError, match="without a gradient"):
        optimizer.apply()


def test_state_restores_bit_for_bit() -> None:
    def run(optimizer: MasterAdamW, model: Tiny, steps: range) -> None:
        for step in steps:
            model.loss(step).backward()
            optimizer.accumulate()
            optimizer.apply()

    settings = {"lr": 1e-2, "weight_decay": 0.1, "warmup_steps": 2, "schedule": "cosine"}
    straight, other = Tiny(), Tiny()
    whole, first = make(straight, **settings), make(other, **settings)
    run(whole, straight, range(6))
    run(first, other, range(3))
    saved = {name: tensor.clone() for name, tensor in first.state().items()}
    resumed = Tiny()
    with torch.no_grad():
        resumed.norm.weight.fill_(9.0)
    second = make(resumed, **settings)
    second.load_state(saved, num_updates=3)
    run(second, resumed, range(3, 6))
    assert second.masters_sha256() == whole.masters_sha256()


def test_state_of_another_model_is_refused() -> None:
    optimizer = make(Tiny())
    state = optimizer.state()
    with pytest.raises(ValueError, match="first 'master/extra'"):
        optimizer.load_state({**state, "master/extra": torch.zeros(1)}, num_updates=0)
    with pytest.raises(ValueError, match=r"'exp_avg/norm.bias': got torch.float32 \(2,\)"):
        optimizer.load_state({**state, "exp_avg/norm.bias": torch.zeros(2)}, num_updates=0)
    optimizer.accumulate()
    with pytest.raises(RuntimeError, match="between updates"):
        optimizer.state()


def test_the_hash_knows_name_dtype_shape_and_bytes() -> None:
    base = make(Tiny())
    assert base.masters_sha256() == make(Tiny()).masters_sha256()
    with torch.no_grad():
        base.masters["norm.bias"].view(torch.int32)[0] ^= 1
    assert base.masters_sha256() != make(Tiny()).masters_sha256()
