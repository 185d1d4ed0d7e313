"""Log-sum-exp, entropy and target logits over the vocabulary, in absolute blocks of 1,024 merged in ascending order.

Per block: m' = max(m, max z); d = z - m'; p = exp(d); alpha = exp(m - m'); l = l alpha + tree(p);
e = (e + (m - m') l) alpha + tree(p d). Then logsumexp = m + log l and entropy = log l - e / l.
Ids outside the support have z = -inf, hence p = 0: an untruncated row and a row with a full support share every bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rlalign_kernels.reference.elementwise import elementwise, tree_sum
from rlalign_kernels.reference.gemm import product_nt

VOCAB_BLOCK = 1024
FLOOR = -1e30
# exp(d) is exactly 0 below this; the clamp keeps 0 * (-inf) out of the entropy.
_ZERO_EXP = -200.0


@dataclass(frozen=True)
class Head:
    """The output layer: weight [V, H] in compute dtype, bias [V] or None, soft cap or None."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    softcap: float | None

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def blocks(self) -> range:
        return range(0, self.vocab_size, VOCAB_BLOCK)

    def logits(self, hidden: torch.Tensor, start: int) -> torch.Tensor:
        """float32 [r, <= 1024] of hidden float32 [r, H], for the block at vocabulary id ``start``."""
        logits = product_nt(hidden, self.weight[start : start + VOCAB_BLOCK].float())
        if self.bias is not None:
            logits += self.bias[start : start + VOCAB_BLOCK]
        if self.softcap is not None:
            logits = elementwise("tanh", logits.div_(self.softcap), inplace=True).mul_(self.softcap)
        return logits

    def all_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [r, V]: the same bits, side by side."""
        if self.vocab_size <= VOCAB_BLOCK:
            return self.logits(hidden, 0)
        return torch.cat([self.logits(hidden, start) for start in self.blocks()], dim=1)


class Scan:
    """Running statistics of r rows; feed the blocks in ascending order."""

    def __init__(self, entropy: bool) -> None:
        self.entropy_wanted = entropy
        self.max: torch.Tensor | None = None
        self.sum: torch.Tensor | None = None
        self.weighted: torch.Tensor | None = None

    def add(self, logits: torch.Tensor, masked: bool = False) -> None:
        """Merge one block [r, w] of transformed logits, which are not changed. ``masked``: some may be -inf."""
        highest = logits.amax(1, keepdim=True).clamp_min_(FLOOR)
        if self.max is not None:
            highest = torch.maximum(self.max, highest)
        shifted = logits - highest
        exps = _masked_exp(shifted) if masked else elementwise("exp", shifted, inplace=not self.entropy_wanted)
        total = tree_sum(exps)
        weighted = tree_sum(exps * shifted.clamp_(min=_ZERO_EXP)) if self.entropy_wanted else None
        if self.max is not None:
            # Before the first block there is nothing to rescale: 0 * alpha + total is total.
            step = self.max - highest
            alpha = elementwise("exp", step)
            if weighted is not None:
                weighted = (self.weighted + step * self.sum) * alpha + weighted
            total = self.sum * alpha + total
        self.max, self.sum, self.weighted = highest, total, weighted

    def log_sum(self) -> torch.Tensor:
        """log of the sum relative to the maximum, [r]."""
        return elementwise("log", self.sum.squeeze(1))

    def logsumexp(self) -> torch.Tensor:
        return self.max.squeeze(1) + self.log_sum()

    def logprob(self, target_logits: torch.Tensor) -> torch.Tensor:
        """Of transformed target logits [r]."""
        return (target_logits - self.max.squeeze(1)) - self.log_sum()

    def entropy(self) -> torch.Tensor:
        """[r]; only for a scan that was made with ``entropy=True``."""
        if self.weighted is None:
            raise ValueError("Scan: entropy was not collected")
        return self.log_sum() - (self.weighted / self.sum).squeeze(1)


def _masked_exp(shifted: torch.Tensor) -> torch.Tensor:
    """exp, without asking vector libraries for exp(-inf), which is up to 100 times slower."""
    hidden = shifted == -torch.inf
    return elementwise("exp", shifted.masked_fill(hidden, 0.0), inplace=True).masked_fill_(hidden, 0.0)


def pick(logits: torch.Tensor, ids: torch.Tensor, start: int, into: torch.Tensor) -> None:
    """Copy each row's logit at ``ids`` [r] into ``into`` [r] where the id lies in the block at ``start``."""
    local = ids - start
    inside = (local >= 0) & (local < logits.shape[1])
    values = logits.gather(1, local.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
    torch.where(inside, values, into, out=into)


def row_chunks(num_rows: int, width: int, limit: int = 2**19) -> Iterator[slice]:
    """Slices of rows that hold at most ``limit`` elements of ``width`` columns each (at least 16 rows)."""
    size = max(16, limit // max(width, 1) // 16 * 16)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))
