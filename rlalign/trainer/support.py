"""The kept supports of one batch, compact, held constant through all its epochs.

After an update a sampled token could fall out of a recomputed top-k or top-p set, and its log-prob would be -inf.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlalign.records import Sample

Key = tuple[int, int, int]
DEFAULT_MAX_BYTES = 4 * 2**30


@dataclass(frozen=True, slots=True)
class _IdLists:
    """Kept ids, ascending within a row: ids int32 [K], row i holding ids[bounds[i]:bounds[i + 1]]."""

    ids: np.ndarray
    bounds: np.ndarray
    vocab_size: int

    @property
    def num_bytes(self) -> int:
        return self.ids.nbytes + self.bounds.nbytes

    def unpack(self) -> np.ndarray:
        support = np.zeros((len(self.bounds) - 1, self.vocab_size), dtype=bool)
        rows = np.repeat(np.arange(len(self.bounds) - 1), np.diff(self.bounds))
        support[rows, self.ids] = True
        return support


@dataclass(frozen=True, slots=True)
class _Bits:
    """One bit per id: uint8 [L, ceil(V / 8)]."""

    bits: np.ndarray
    vocab_size: int

    @property
    def num_bytes(self) -> int:
        return self.bits.nbytes

    def unpack(self) -> np.ndarray:
        return np.unpackbits(self.bits, axis=1, count=self.vocab_size).view(bool)


class SupportStore:
    """Supports bool [L, V] by sample key, each as id lists or bits, whichever is smaller, in host memory."""

    def __init__(self, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._entries: dict[Key, _IdLists | _Bits] = {}

    def __contains__(self, sample: Sample) -> bool:
        return sample.key in self._entries

    def put(self, sample: Sample, support: Tensor) -> None:
        """Keep ``support`` bool [L, V] of ``sample``, replacing what was there. MemoryError above ``max_bytes``."""
        entry = _compact(support.cpu().numpy())
        old = self._entries.get(sample.key)
        num_bytes = self.num_bytes + entry.num_bytes - (old.num_bytes if old else 0)
        if num_bytes > self.max_bytes:
            raise MemoryError(
                f"the kept supports of this batch need more than {self.max_bytes} bytes: sample fewer tokens per "
                "step, or with a smaller top_k"
            )
        self._entries[sample.key], self.num_bytes = entry, num_bytes

    def get(self, sample: Sample) -> Tensor:
        """The support that was put, bool [L, V] on the CPU. KeyError when there is none."""
        return torch.from_numpy(self._entries[sample.key].unpack())

    def clear(self) -> None:
        self._entries.clear()
        self.num_bytes = 0


def _compact(support: np.ndarray) -> _IdLists | _Bits:
    length, vocab_size = support.shape
    kept = support.sum(axis=1, dtype=np.int64)
    # int32 ids against one bit per id: lists win below 1 kept id in 32.
    if 4 * int(kept.sum()) + 8 * (length + 1) < length * ((vocab_size + 7) // 8):
        bounds = np.concatenate([[0], np.cumsum(kept)]).astype(np.int64)
        return _IdLists(np.nonzero(support)[1].astype(np.int32), bounds, vocab_size)
    return _Bits(np.packbits(support, axis=1), vocab_size)
