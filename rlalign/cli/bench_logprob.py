"""The output layer's cases for ``bench_kernels.py``: hidden 2,048, vocabulary 151,936, bfloat16, no temperature.

Against PyTorch's full logits, Apple's cut cross entropy and Liger's fused linear cross entropy (extra ``bench``; one
that is not installed is left out, by name). All give one number per row, whose gradients are weighted by row; Liger
also at what it is made for, one sum. FLOPs: three products for a gradient, although those that never hold the logits
take four. Draws are against the linear alone, and timed in a CUDA graph.

Logits are normal, of deviation 2, and targets any ids. Cut cross entropy leaves small terms of the gradient out unless
it is told not to, which saves time where probability is concentrated: so there is a case with ids as frequent as in
text (Zipf's law), and targets drawn from that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch
import torch.nn.functional as F
from rlalign_kernels import SamplingRows, linear_logprob, linear_sample

from rlalign.cli.bench_kernels import Case

# Whose versions the results name.
PACKAGES = ("cut-cross-entropy", "liger-kernel")
_DEVICE, _DTYPE = "cuda", torch.bfloat16
_HIDDEN, _VOCAB = 2048, 151936
_SCORED_ROWS = (8192, 1024)
_DRAWN_ROWS = (1, 16, 64, 128, 256)
_BASELINE = "torch"
_COMPUTES = {
    "torch": "log-probs, from logits rounded to bfloat16 and held; float32 log_softmax; every term of the gradient",
    "rlalign": "log-probs, entropies and log-sum-exps, from float32 logits; every term of the gradient",
    "cut cross entropy": "losses; the gradient without blocks of logits whose terms are all below 2^-12",
    "cut cross entropy, exact": "losses; every term of the gradient",
    "liger": "losses, from logits rounded to bfloat16, computed once more for the gradient",
    "liger, sum": "the sum of all losses, its gradient with it: none that weights rows",
}

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def make_cases(only: str) -> Iterator[Callable[[], Case]]:
    """Cases whose name contains ``only``, each made when it is called."""
    made: dict[str, Callable[[str], Case]] = {}
    for num_rows in _SCORED_ROWS:
        made[f"forward, {num_rows} rows"] = partial(_forward, num_rows)
        made[f"forward and backward, {num_rows} rows"] = partial(_backward, num_rows, False)
    made[f"forward and backward, {_SCORED_ROWS[0]} rows, Zipf's law"] = partial(_backward, _SCORED_ROWS[0], True)
    made |= {f"sample, {num_rows} rows": partial(_draw, num_rows) for num_rows in _DRAWN_ROWS}
    for name, make in made.items():
        if only in name:
            yield partial(make, name)


@cache
def _weight() -> torch.Tensor:
    return (torch.randn(_VOCAB, _HIDDEN, device=_DEVICE) * 2 * _HIDDEN**-0.5).to(_DTYPE)


def _rows(num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = torch.randn(num_rows, _HIDDEN, device=_DEVICE).to(_DTYPE)
    return hidden, torch.randint(_VOCAB, (num_rows,), device=_DEVICE)


def _zipf(num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden, weight, targets: id i weighs 1 / (i + 1) on average, logits deviate by 1 from that."""
    hidden, _ = _rows(num_rows)
    hidden[:, 0] = 1.0
    weight = _weight() / 2
    weight[:, 0] = -torch.arange(1.0, _VOCAB + 1, device=_DEVICE).log()
    seeds = torch.arange(num_rows, device=_DEVICE)
    rows = _settings(num_rows, 1.0)
    drawn = linear_sample(hidden, weight, rows=rows, seeds=seeds, positions=seeds, backend="triton")
    return hidden, weight, drawn.token


def _settings(num_rows: int, temperature: float) -> SamplingRows:
    ones, zeros = torch.ones(num_rows, device=_DEVICE), torch.zeros(num_rows, device=_DEVICE)
    return SamplingRows(ones * temperature, zeros.long(), ones, zeros, truncates=False)


def _ours(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -linear_logprob(hidden, weight, targets, backend="triton").logprob


def _full(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -torch.log_softmax(F.linear(hidden, weight).float(), 1).gather(1, targets[:, None])[:, 0]


def _apple(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, filter_eps: str | None = "high"
) -> torch.Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, targets, reduction="none", filter_eps=filter_eps)


def _liger(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, reduction: str = "none"
) -> torch.Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, targets, reduction=reduction)


# Negative log-probs [T], or their sum.
_LOSSES: dict[str, Loss] = {
    "torch": _full,
    "rlalign": _ours,
    "cut cross entropy": _apple,
    "cut cross entropy, exact": partial(_apple, filter_eps=None),
    "liger": _liger,
    "liger, sum": partial(_liger, reduction="sum"),
}
# Where the others do what one of the above does.
_ALIKE_FORWARD = ("torch", "rlalign", "cut cross entropy", "liger")
# Beside the one whose time depends on the data, those whose gradient leaves nothing out: like for like.
_ON_ZIPF = ("torch", "rlalign", "cut cross entropy", "cut cross entropy, exact", "liger")


def _forward(num_rows: int, name: str) -> Case:
    (hidden, targets), weight = _rows(num_rows), _weight()
    calls = {impl: partial(_LOSSES[impl], hidden, weight, targets) for impl in _ALIKE_FORWARD}
    return _scored(name, calls, 2.0 * num_rows * _HIDDEN * _VOCAB)


def _backward(num_rows: int, zipf: bool, name: str) -> Case:
    if zipf:
        hidden, weight, targets = _zipf(num_rows)
    else:
        (hidden, targets), weight = _rows(num_rows), _weight().detach()
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    cotangent = torch.randn(num_rows, device=_DEVICE)

    def gradient(loss: Loss) -> object:
        value = loss(*inputs, targets)
        return torch.autograd.grad(value, inputs, cotangent if value.dim() else None)

    calls = {impl: partial(gradient, _LOSSES[impl]) for impl in (_ON_ZIPF if zipf else _LOSSES)}
    return _scored(name, calls, 6.0 * num_rows * _HIDDEN * _VOCAB)


def _scored(name: str, calls: dict[str, Callable[[], object]], flops: float) -> Case:
    return Case(name, _BASELINE, calls, flops=flops, table="score", memory=True, computes=_COMPUTES)


def _draw(num_rows: int, name: str) -> Case:
    """One token per row at temperature 0.7. Bytes: every weight once."""
    (hidden, _), weight = _rows(num_rows), _weight()
    seeds, rows = torch.arange(num_rows, device=_DEVICE), _settings(num_rows, 0.7)

    def ours() -> object:
        return linear_sample(hidden, weight, rows=rows, seeds=seeds, positions=seeds, backend="triton")

    def full() -> torch.Tensor:
        """Without the log-prob and without seeds."""
        return torch.multinomial((F.linear(hidden, weight).float() / 0.7).softmax(1), 1)

    calls = {"torch linear alone": partial(F.linear, hidden, weight), "rlalign": ours, "torch": full}
    num_bytes = float(_DTYPE.itemsize * _VOCAB * _HIDDEN)
    return Case(name, "torch linear alone", calls, num_bytes=num_bytes, graphed=True, table="sample")
