"""The output layer's cases for ``bench_kernels.py``: hidden 2,048, vocabulary 151,936, bfloat16, no temperature.

Against PyTorch's full logits (linear, float32 log_softmax, gather), Apple's cut cross entropy, whose gradient leaves
small terms out unless it is called exact, and Liger's fused linear cross entropy, which computes gradients in its
forward. Draws are against the linear alone, and timed in a CUDA graph. FLOPs: three products for a gradient, although
those that never hold the logits take four.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from rlalign_kernels import SamplingRows, linear_logprob, linear_sample

from rlalign.cli.bench_kernels import Case

_HIDDEN, _VOCAB = 2048, 151936
_SCORED_ROWS = (1024, 8192)
_DRAWN_ROWS = (1, 16, 64, 128, 256)

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def make_cases(only: str) -> Iterator[Callable[[], Case]]:
    """Cases whose name contains ``only``, each made when it is called."""
    for num_rows in _SCORED_ROWS:
        for kind, make in (("forward", _forward), ("forward and backward", _backward)):
            name = f"logprob, {kind}, {num_rows} rows"
            if only in name:
                yield lambda make=make, name=name, num_rows=num_rows: make(name, num_rows)
    for num_rows in _DRAWN_ROWS:
        name = f"sample, {num_rows} rows"
        if only in name:
            yield lambda name=name, num_rows=num_rows: _draw(name, num_rows)


@cache
def _weight() -> torch.Tensor:
    return (torch.randn(_VOCAB, _HIDDEN, device="cuda") * 2 * _HIDDEN**-0.5).bfloat16()


def _rows(num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = torch.randn(num_rows, _HIDDEN, device="cuda").bfloat16()
    return hidden, torch.randint(_VOCAB, (num_rows,), device="cuda")


def _losses() -> dict[str, Loss]:
    """Negative log-probs [T], or their sum."""

    def ours(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return -linear_logprob(hidden, weight, targets, backend="triton").logprob

    def full(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return -torch.log_softmax(F.linear(hidden, weight).float(), 1).gather(1, targets[:, None])[:, 0]

    def apple(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(hidden, weight, targets, reduction="none")

    def apple_exact(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        from cut_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(hidden, weight, targets, reduction="none", filter_eps=None)

    def liger(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        loss = liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="sum")
        return loss[0] if isinstance(loss, tuple) else loss

    return {
        "torch": full, "rlalign": ours, "cut cross entropy": apple, "cut cross entropy, exact": apple_exact,
        "liger": liger,
    }  # fmt: skip


def _forward(name: str, num_rows: int) -> Case:
    (hidden, targets), weight = _rows(num_rows), _weight()
    losses = _losses()
    del losses["cut cross entropy, exact"]  # differs in the gradient alone
    calls = {impl: lambda loss=loss: loss(hidden, weight, targets) for impl, loss in losses.items()}
    return Case(name, "torch", calls, flops=2.0 * num_rows * _HIDDEN * _VOCAB)


def _backward(name: str, num_rows: int) -> Case:
    (hidden, targets), weight = _rows(num_rows), _weight().detach().requires_grad_()
    hidden.requires_grad_()
    cotangent = torch.randn(num_rows, device="cuda")

    def gradient(loss: Loss) -> Callable[[], object]:
        def call() -> object:
            value = loss(hidden, weight, targets)
            return torch.autograd.grad(value, (hidden, weight), cotangent if value.dim() else None)

        return call

    calls = {impl: gradient(loss) for impl, loss in _losses().items()}
    return Case(name, "torch", calls, flops=6.0 * num_rows * _HIDDEN * _VOCAB)


def _draw(name: str, num_rows: int) -> Case:
    """One token per row at temperature 0.7. Bytes: every weight once."""
    (hidden, _), weight = _rows(num_rows), _weight()
    seeds = torch.arange(num_rows, device="cuda")
    ones, zeros = torch.ones(num_rows, device="cuda"), torch.zeros(num_rows, device="cuda")
    rows = SamplingRows(ones * 0.7, torch.zeros_like(seeds), ones, zeros, truncates=False)

    def ours() -> object:
        return linear_sample(hidden, weight, rows=rows, seeds=seeds, positions=seeds, backend="triton")

    def full() -> torch.Tensor:
        """Without the log-prob and without seeds."""
        return torch.multinomial((F.linear(hidden, weight).float() / 0.7).softmax(1), 1)

    calls = {"torch linear alone": lambda: F.linear(hidden, weight), "rlalign": ours, "torch": full}
    return Case(name, "torch linear alone", calls, num_bytes=2.0 * _VOCAB * _HIDDEN, graphed=True)
