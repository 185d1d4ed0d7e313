"""Pairs of two dumps' sequences, by id or by order, of files that need not fit into memory.

In the same order nothing is kept. A sequence whose partner hasn't come yet waits; when those that wait are many, both
sides are written to temporary files by a hash of the id, and joined file by file.
"""

from __future__ import annotations

import pickle
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import BinaryIO

from rlalign.verifier.dumps.ids import Ids
from rlalign.verifier.dumps.record import DumpSequence

_WAITING_TOKENS = 2_000_000
_BUCKETS = 64
# ids and bookkeeping of a sequence, in tokens' worth of memory
_SEQUENCE_TOKENS = 60


@dataclass(frozen=True, slots=True)
class Pair:
    """A sequence of each side; None where one side doesn't have it."""

    rollout: DumpSequence | None
    train: DumpSequence | None

    @property
    def either(self) -> DumpSequence:
        return self.rollout or self.train  # type: ignore[return-value]


def join_by_order(rollout: Iterator[DumpSequence], train: Iterator[DumpSequence]) -> Iterator[Pair]:
    """The n-th with the n-th."""
    for a, b in zip_longest(rollout, train):
        yield Pair(a, b)


def join_by_id(
    rollout: Iterator[DumpSequence], train: Iterator[DumpSequence], *, waiting_tokens: int = _WAITING_TOKENS
) -> Iterator[Pair]:
    """Those of one id, as soon as both are there; those without a partner last.

    waiting_tokens: how many tokens may wait in memory. Raises ValueError naming both places for an id that one side has
    twice.
    """
    waiting: tuple[dict[str, DumpSequence], dict[str, DumpSequence]] = ({}, {})
    seen = [Ids(way_out=" (or compare by order)") for _ in range(2)]
    tokens = 0
    with tempfile.TemporaryDirectory(prefix="rlalign-") as folder:
        spill: _Spill | None = None
        for side, sequence in _alternately(rollout, train):
            seen[side].add(sequence)
            partner = waiting[1 - side].pop(sequence.id, None)
            if partner is not None:
                tokens -= _weight(partner)
                yield Pair(*((sequence, partner) if side == 0 else (partner, sequence)))
                continue
            if spill is not None:
                spill.write(side, sequence)
                continue
            waiting[side][sequence.id] = sequence
            tokens += _weight(sequence)
            if tokens > waiting_tokens:
                spill = _Spill(Path(folder))
                for which in (0, 1):
                    for held in waiting[which].values():
                        spill.write(which, held)
                    waiting[which].clear()
        yield from _matched(waiting) if spill is None else spill.read()


def _alternately(a: Iterator[DumpSequence], b: Iterator[DumpSequence]) -> Iterator[tuple[int, DumpSequence]]:
    for left, right in zip_longest(a, b):
        if left is not None:
            yield 0, left
        if right is not None:
            yield 1, right


def _matched(waiting: tuple[dict[str, DumpSequence], dict[str, DumpSequence]]) -> Iterator[Pair]:
    rollout, train = waiting
    for name, sequence in rollout.items():
        yield Pair(sequence, train.pop(name, None))
    for sequence in train.values():
        yield Pair(None, sequence)


def _weight(sequence: DumpSequence) -> int:
    return sequence.num_tokens + _SEQUENCE_TOKENS


class _Spill:
    """Sequences in temporary files of this process, by side and by a hash of the id."""

    def __init__(self, folder: Path) -> None:
        self._paths = [[folder / f"{side}-{bucket}" for bucket in range(_BUCKETS)] for side in (0, 1)]
        self._files: list[list[BinaryIO]] = [[path.open("wb") for path in paths] for paths in self._paths]

    def write(self, side: int, sequence: DumpSequence) -> None:
        file = self._files[side][zlib.crc32(sequence.id.encode()) % _BUCKETS]
        pickle.dump(sequence, file, protocol=pickle.HIGHEST_PROTOCOL)

    def read(self) -> Iterator[Pair]:
        for file in (file for files in self._files for file in files):
            file.close()
        for bucket in range(_BUCKETS):
            waiting = tuple(
                {sequence.id: sequence for sequence in _unpickled(self._paths[side][bucket])} for side in (0, 1)
            )
            yield from _matched(waiting)  # type: ignore[arg-type]
            for side in (0, 1):
                self._paths[side][bucket].unlink()


def _unpickled(path: Path) -> Iterator[DumpSequence]:
    with path.open("rb") as file:
        while file.peek(1):
            yield pickle.load(file)
