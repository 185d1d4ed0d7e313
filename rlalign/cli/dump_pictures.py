"""The pictures of a stream: every piece's snapshot, merged into one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rlalign.dashboards.pictures import PictureData
from rlalign.dashboards.snapshot import Snapshot, merge_positions, take_snapshot
from rlalign.verifier.stream.pieces import Piece

_MAX_POINTS = 1000


class Pictures:
    """Takes pieces of a comparison; ``snapshot`` is what their pictures show, None before the first."""

    def __init__(self) -> None:
        self.snapshot: Snapshot | None = None

    def add(self, piece: Piece) -> None:
        """Merge one piece."""
        data = PictureData(piece.rollout, piece.train, piece.delta, piece.nonfinite, (), position=piece.position)
        new = take_snapshot(data)
        old, self.snapshot = self.snapshot, new
        if old is None or old.positions is None or new.positions is None:
            return
        histogram = replace(
            new.histogram,
            zero=old.histogram.zero + new.histogram.zero,
            nonfinite=old.histogram.nonfinite + new.histogram.nonfinite,
            counts=old.histogram.counts + new.histogram.counts,
        )
        self.snapshot = replace(
            new,
            num_tokens=old.num_tokens + new.num_tokens,
            histogram=histogram,
            positions=merge_positions([old.positions, new.positions]),
            points=_chosen(old, new),
        )


def _chosen(old: Snapshot, new: Snapshot) -> np.ndarray:
    """Of both sides' points the half that differ most, and an even choice of the rest."""
    points = np.concatenate([old.points, new.points], axis=1)
    if points.shape[1] <= _MAX_POINTS:
        return points
    order = np.argsort(-np.abs(points[1] - points[0]), kind="stable")
    most, rest = np.split(order, [_MAX_POINTS // 2])
    even = rest[np.linspace(0, len(rest) - 1, _MAX_POINTS - len(most)).astype(np.int64)]
    return points[:, np.concatenate([most, even])]
