"""What a launch of attention's "triton" backend starts from: the problem, tensors as kernels read them, work space."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

import torch
from triton.runtime import driver

from rlalign_kernels.attention.schedules import Shape
from rlalign_kernels.gpu import BOX_ALIGNMENT, architecture
from rlalign_kernels.triton_math import LOG2E


class Masking(NamedTuple):
    """Which keys a query at position i sees: i - left <= j <= i + right, None being no bound; and the soft cap."""

    scale: float
    left: int | None = None
    right: int | None = None
    softcap: float | None = None

    @property
    def multiplier(self) -> float:
        """c: from scores, or from their tanh, to exponents of 2."""
        return (self.scale if self.softcap is None else self.softcap) * LOG2E.value

    @property
    def cap_scale(self) -> float:
        """From scores to the argument of tanh."""
        return 0.0 if self.softcap is None else self.scale / self.softcap


class Keys(NamedTuple):
    """Where the keys are: packed by ``cu_seqlens``, or on pages by ``block_tables`` and ``kv_lens``."""

    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens: torch.Tensor | None = None
    block_tables: torch.Tensor | None = None
    kv_lens: torch.Tensor | None = None
    max_seqlen: int | None = None

    @property
    def page_size(self) -> int:
        """0 where keys are packed."""
        return 0 if self.block_tables is None else self.k.shape[1]

    @property
    def longest(self) -> int:
        """No sequence has more keys; as close as shapes tell where the caller does not."""
        if self.max_seqlen is not None:
            return self.max_seqlen
        return self.k.shape[0] if self.block_tables is None else self.block_tables.shape[1] * self.page_size


def shape_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Shape:
    """Of one layer: q [T, Hq, D], k [..., Hkv, D], v [..., Hkv, Dv]."""
    return Shape(q.shape[-1], v.shape[-1], q.shape[1] // k.shape[-2], q.dtype, architecture(q.device))


def layout(x: torch.Tensor) -> Hashable:
    """All of a tensor that a launch, or a refusal, depends on, except where it is."""
    return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % BOX_ALIGNMENT == 0


def integers(x: torch.Tensor) -> Hashable:
    """Of offsets, lengths and page tables."""
    return x.shape, x.stride(), x.dtype, x.device


# By device and stream: how many floats and counters there are, and those.
_SPACES: dict[tuple[int, int], tuple[int, int, torch.Tensor, torch.Tensor]] = {}


def workspace(device: torch.device, num_floats: int, num_counters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Floats for the splits' states, and counters that are 0 between launches: one pair per stream, growing.

    While a graph is captured it gets its own, for its replays may run beside anything.
    """
    if device.type != "cuda":
        return _space(device, num_floats, num_counters)
    if torch.cuda.is_current_stream_capturing():
        return _space(device, num_floats, num_counters)
    # Triton's way to the stream takes a tenth of torch's time
    key = (device.index, driver.active.get_current_stream(device.index))
    has_floats, has_counters, floats, counters = _SPACES.get(key, (-1, -1, None, None))
    if has_floats < num_floats or has_counters < num_counters:
        has_floats, has_counters = max(has_floats, num_floats), max(has_counters, num_counters)
        floats, counters = _space(device, has_floats, has_counters)
        _SPACES[key] = (has_floats, has_counters, floats, counters)
    return floats, counters


def _space(device: torch.device, num_floats: int, num_counters: int) -> tuple[torch.Tensor, torch.Tensor]:
    floats = torch.empty(num_floats, dtype=torch.float32, device=device)
    return floats, torch.zeros(num_counters, dtype=torch.int32, device=device)
