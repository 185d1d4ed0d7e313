"""Our values under the names of other frameworks, so that a dashboard made for one of them works unchanged.

Only where the definition is the same: docs/metrics.md has ours. A value is never renamed, it is logged once more.
TRL's ``sampling/importance_sampling_ratio/*`` isn't here: it is taken after the correction, by default of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

Framework = Literal["verl", "trl", "slime"]

# framework: its name to ours
ALIASES: Mapping[Framework, Mapping[str, str]] = {
    "verl": {
        "training/rollout_probs_diff_max": "align/prob_abs_diff/max",
        "training/rollout_probs_diff_mean": "align/prob_abs_diff/mean",
        "training/rollout_probs_diff_std": "align/prob_abs_diff/std",
        "training/rollout_actor_probs_pearson_corr": "align/prob_pearson",
        "rollout_corr/kl": "align/k1",
        "rollout_corr/k3_kl": "align/k3",
        "rollout_corr/chi2_token": "align/chi2/token",
        "rollout_corr/chi2_seq": "align/chi2/seq",
        "rollout_corr/training_ppl": "align/ppl/train",
        "rollout_corr/rollout_ppl": "align/ppl/rollout",
        "rollout_corr/ppl_ratio": "align/ppl/ratio",
        "rollout_corr/log_ppl_abs_diff": "align/log_ppl_abs_diff",
        "critic/score/mean": "reward/mean",
        "critic/score/max": "reward/max",
        "critic/score/min": "reward/min",
        "response_length/clip_ratio": "response_length/cut_frac",
        "actor/entropy": "entropy",
        "actor/grad_norm": "grad_norm",
        "actor/lr": "lr",
        "actor/pg_clipfrac": "clip_frac",
        "actor/kl_loss": "kl_ref",
        "timing_s/gen": "perf/seconds/rollout",
        "timing_s/reward": "perf/seconds/reward",
        "timing_s/step": "perf/step_seconds",
    },
    "trl": {
        "sampling/sampling_logp_difference/mean": "align/logp_abs_diff/mean",
        "sampling/sampling_logp_difference/max": "align/logp_abs_diff/max",
        "reward": "reward/mean",
        "frac_reward_zero_std": "reward/no_signal_frac",
        "completions/mean_length": "response_length/mean",
        "completions/max_length": "response_length/max",
        "completions/clipped_ratio": "response_length/cut_frac",
        "clip_ratio/region_mean": "clip_frac",
        "learning_rate": "lr",
        "kl": "kl_ref",
    },
    "slime": {
        "train/train_rollout_logprob_abs_diff": "align/logp_abs_diff/mean",
        "train/grad_norm": "grad_norm",
        "train/pg_clipfrac": "clip_frac",
        "train/kl_loss": "kl_ref",
        "rollout/raw_reward": "reward/mean",
        "perf/rollout_time": "perf/seconds/rollout",
        "perf/step_time": "perf/step_seconds",
    },
}


def aliased(metrics: Mapping[str, float], frameworks: Sequence[Framework]) -> dict[str, float]:
    """What ``metrics`` are called elsewhere; those that a step doesn't have are left out."""
    return {
        theirs: metrics[ours]
        for framework in frameworks
        for theirs, ours in ALIASES[framework].items()
        if ours in metrics
    }
