"""What the dashboard shows, as data: five sections, read from top to bottom.

A metric belongs to the first panel that lists it, by name or by a prefix ending in ``*``. The sink turns this table
into wandb's metric definitions; docs/metrics.md explains each key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Section = Literal["Agreement", "Where", "Policy", "Performance", "Reward"]
STEP = "step"


@dataclass(frozen=True, slots=True)
class Panel:
    """Metrics that belong side by side. summary: what wandb keeps of the whole run; None is the last value."""

    section: Section
    title: str
    metrics: tuple[str, ...]
    summary: str | None = None


PANELS: tuple[Panel, ...] = (
    Panel("Agreement", "tokens that differ", ("align/mismatch_count", "align/nonfinite_count"), "max,last"),
    Panel("Agreement", "share of equal tokens", ("align/bitwise_match_frac",), "min,last"),
    Panel("Agreement", "largest difference", ("align/logp_abs_diff/max", "align/ulp/max", "align/prob_abs_diff/max"),
          "max,last"),
    Panel("Agreement", "whole vocabulary", ("align/full_vocab/*",)),
    Panel("Agreement", "outputs of layers", ("align/bisect/*",)),
    Panel("Agreement", "same weights", ("align/weights_equal",), "min,last"),
    Panel("Agreement", "weights version", ("align/weights_version", "align/policy_age/*")),
    Panel("Where", "pictures", ("where/*",)),
    Panel("Where", "spread", ("align/logp_abs_diff/*", "align/logp_diff/*", "align/ulp/*", "align/prob_abs_diff/*",
                              "align/prob_pearson")),
    Panel("Policy", "divergence", ("align/k1", "align/k3", "align/k3_max", "align/mult_prob_error", "align/chi2/*",
                                   "align/ppl/*", "align/log_ppl_abs_diff")),
    Panel("Policy", "importance ratio", ("align/ratio_raw/*", "align/ratio_frac_modified", "align/ess",
                                         "correction/*")),
    Panel("Policy", "early warning", ("align/adv_skew",)),
    Panel("Policy", "optimisation", ("entropy", "grad_norm", "lr", "weights_changed_frac", "clip_frac", "kl_ref",
                                     "loss", "ratio/*", "approx_kl", "critic/*")),
    Panel("Performance", "seconds by phase", ("perf/seconds/*",)),
    Panel("Performance", "seconds of a step", ("perf/step_seconds",)),
    Panel("Performance", "tokens per second", ("perf/rollout_tokens_per_s", "perf/train_tokens_per_s")),
    Panel("Performance", "model FLOPs utilisation", ("perf/mfu",)),
    Panel("Performance", "engine", ("perf/engine/*",)),
    Panel("Reward", "reward", ("reward/*",)),
    Panel("Reward", "held-out prompts", ("eval/*",)),
    Panel("Reward", "responses", ("response_length/*", "rollout/failed")),
)  # fmt: skip


def panel_of(metric: str) -> Panel | None:
    """The panel of a metric; an exact name wins over a prefix. None if no panel lists it."""
    for matches in (_names, _covers):
        for panel in PANELS:
            if any(matches(pattern, metric) for pattern in panel.metrics):
                return panel
    return None


def definitions() -> list[tuple[str, str | None]]:
    """(pattern, summary) of every metric, exact names before prefixes: what ``define_metric`` is called with."""
    pairs = [(pattern, panel.summary) for panel in PANELS for pattern in panel.metrics]
    return sorted(pairs, key=lambda pair: pair[0].endswith("*"))


def _names(pattern: str, metric: str) -> bool:
    return pattern == metric


def _covers(pattern: str, metric: str) -> bool:
    return pattern.endswith("*") and metric.startswith(pattern[:-1])
