"""A step's comparison of both sides, the periodic checks included: report, metrics, and what the pictures need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from rlalign.config import AlignConfig
from rlalign.dashboards.pictures import PictureData
from rlalign.dashboards.snapshot import LayerRow
from rlalign.records import Sample
from rlalign.run.pictures import layer_row, picture_data
from rlalign.verifier.compare import compare_samples
from rlalign.verifier.full_vocabulary import FullVocabulary, check_full_vocabulary
from rlalign.verifier.layers import LayerCheck, check_layers
from rlalign.verifier.metrics import Provenance, align_metrics
from rlalign.verifier.periodic import Excerpt, Inspects, choose_excerpts, due
from rlalign.verifier.report import Report, build_report

Sides = Callable[[Sequence[str], Sequence[Excerpt]], tuple[Inspects, Inspects]]
"""Given which digests of which excerpts they will be asked for, so that they begin together: (rollout, trainer)."""


@dataclass(frozen=True, slots=True)
class Checks:
    """What the periodic checks of a step found; None for one that was not due."""

    full_vocabulary: FullVocabulary | None = None
    layers: LayerCheck | None = None

    @property
    def beyond(self) -> tuple[str, ...]:
        """A line for each that differs."""
        done = [check for check in (self.full_vocabulary, self.layers) if check is not None]
        lines = [check.verdict for check in done if not check.equal]
        vocabulary, layers = self.full_vocabulary, self.layers
        if vocabulary and not vocabulary.equal and layers and layers.equal:  # no module's output is the logits
            lines.append(f"{layers.verdict}: the output layer (weight, bias, soft cap or operator) differs")
        return tuple(lines)

    def metrics(self) -> dict[str, float]:
        done = [check for check in (self.full_vocabulary, self.layers) if check is not None]
        return {name: value for check in done for name, value in check.metrics().items()}


@dataclass(frozen=True, slots=True)
class Compared:
    """pictures: made when they are wanted, ``full`` or not (``picture_data``).

    layers: the step's column of the heat map layer by step; None without a bisection.
    """

    report: Report
    metrics: dict[str, float]
    pictures: Callable[..., PictureData]
    layers: LayerRow | None


def run_checks(
    config: AlignConfig,
    samples: Sequence[Sample],
    sides: Sides,
    *,
    seed: int,
    step: int,
) -> Checks:
    """The checks that are due in ``step``. sides: called only if one is."""
    vocabulary, layers = due(config.full_vocab_every, step), due(config.bisect_every, step)
    if not vocabulary and not layers:
        return Checks()
    excerpts = choose_excerpts(samples, count=config.check_sequences, tokens=config.check_tokens, seed=seed, step=step)
    if not excerpts:  # no sample has a response: the comparison itself says so
        return Checks()
    wanted = [what for what, it_is in (("logit_digests", vocabulary), ("site_digests", layers)) if it_is]
    rollout, train = sides(wanted, excerpts)
    return Checks(
        check_full_vocabulary(rollout, train, excerpts, positions=config.full_vocab_positions) if vocabulary else None,
        check_layers(rollout, train, excerpts) if layers else None,
    )


def compare_step(
    samples: Sequence[Sample],
    train_logprobs: Sequence[np.ndarray],
    *,
    config: AlignConfig,
    checks: Checks,
    advantages: Sequence[np.ndarray],
    provenance: Provenance,
    decode: Callable[[Sequence[int]], str],
) -> Compared:
    """Both sides bit for bit, with what ``checks`` found beyond the sampled tokens."""
    comparison = compare_samples(samples, train_logprobs)
    report = build_report(comparison, samples, worst_tokens=config.worst_tokens, decode=decode)
    return Compared(
        replace(report, beyond=checks.beyond),
        align_metrics(comparison, advantages=advantages, provenance=provenance) | checks.metrics(),
        partial(picture_data, comparison, report, samples, decode=decode),
        None if checks.layers is None else layer_row(checks.layers),
    )
