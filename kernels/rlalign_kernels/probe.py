"""Measure at start-up what a run's operators may do on this machine, instead of at first use."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from rlalign_kernels.conformance import CONFORMANCE
from rlalign_kernels.norm import probe_norm
from rlalign_kernels.reference.attention import products
from rlalign_kernels.reference.elementwise import FUNCTIONS, elementwise
from rlalign_kernels.reference.gemm import N_BLOCK, ROW_TILE, gemm_schedule
from rlalign_kernels.reference.vocab import VOCAB_BLOCK


def probe(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    """Probe every (operator, shape) and return all verdicts of this process, JSON-ready.

    Shapes: ("linear", (N, K)), ("rms_norm", (H,)), ("linear_logprob", (V, H)), ("attention", (D, Dv, query heads per
    key head)). Element-wise functions are always probed. Raises RuntimeError naming operator and shape where this
    machine offers no invariant schedule, ValueError for an unknown operator.
    """
    # Those first: a vector library makes its choice at its first call, which should be on one thread.
    for name in FUNCTIONS:
        elementwise(name, torch.ones(1))
    for operator, shape in shapes:
        if operator not in _PROBES:
            raise ValueError(f"probe: operator {operator!r} is unknown; supported: {', '.join(_PROBES)}")
        _PROBES[operator](*shape)
    return CONFORMANCE.report()


def _probe_columns(width: int, depth: int, block: int) -> None:
    for size in {min(width, block), width % block or min(width, block)}:
        gemm_schedule(max(size, ROW_TILE), depth)


def _probe_attention(head_dim: int, value_dim: int, group: int) -> None:
    found = products(head_dim, value_dim)
    for rows in found.row_counts(group):
        for keys in found.key_widths(rows):
            found.schedules(rows, keys)


_PROBES: dict[str, Callable[..., None]] = {
    "linear": lambda width, depth: _probe_columns(width, depth, N_BLOCK),
    "rms_norm": probe_norm,
    "linear_logprob": lambda vocab_size, depth: _probe_columns(vocab_size, depth, VOCAB_BLOCK),
    "attention": _probe_attention,
}
