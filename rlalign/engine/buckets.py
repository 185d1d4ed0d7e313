"""Which steps a CUDA graph can serve, and a step's arrays in the fixed shapes that it wants. No tensors.

A graph's shapes are those of its bucket: rows, one per sequence, and a bound of their lengths, both powers of two.
Rows that are missing are padded: they have no keys, and what they write goes to a page that no sequence ever holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from rlalign.engine.scheduler import ScheduledStep

# Keys: attention goes through so many in one go, and a smaller bound saves it nothing.
_SHORTEST_BOUND = 1024


class Bucket(NamedTuple):
    """Rows of a step, and a length that none of its sequences exceeds."""

    num_rows: int
    max_length: int


def decodes_only(step: ScheduledStep) -> bool:
    """Whether every sequence computes one token and draws the next: no prefill, nothing that forks."""
    return bool(step.chunks) and all(chunk.num_tokens == chunk.num_draws == 1 for chunk in step.chunks)


def bucket_of(num_rows: int, longest: int, *, max_num_seqs: int, max_length: int) -> Bucket:
    """The smallest bucket that holds the step; the largest ones are as large as the engine's limits, no larger."""
    rows = max(num_rows, min(_power_of_two(num_rows), max_num_seqs))
    return Bucket(rows, max(longest, min(_power_of_two(max(longest, _SHORTEST_BOUND)), max_length)))


def padded_forward(
    arrays: Mapping[str, np.ndarray], bucket: Bucket, *, page_size: int, spare_page: int
) -> dict[str, np.ndarray]:
    """``batch_inputs.forward_arrays`` of a decode step in the bucket's shapes. Page copies are not among them."""
    num_rows, _ = bucket
    present = len(arrays["kv_lens"])
    spare = spare_page * page_size + np.arange(num_rows - present) % page_size
    block_tables = np.zeros((num_rows, -(-bucket.max_length // page_size)), np.int32)
    block_tables[:present, : arrays["block_tables"].shape[1]] = arrays["block_tables"]
    return {
        "token_ids": _padded(arrays["token_ids"], num_rows, 0),
        "position_ids": _padded(arrays["position_ids"], num_rows, 0),
        "slot_mapping": np.concatenate([arrays["slot_mapping"], spare]),
        "block_tables": block_tables,
        "cu_seqlens_q": np.arange(num_rows + 1, dtype=np.int32),
        "kv_lens": _padded(arrays["kv_lens"], num_rows, 0),
        "drawn_rows": np.arange(num_rows),
        "page_copies": np.zeros((2, 0), np.int64),
    }


# A padded row's settings are in bounds and filter nothing: what it draws is never looked at.
_NEUTRAL = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "seeds": 0, "positions": 0}


def padded_sampling(arrays: Mapping[str, np.ndarray], num_rows: int) -> dict[str, np.ndarray]:
    """Those of ``batch_inputs.draw_arrays`` that have an entry per row, with ``num_rows`` of them."""
    return {name: _padded(arrays[name], num_rows, value) for name, value in _NEUTRAL.items()}


def _padded(values: np.ndarray, count: int, value: int) -> np.ndarray:
    return np.concatenate([values, np.full(count - len(values), value, values.dtype)])


def _power_of_two(count: int) -> int:
    """The smallest one that is not below ``count`` >= 1."""
    return 1 << (count - 1).bit_length()
