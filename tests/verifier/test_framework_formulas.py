"""The metrics that other frameworks define, by their formulas: padded batches, masks, torch, float64.

B sequences, T positions; the mask tells which hold a response token.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlalign.dashboards.aliases import ALIASES
from rlalign.verifier.compare import LogprobPair, compare
from rlalign.verifier.metrics import align_metrics

LENGTHS = (7, 1, 12, 30)


@pytest.fixture(scope="module")
def sides() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rollout, train, mask), [B, T]: some tokens equal, some half a nat apart."""
    random = np.random.default_rng(5)
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    rollout = torch.from_numpy(-random.exponential(size=mask.shape).astype(np.float32))
    noise = torch.from_numpy(random.normal(size=mask.shape).astype(np.float32)) * (rollout < -0.3) * 0.5
    return rollout, rollout + noise, mask


@pytest.fixture(scope="module")
def ours(sides: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> dict[str, float]:
    rollout, train, _ = sides
    return align_metrics(
        compare([LogprobPair(rollout[b, :n].numpy(), train[b, :n].numpy(), n) for b, n in enumerate(LENGTHS)])
    )


def verl(rollout: torch.Tensor, train: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    rollout, train = rollout.double(), train.double()
    p_train, p_rollout = train.exp()[mask], rollout.exp()[mask]
    difference = (p_rollout - p_train).abs()
    log_ratio, count = train - rollout, mask.sum(dim=1)
    per_sequence = [(side * mask).sum(dim=1) / count for side in (train, rollout)]
    log_ppl = per_sequence[1] - per_sequence[0]
    return {
        "training/rollout_probs_diff_max": difference.max(),
        "training/rollout_probs_diff_mean": difference.mean(),
        "training/rollout_probs_diff_std": difference.std(),
        "training/rollout_actor_probs_pearson_corr": torch.corrcoef(torch.stack([p_rollout, p_train]))[0, 1],
        "rollout_corr/kl": -log_ratio[mask].mean(),
        "rollout_corr/k3_kl": (log_ratio.exp() - log_ratio - 1)[mask].mean(),
        "rollout_corr/chi2_token": log_ratio.exp().square()[mask].mean() - 1,
        "rollout_corr/chi2_seq": (2 * (log_ratio * mask).sum(dim=1)).exp().mean() - 1,
        "rollout_corr/training_ppl": (-per_sequence[0]).exp().mean(),
        "rollout_corr/rollout_ppl": (-per_sequence[1]).exp().mean(),
        "rollout_corr/ppl_ratio": log_ppl.exp().mean(),
        "rollout_corr/log_ppl_abs_diff": log_ppl.abs().mean(),
    }


def trl(rollout: torch.Tensor, train: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    difference = (train.double() - rollout.double()).abs()[mask]
    return {
        "sampling/sampling_logp_difference/mean": difference.mean(),
        "sampling/sampling_logp_difference/max": difference.max(),
    }


def slime(rollout: torch.Tensor, train: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """With its loss per token; by default it averages every sample first."""
    return {"train/train_rollout_logprob_abs_diff": (train.double() - rollout.double()).abs()[mask].mean()}


@pytest.mark.parametrize(("framework", "formulas"), [("verl", verl), ("trl", trl), ("slime", slime)])
def test_every_alias_of_agreement_is_the_frameworks_number(
    sides: tuple[torch.Tensor, torch.Tensor, torch.Tensor], ours: dict[str, float], framework: str, formulas: object
) -> None:
    theirs = formulas(*sides)
    names = {name: mine for name, mine in ALIASES[framework].items() if mine.startswith("align/")}
    assert names.keys() == theirs.keys()
    for name, mine in names.items():
        assert ours[mine] == pytest.approx(float(theirs[name]), rel=1e-6), name


def test_the_effective_sample_size_is_verls_of_weights_that_nothing_cut(
    sides: tuple[torch.Tensor, torch.Tensor, torch.Tensor], ours: dict[str, float]
) -> None:
    rollout, train, mask = sides
    weights = (train.double() - rollout.double()).exp()[mask]
    expected = 1 / (weights / weights.mean()).square().mean()
    assert ours["align/ess"] == pytest.approx(float(expected), rel=1e-6)


def test_the_deviation_of_one_token_is_0() -> None:
    found = align_metrics(compare([LogprobPair(np.float32([-1.0]), np.float32([-1.5]), 1)]))
    assert found["align/logp_abs_diff/std"] == found["align/prob_abs_diff/std"] == 0.0
