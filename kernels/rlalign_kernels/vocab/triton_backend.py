"""``linear_logprob`` and ``linear_sample`` on the "triton" backend. Imported only when it is used.

Nothing is read on the host unless rows are truncated, or may be: then their logits are held, a few rows at a time, to
find what each row keeps; that takes two numbers.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable
from triton import knobs

from rlalign_kernels.rows import LogprobOutput, SampleOutput, SamplingRows
from rlalign_kernels.vocab import triton_launches as launches
from rlalign_kernels.vocab.triton_gradient import Scored, gradients
from rlalign_kernels.vocab.triton_launches import Cut, Head, Settings
from rlalign_kernels.vocab.triton_launches import rows as readable
from rlalign_kernels.vocab.triton_support import find_cut

# What the blocks' numbers of one scan may take: more rows are scanned in parts.
_PARTS_BYTES = 256 * 2**20


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
    _check_device("linear_logprob", hidden)
    with torch.no_grad():
        seen, head = readable(hidden), Head.of(weight, bias, softcap)
        if support is not None:
            kept_ids, mask, cut = support, support, None
        else:
            mask = None if banned is None else ~banned
            kept_ids = _unfiltered(mask, hidden.shape[0], head) if return_support else None
            cut = find_cut(seen, head, rows, banned, kept_ids)
    mask = None if mask is None else readable(mask)
    settings = None if rows is None else _settings(rows)
    untruncated = rows is not None and support is None and rows.truncates is False
    problem = (softcap, settings, mask, cut, targets.contiguous(), kept.contiguous(), untruncated)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias)):
        values = _LinearLogprob.apply(hidden, weight, bias, *problem)
    else:
        values = _score(readable(hidden), Head.of(weight, bias, softcap), *problem[1:])[:3].unbind(0)
    return LogprobOutput(*values, kept_ids if return_support else None)


def _unfiltered(allowed: torch.Tensor | None, num_rows: int, head: Head) -> torch.Tensor:
    """bool [T, V] of its own memory: what rows keep that no filter truncates."""
    if allowed is not None:
        return allowed.clone()
    return torch.ones(num_rows, head.vocab_size, dtype=torch.bool, device=head.weight.device)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        softcap: float | None,
        settings: Settings | None,
        mask: torch.Tensor | None,
        cut: Cut | None,
        targets: torch.Tensor,
        kept: torch.Tensor,
        untruncated: bool,
    ) -> tuple[torch.Tensor, ...]:
        head = Head.of(weight, bias, softcap)
        stats = _score(readable(hidden), head, settings, mask, cut, targets, kept, untruncated)
        ctx.save_for_backward(hidden, weight, bias, stats, mask, targets, kept, *(settings or ()), *(cut or ()))
        ctx.softcap, ctx.has_settings, ctx.has_cut = softcap, settings is not None, cut is not None
        ctx.set_materialize_grads(False)
        return stats[0], stats[1], stats[2]

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, stats, mask, targets, kept, *rest = ctx.saved_tensors
        if all(grad is None for grad in upstream):
            return (None,) * 10
        given = torch.zeros(3, hidden.shape[0], dtype=torch.float32, device=hidden.device)
        for row, grad in zip(given, upstream, strict=True):
            if grad is not None:
                row.copy_(grad)
        settings = Settings(*rest[:4]) if ctx.has_settings else None
        cut = Cut(*rest[-2:]) if ctx.has_cut else None
        scored = Scored(settings, mask, cut, targets, kept, stats, given, upstream[1] is not None)
        grads = gradients(readable(hidden), Head.of(weight, bias, ctx.softcap), scored, ctx.needs_input_grad[:3])
        return *grads, None, None, None, None, None, None, None


def _score(
    hidden: torch.Tensor,
    head: Head,
    settings: Settings | None,
    mask: torch.Tensor | None,
    cut: Cut | None,
    targets: torch.Tensor,
    kept: torch.Tensor,
    untruncated: bool,
) -> torch.Tensor:
    """float32 [5, T]: log-prob, entropy, log-sum-exp; m and s for the gradient."""
    out = torch.empty(5, hidden.shape[0], dtype=torch.float32, device=hidden.device)
    for part in _row_parts(hidden.shape[0], 3, head):
        own = None if settings is None else Settings(*(x[part] for x in settings))
        seen = None if mask is None else mask[part]
        end = None if cut is None else cut.part(part)
        found = launches.scan(hidden[part], head, own, seen, end)
        launches.score(
            hidden[part], head, own, seen, end, targets[part], kept[part], found, out[:, part], untruncated
        )  # fmt: skip
        del found  # or the next part's would stand beside it
    return out


def _row_parts(num_rows: int, fields: int, head: Head) -> list[slice]:
    step = max(256, _PARTS_BYTES // (4 * fields * head.num_blocks) // 256 * 256)
    return [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]


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
    _check_device("linear_sample", hidden)
    hidden, head = readable(hidden), Head.of(weight, bias, softcap)
    seeds, positions = seeds.view(torch.int64).contiguous(), positions.long().contiguous()
    allowed, settings = None if banned is None else readable(~banned), _settings(rows)
    cut = find_cut(hidden, head, rows, banned)
    token = torch.empty(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    values = torch.empty(2 if raw_logprobs else 1, hidden.shape[0], dtype=torch.float32, device=hidden.device)
    for part in _row_parts(hidden.shape[0], 7 if raw_logprobs else 5, head):
        own = Settings(*(x[part] for x in settings))
        seen = None if allowed is None else allowed[part]
        found = launches.scan(
            hidden[part], head, own, seen, None if cut is None else cut.part(part), seeds=seeds[part],
            positions=positions[part], raw=raw_logprobs,
        )  # fmt: skip
        launches.draw(head.vocab_size, own, found, token[part], values[:, part], rows.truncates is False)
        del found  # or the next part's would stand beside it
    return SampleOutput(token, values[0], values[1] if raw_logprobs else None)


def _settings(rows: SamplingRows) -> Settings:
    return Settings(*(x.contiguous() for x in (rows.temperature, rows.top_k, rows.top_p, rows.min_p)))


def _check_device(operator: str, hidden: torch.Tensor) -> None:
    if hidden.device.type == "cuda":
        return
    if not knobs.runtime.interpret:
        raise ValueError(
            f"{operator}: hidden.device={hidden.device} is not supported with backend='triton'; use a CUDA device"
        )
    if hidden.dtype == torch.bfloat16:
        raise NotImplementedError(
            f"{operator}: hidden.dtype={hidden.dtype}: Triton's interpreter takes float32 and float16 only"
        )
