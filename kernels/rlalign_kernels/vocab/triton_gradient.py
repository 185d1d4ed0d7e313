"""The gradient of log-probs: logits are computed again, a part of the vocabulary at a time.

Per part of the ids, ascending: the loss's gradient at its logits, rounded to the weights' dtype; of it the part's
weight gradient, one product over all rows; and one more term of the hidden gradient's float32 sum. Products are
cuBLAS's, its sums in float32: run to run the same bits on one packing, which is all that is promised of gradients.
Besides the gradients themselves it takes at most ``MOST_BYTES``, whatever T and V. More rows than fit are taken in
parts, and their logits are computed once for each of the two gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from rlalign_kernels.gemm.triton_calls import float32_sums
from rlalign_kernels.vocab.plan import HEAD_PLAN
from rlalign_kernels.vocab.triton_launches import Cut, Head, Settings, logit_gradients

_LOGIT_BYTES = 256 * 2**20
_SUM_BYTES = 512 * 2**20
MOST_BYTES = _LOGIT_BYTES + _SUM_BYTES
_MOST_ROWS = 2**16


class Scored(NamedTuple):
    """What the gradient needs besides weights and hidden rows; see ``triton_launches.logit_gradients``."""

    settings: Settings | None
    mask: torch.Tensor | None
    cut: Cut | None
    targets: torch.Tensor
    kept: torch.Tensor
    stats: torch.Tensor
    upstream: torch.Tensor
    has_entropy: bool


class _Parts:
    """Gradients at the logits of some rows and ids, in one buffer that is used again and again."""

    def __init__(self, hidden: torch.Tensor, head: Head, scored: Scored) -> None:
        num_rows, depth = hidden.shape
        self.hidden, self.head, self.scored = hidden, head, scored
        self.rows = max(1, min(num_rows, _MOST_ROWS, _SUM_BYTES // (4 * depth)))
        fitting = min(_LOGIT_BYTES // (self.rows * hidden.element_size()), _SUM_BYTES // (4 * depth))
        self.ids = min(-(-head.vocab_size // 256) * 256, max(HEAD_PLAN.block, fitting // 256 * 256))
        self.buffer = torch.empty(self.rows, self.ids, dtype=hidden.dtype, device=hidden.device)

    def row_slices(self) -> list[slice]:
        return _slices(self.hidden.shape[0], self.rows)

    def id_slices(self) -> list[slice]:
        return _slices(self.head.vocab_size, self.ids)

    def at(self, rows: slice, ids: slice) -> torch.Tensor:
        """[rows, ids] in hidden's dtype; valid until the next call."""
        scored = self.scored
        out = self.buffer[: rows.stop - rows.start, : ids.stop - ids.start]
        logit_gradients(
            self.hidden[rows], self.head.part(ids), _of_rows(scored.settings, rows),
            None if scored.mask is None else scored.mask[rows, ids],
            None if scored.cut is None else scored.cut.part(rows), scored.targets[rows], scored.kept[rows],
            scored.stats[:, rows], scored.upstream[:, rows], ids.start, out, has_entropy=scored.has_entropy,
        )  # fmt: skip
        return out


def _slices(size: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _of_rows(settings: Settings | None, rows: slice) -> Settings | None:
    return None if settings is None else Settings(*(x[rows] for x in settings))


def gradients(
    hidden: torch.Tensor, head: Head, scored: Scored, needs: tuple[bool, bool, bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Of hidden [T, H], weight [V, H] and bias [V], in their dtype; None where ``needs`` says so."""
    results = [torch.empty_like(x, memory_format=torch.contiguous_format) if need else None
               for x, need in zip((hidden, head.weight, head.bias), needs, strict=True)]  # fmt: skip
    if hidden.shape[0] == 0:
        return tuple(None if x is None else x.zero_() for x in results)
    with float32_sums():
        _fill(_Parts(hidden, head, scored), *results)
    return tuple(results)


def _fill(
    parts: _Parts,
    grad_hidden: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
    grad_bias: torch.Tensor | None,
) -> None:
    rows = parts.row_slices()
    if len(rows) == 1:
        for _, ids, part in _ascending(parts, rows, grad_hidden):
            if grad_weight is not None:
                torch.mm(part.t(), parts.hidden, out=grad_weight[ids])
            if grad_bias is not None:
                grad_bias[ids] = part.sum(0, dtype=torch.float32)
        return
    if grad_hidden is not None:
        for _ in _ascending(parts, rows, grad_hidden):
            pass
    if grad_weight is not None or grad_bias is not None:
        _by_ids(parts, rows, grad_weight, grad_bias)


def _ascending(
    parts: _Parts, rows: list[slice], grad_hidden: torch.Tensor | None
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Fill grad_hidden, and give each (rows, ids, gradient at their logits) on the way."""
    weight = parts.head.weight
    for chosen in rows:
        total = None
        for ids in parts.id_slices():
            part = parts.at(chosen, ids)
            if grad_hidden is not None:
                total = _add_product(total, part, weight[ids])
            yield chosen, ids, part
        if grad_hidden is not None:
            grad_hidden[chosen] = total


def _by_ids(parts: _Parts, rows: list[slice], grad_weight: torch.Tensor | None, grad_bias: torch.Tensor | None) -> None:
    """Weight and bias gradients of more rows than one part holds."""
    for ids in parts.id_slices():
        total = bias_total = None
        for chosen in rows:
            part = parts.at(chosen, ids)
            if grad_weight is not None:
                total = _add_product(total, part.t(), parts.hidden[chosen])
            if grad_bias is not None:
                bias = part.sum(0, dtype=torch.float32)
                bias_total = bias if bias_total is None else bias_total + bias
        if grad_weight is not None:
            grad_weight[ids] = total
        if grad_bias is not None:
            grad_bias[ids] = bias_total


def _add_product(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """float32 total + a @ b, in place; total None counts as zeros."""
    if a.dtype != torch.float32 and a.device.type == "cpu":  # Triton's interpreter: no such product there
        a, b = a.float(), b.float()
    if a.dtype == torch.float32:
        return torch.mm(a, b) if total is None else total.addmm_(a, b)
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
