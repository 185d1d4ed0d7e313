"""From a comparison to what the pictures need of it: the seam between verifier and dashboards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rlalign.dashboards.pictures import PictureData, Trace
from rlalign.dashboards.snapshot import LayerRow
from rlalign.records import Sample
from rlalign.verifier.compare import Comparison
from rlalign.verifier.layers import LayerCheck
from rlalign.verifier.report import Report, record, worst_first

_MAX_TRACE = 512


def picture_data(
    comparison: Comparison,
    report: Report,
    samples: Sequence[Sample],
    *,
    decode: Callable[[Sequence[int]], str] | None = None,
    full: bool = True,
) -> PictureData:
    """What the pictures show of a comparison of ``samples``, given in the order of its pairs.

    decode: token ids to text; without it a trace shows ids. Without ``full`` there are no worst tokens and no trace,
    which a snapshot that is not ``full`` leaves out. Raises ValueError if the counts disagree.
    """
    if comparison.num_samples != len(samples):
        raise ValueError(f"comparison holds {comparison.num_samples} samples, got {len(samples)}")
    return PictureData(
        rollout=comparison.rollout,
        train=comparison.train,
        delta=comparison.delta,
        nonfinite=comparison.nonfinite,
        worst=[record(token) for token in report.worst] if full else (),
        position=comparison.position,
        trace=worst_trace(comparison, samples, decode) if full else None,
    )


def layer_row(found: LayerCheck) -> LayerRow:
    """A column of the heat map layer by step."""
    return LayerRow(tuple(found.sites[order].module for order in found.stations), found.max_ulp)


def worst_trace(
    comparison: Comparison,
    samples: Sequence[Sample],
    decode: Callable[[Sequence[int]], str] | None = None,
) -> Trace | None:
    """Both log-probs along the sample of the worst token, at most 512 tokens around it; of the longest if all agree.

    None if nothing was compared.
    """
    if comparison.num_tokens == 0:
        return None
    worst = worst_first(comparison)
    longest = np.bincount(comparison.sample).argmax()
    at = int(worst[0]) if len(worst) else int(np.searchsorted(comparison.sample, longest))
    index = int(comparison.sample[at])
    begin, end = np.searchsorted(comparison.sample, (index, index + 1)).tolist()
    begin = max(begin, min(at - _MAX_TRACE // 2, end - _MAX_TRACE))
    end = min(end, begin + _MAX_TRACE)
    sample, positions = samples[index], comparison.position[begin:end]
    return Trace(
        name="/".join(map(str, sample.key)),
        positions=positions,
        rollout=comparison.rollout[begin:end],
        train=comparison.train[begin:end],
        tokens=tuple(_token(sample.completion.token_ids, p, decode) for p in positions.tolist()),
    )


def _token(ids: np.ndarray, position: int, decode: Callable[[Sequence[int]], str] | None) -> str:
    if position >= len(ids):
        return "(no token)"
    token = int(ids[position])
    return str(token) if decode is None else decode([token]).replace("\n", "⏎")
