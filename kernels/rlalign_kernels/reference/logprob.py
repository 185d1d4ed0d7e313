"""The invariant log-prob: forward by scanning vocabulary blocks, backward by recomputing them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from rlalign_kernels.reference.elementwise import elementwise
from rlalign_kernels.reference.support import kept_support
from rlalign_kernels.reference.vocab import VOCAB_BLOCK, Head, Scan, pick, row_chunks
from rlalign_kernels.rows import LogprobOutput, SamplingRows


def transform(logits: torch.Tensor, temperature: torch.Tensor | None, support: torch.Tensor | None) -> torch.Tensor:
    """Divide by temperature [r, 1], then -inf outside ``support``; in place."""
    if temperature is not None:
        logits.div_(temperature)
    return logits if support is None else logits.masked_fill_(~support, -torch.inf)


def find_support(
    hidden: torch.Tensor,
    head: Head,
    rows: SamplingRows | None,
    temperature: torch.Tensor | None,
    banned: torch.Tensor | None,
    everything: bool,
) -> torch.Tensor | None:
    """bool [T, V] (all but banned ids for untruncated rows), or None if that is everything and not asked for."""
    if banned is not None:
        everything = True
    any_truncated = rows is not None and rows.any_truncated
    if not any_truncated and not everything:
        return None
    support = torch.ones(hidden.shape[0], head.vocab_size, dtype=torch.bool, device=hidden.device)
    if banned is not None:
        support &= ~banned
    if not any_truncated:
        return support
    truncated = rows.truncated.nonzero().squeeze(1)
    for chunk in row_chunks(truncated.numel(), head.vocab_size):
        index = truncated[chunk]
        logits = head.all_logits(hidden[index].float())
        transform(logits, None if temperature is None else temperature[index], support[index])
        support[index] = kept_support(logits, rows[index])
    return support


@dataclass(frozen=True)
class _Problem:
    """What the backward needs besides tensors that carry gradients."""

    softcap: float | None
    targets: torch.Tensor
    kept: torch.Tensor
    temperature: torch.Tensor | None
    support: torch.Tensor | None

    def block(self, rows: slice, start: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        temperature = None if self.temperature is None else self.temperature[rows]
        support = None if self.support is None else self.support[rows, start : start + VOCAB_BLOCK]
        return temperature, support


def _forward(hidden: torch.Tensor, head: Head, problem: _Problem) -> tuple[torch.Tensor, ...]:
    """logprob, entropy, logsumexp, each float32 [T]; rows that do not count are 0."""
    num_rows = hidden.shape[0]
    outputs = hidden.new_zeros(3, num_rows, dtype=torch.float32)
    for rows in row_chunks(num_rows, min(VOCAB_BLOCK, head.vocab_size)):
        wide = hidden[rows].float()
        scan = Scan(entropy=True)
        picked = wide.new_full((wide.shape[0],), -torch.inf)
        for start in head.blocks():
            logits = transform(head.logits(wide, start), *problem.block(rows, start))
            scan.add(logits, masked=problem.support is not None)
            pick(logits, problem.targets[rows], start, picked)
        values = torch.stack((scan.logprob(picked), scan.entropy(), scan.logsumexp()))
        outputs[:, rows] = values.masked_fill_(~problem.kept[rows], 0.0)
    return outputs[0], outputs[1], outputs[2]


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, problem: _Problem
    ) -> tuple[torch.Tensor, ...]:
        logprob, entropy, logsumexp = _forward(hidden, Head(weight, bias, problem.softcap), problem)
        ctx.save_for_backward(hidden, weight, bias, entropy, logsumexp)
        ctx.problem = problem
        return logprob, entropy, logsumexp

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, entropy, logsumexp = ctx.saved_tensors
        head, problem = Head(weight, bias, ctx.problem.softcap), ctx.problem
        grads = [grad.masked_fill(~problem.kept, 0.0).unsqueeze(1) for grad in grads]
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for rows in row_chunks(hidden.shape[0], min(VOCAB_BLOCK, head.vocab_size)):
            wide = hidden[rows].float()
            for start in head.blocks():
                block = slice(start, start + VOCAB_BLOCK)
                upstream = [grad[rows] for grad in grads]
                grad_logits = _logit_gradient(wide, head, problem, rows, start, upstream, entropy, logsumexp)
                grad_hidden[rows] += grad_logits @ weight[block].float()
                grad_weight[block] += grad_logits.t() @ wide
                if grad_bias is not None:
                    grad_bias[block] += grad_logits.sum(0)
        grad_bias = None if bias is None else grad_bias.to(bias.dtype)
        return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), grad_bias, None


def _logit_gradient(
    wide: torch.Tensor,
    head: Head,
    problem: _Problem,
    rows: slice,
    start: int,
    upstream: list[torch.Tensor],
    entropy: torch.Tensor,
    logsumexp: torch.Tensor,
) -> torch.Tensor:
    """Gradient [r, w] at the untransformed logits of one block.

    d logprob = 1[target] - p; d logsumexp = p; d entropy = -p (log p + entropy); p = 0 outside the support.
    """
    grad_logprob, grad_entropy, grad_lse = upstream
    temperature, support = problem.block(rows, start)
    raw = head.logits(wide, start)
    cap_slope = None if head.softcap is None else 1.0 - (raw / head.softcap).square()
    log_p = transform(raw, temperature, support).sub_(logsumexp[rows].unsqueeze(1))
    probability = elementwise("exp", log_p)
    grad = log_p.clamp_(min=-200.0).add_(entropy[rows].unsqueeze(1)).mul_(-grad_entropy).add_(grad_lse - grad_logprob)
    grad.mul_(probability)
    local = (problem.targets[rows] - start).unsqueeze(1)
    inside = (local >= 0) & (local < grad.shape[1])
    hit = torch.where(inside, grad_logprob, 0.0)
    if support is not None:
        hit = hit * support.gather(1, local.clamp(0, grad.shape[1] - 1))
    grad.scatter_add_(1, local.clamp(0, grad.shape[1] - 1), hit)
    if temperature is not None:
        grad.div_(temperature)
    if cap_slope is not None:
        grad.mul_(cap_slope)
    # last: what a row that does not count holds may be anything
    return grad.masked_fill_(~problem.kept[rows].unsqueeze(1), 0.0)


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
    head = Head(weight, bias, softcap)
    with torch.no_grad():
        temperature = None if rows is None else rows.divisor
        if support is None:
            support = find_support(hidden, head, rows, temperature, banned, return_support)
    problem = _Problem(softcap, targets, kept, temperature, support)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias)):
        values = _LinearLogprob.apply(hidden, weight, bias, problem)
    else:
        values = _forward(hidden, head, problem)
    return LogprobOutput(*values, support if return_support else None)
