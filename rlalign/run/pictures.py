"""From a comparison to what the pictures need of it: the seam between verifier and dashboards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rlalign.dashboards.pictures import PictureData, Trace
from rlalign.dashboards.snapshot import LayerRow
from rlalign.verifier.compare import Comparison
from rlalign.verifier.layers import LayerCheck
from rlalign.verifier.report import Report, record, worst_first

_MAX_TRACE = 512


def picture_data(
    comparison: Comparison,
    report: Report,
    *,
    names: Sequence[str],
    token_ids: Sequence[np.ndarray],
    decode: Callable[[Sequence[int]], str] | None = None,
) -> PictureData:
    """What the pictures show of ``comparison``. names, token_ids (int64 [L] each): of its pairs, in their order.

    decode: token ids to text; without it a trace shows ids. Raises ValueError if the counts disagree.
    """
    if not len(names) == len(token_ids) == comparison.num_samples:
        raise ValueError(
            f"{len(names)} names and {len(token_ids)} lists of token ids for {comparison.num_samples} samples"
        )
    return PictureData(
        rollout=comparison.rollout,
        train=comparison.train,
        delta=comparison.delta,
        nonfinite=comparison.nonfinite,
        worst=[record(token) for token in report.worst],
        position=comparison.position,
        trace=worst_trace(comparison, names, token_ids, decode),
    )


def layer_row(found: LayerCheck) -> LayerRow:
    """A column of the heat map layer by step."""
    return LayerRow(tuple(found.sites[order].module for order in found.stations), found.max_ulp)


def worst_trace(
    comparison: Comparison,
    names: Sequence[str],
    token_ids: Sequence[np.ndarray],
    decode: Callable[[Sequence[int]], str] | None = None,
) -> Trace | None:
    """Both log-probs along the sample of the worst token, at most 512 tokens around it; of the longest if all agree.

    None if nothing was compared.
    """
    if comparison.num_tokens == 0:
        return None
    worst = worst_first(comparison)
    sizes = np.bincount(comparison.sample, minlength=comparison.num_samples)
    at = int(worst[0]) if len(worst) else int(np.searchsorted(comparison.sample, sizes.argmax()))
    sample = int(comparison.sample[at])
    begin, end = np.searchsorted(comparison.sample, (sample, sample + 1)).tolist()
    begin = max(begin, min(at - _MAX_TRACE // 2, end - _MAX_TRACE))
    end = min(end, begin + _MAX_TRACE)
    return Trace(
        name=names[sample],
        positions=comparison.position[begin:end],
        rollout=comparison.rollout[begin:end],
        train=comparison.train[begin:end],
        tokens=tuple(_token(token_ids[sample], int(p), decode) for p in comparison.position[begin:end]),
    )


def _token(ids: np.ndarray, position: int, decode: Callable[[Sequence[int]], str] | None) -> str:
    if position >= len(ids):
        return "(no token)"
    token = int(ids[position])
    return str(token) if decode is None else decode([token]).replace("\n", "⏎")
