"""Log-probs and sampling by ordinary PyTorch: full logits, log_softmax, sort, cumsum; noise as in the reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rlalign_kernels.reference.philox import gumbel
from rlalign_kernels.rows import LogprobOutput, SampleOutput, SamplingRows


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, softcap: float | None
) -> torch.Tensor:
    logits = F.linear(hidden, weight, bias).float()
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _scaled(logits: torch.Tensor, rows: SamplingRows | None) -> torch.Tensor:
    if rows is None:
        return logits
    return logits / torch.where(rows.greedy, 1.0, rows.temperature).unsqueeze(1)


def _support(logits: torch.Tensor, rows: SamplingRows | None) -> torch.Tensor | None:
    """bool [T, V], or None if no row is truncated."""
    if rows is None or not bool(rows.truncated.any()):
        return None
    vocab_size = logits.shape[1]
    ordered, ids = torch.sort(logits, dim=1, descending=True, stable=True)
    limit = torch.where(rows.top_k > 0, rows.top_k, vocab_size).unsqueeze(1)
    kept = torch.arange(vocab_size, device=logits.device) < limit
    probs = ordered.masked_fill(~kept, -torch.inf).softmax(1)
    kept = kept & ((probs.cumsum(1) - probs < rows.top_p.unsqueeze(1)) | (rows.top_p >= 1).unsqueeze(1))
    kept &= probs >= rows.min_p.unsqueeze(1) * probs[:, :1]
    kept = torch.zeros_like(kept).scatter_(1, ids, kept)
    return kept | ~rows.truncated.unsqueeze(1)


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    targets: torch.Tensor,
    kept: torch.Tensor,
    rows: SamplingRows | None,
    support: torch.Tensor | None,
    banned: torch.Tensor | None,
    return_support: bool,
) -> LogprobOutput:
    """See the public operator; ``kept`` bool [T] marks rows that are not ignored."""
    logits = _scaled(_logits(hidden, weight, bias, softcap), rows)
    if banned is not None:
        logits = logits.masked_fill(banned, -torch.inf)
    if support is None:
        support = _support(logits.detach(), rows)
    if banned is not None:
        support = ~banned if support is None else support & ~banned
    if support is not None:
        logits = logits.masked_fill(~support, -torch.inf)
    log_p = torch.log_softmax(logits, dim=1)
    logprob = log_p.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
    entropy = -(log_p.exp() * log_p.clamp(min=-200.0)).sum(1)
    values = [torch.where(kept, value, 0.0) for value in (logprob, entropy, torch.logsumexp(logits, dim=1))]
    if return_support and support is None:
        support = torch.ones_like(logits, dtype=torch.bool)
    return LogprobOutput(*values, support if return_support else None)


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
    """See the public operator."""
    raw = _logits(hidden, weight, bias, softcap)
    if banned is not None:
        raw = raw.masked_fill(banned, -torch.inf)
    logits = _scaled(raw, rows)
    support = _support(logits, rows)
    if support is not None:
        logits = logits.masked_fill(~support, -torch.inf)
    noisy = logits
    if not bool(rows.greedy.all()):
        noise = gumbel(seeds, positions, 0, logits.shape[1])
        noisy = logits + noise.masked_fill_(rows.greedy.unsqueeze(1), 0.0)
    token = noisy.argmax(1)
    index = token.unsqueeze(1)
    logprob = torch.log_softmax(logits, dim=1).gather(1, index).squeeze(1)
    raw_logprob = torch.log_softmax(raw, dim=1).gather(1, index).squeeze(1) if raw_logprobs else None
    return SampleOutput(token, logprob, raw_logprob)
