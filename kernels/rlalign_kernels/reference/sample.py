"""The invariant sampler: logits once, used for the support, the draw and the log-probs."""

from __future__ import annotations

import torch

from rlalign_kernels.reference.logprob import transform
from rlalign_kernels.reference.philox import gumbel
from rlalign_kernels.reference.support import kept_support
from rlalign_kernels.reference.vocab import VOCAB_BLOCK, Head, Scan, row_chunks
from rlalign_kernels.rows import SampleOutput, SamplingRows


class _Draw:
    """Running argmax of noisy logits; the lowest id wins a tie, since a later block must be greater."""

    def __init__(self) -> None:
        self.best: torch.Tensor | None = None
        self.token: torch.Tensor | None = None
        self.logit: torch.Tensor | None = None
        self.raw: torch.Tensor | None = None

    def add(self, noisy: torch.Tensor, logits: torch.Tensor, raw: torch.Tensor | None, start: int) -> None:
        # Documented: the index is that of the first maximum.
        value, local = noisy.max(1)
        index = local.unsqueeze(1)
        logit = logits.gather(1, index).squeeze(1)
        raw_logit = None if raw is None else raw.gather(1, index).squeeze(1)
        if self.best is None:
            self.best, self.token, self.logit, self.raw = value, local, logit, raw_logit
            return
        better = value > self.best
        self.best = torch.where(better, value, self.best)
        self.token = torch.where(better, local + start, self.token)
        self.logit = torch.where(better, logit, self.logit)
        if raw_logit is not None:
            self.raw = torch.where(better, raw_logit, self.raw)


def linear_sample(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    rows: SamplingRows,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    raw_logprobs: bool,
    banned: torch.Tensor | None,
) -> SampleOutput:
    """See the public operator. Truncated rows hold their full logits, a bounded number of rows at a time."""
    head = Head(weight, bias, softcap)
    num_rows = hidden.shape[0]
    token = torch.zeros(num_rows, dtype=torch.int64, device=hidden.device)
    values = torch.zeros(2, num_rows, device=hidden.device)
    groups = [(rows.truncated, True), (~rows.truncated, False)] if rows.any_truncated else [(None, False)]
    for member, needs_support in groups:
        index = None if member is None or bool(member.all()) else member.nonzero().squeeze(1)
        size = num_rows if index is None else index.numel()
        width = head.vocab_size if needs_support else min(VOCAB_BLOCK, head.vocab_size)
        for chunk in row_chunks(size, width):
            at = chunk if index is None else index[chunk]
            part = rows if size == num_rows and chunk.stop - chunk.start == num_rows else rows[at]
            draw = _Chunk(hidden[at].float(), head, part, seeds.view(torch.int64)[at], positions[at])
            ban = None if banned is None else banned[at]
            drawn = draw.run(needs_support, ban, raw_logprobs)
            if part is rows:
                token, values = drawn
            else:
                token[at], values[:, at] = drawn
    return SampleOutput(token, values[0], values[1] if raw_logprobs else None)


class _Chunk:
    """One bounded set of rows, truncated or not."""

    def __init__(
        self, hidden: torch.Tensor, head: Head, rows: SamplingRows, seeds: torch.Tensor, positions: torch.Tensor
    ) -> None:
        self.hidden, self.head, self.rows, self.seeds, self.positions = hidden, head, rows, seeds, positions
        self.temperature = rows.divisor
        self.greedy = rows.greedy.unsqueeze(1) if rows.any_greedy else None
        self.all_greedy = rows.any_greedy and bool(rows.greedy.all())

    def run(
        self, needs_support: bool, banned: torch.Tensor | None, raw_logprobs: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token [r] and (logprob, raw logprob) [2, r]."""
        scan, raw_scan = Scan(entropy=False), Scan(entropy=False)
        draw = _Draw()
        full, support = self._support(banned) if needs_support else (None, None)
        separate = raw_logprobs and (needs_support or self.temperature is not None)
        for start in self.head.blocks():
            block = slice(start, start + VOCAB_BLOCK)
            logits = self.head.logits(self.hidden, start) if full is None else full[:, block].contiguous()
            if banned is not None:
                logits.masked_fill_(banned[:, block], -torch.inf)
            raw = logits.clone() if separate else None
            transform(logits, self.temperature, None if support is None else support[:, block])
            scan.add(logits, masked=support is not None or banned is not None)
            if raw is not None:
                raw_scan.add(raw, masked=banned is not None)
            draw.add(self._noisy(logits, start), logits, raw, start)
        logprob = scan.logprob(draw.logit)
        return draw.token, torch.stack((logprob, raw_scan.logprob(draw.raw) if separate else logprob))

    def _support(self, banned: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Untransformed logits [r, V] and the kept support."""
        full = self.head.all_logits(self.hidden)
        scaled = full.clone()
        if banned is not None:
            scaled.masked_fill_(banned, -torch.inf)
        transform(scaled, self.temperature, None)
        return full, kept_support(scaled, self.rows)

    def _noisy(self, logits: torch.Tensor, start: int) -> torch.Tensor:
        if self.all_greedy:
            return logits
        noise = gumbel(self.seeds, self.positions, start, logits.shape[1])
        if self.greedy is not None:
            noise.masked_fill_(self.greedy, 0.0)
        return noise.add_(logits)
