"""Log-probabilities straight from hidden states: the [T, V] logits are never held for untruncated rows.

``z = transform(hidden @ weight.T + bias)``; transform: soft cap, divide by temperature, restrict to the kept support.
``logprob = z[target] - logsumexp(z)``; ``entropy = -sum(p log p)``.
Shapes: hidden [T, H], weight [V, H], targets int64 [T] -> float32 [T]. dtypes: float32, bfloat16 and, but for
reference, float16. Plan, in float32: reference, linear's product plan in vocabulary blocks of 1,024, merged in
ascending order (``reference/vocab.py``); triton, one chain over H in blocks of 128 (``vocab/plan.py``).
Promised: forward, a row's bits depend on that row, its settings and the weights only. Backward recomputes the logits,
holds the support constant, and is deterministic run to run.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch

from rlalign_kernels.checks import check_dtype, check_integer, check_same
from rlalign_kernels.dispatch import Backend, Implementations, operator
from rlalign_kernels.native import vocab as native_vocab
from rlalign_kernels.reference import logprob as reference_logprob
from rlalign_kernels.rows import LogprobOutput, SamplingRows


def _triton(*args: Any) -> LogprobOutput:
    from rlalign_kernels.vocab import triton_backend  # triton may be missing where nobody asks for it

    return triton_backend.linear_logprob(*args)


_IMPLEMENTATIONS = Implementations(
    "linear_logprob", reference=reference_logprob.linear_logprob, native=native_vocab.linear_logprob, triton=_triton
)


@operator
def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    rows: SamplingRows | None = None,
    support: torch.Tensor | None = None,
    banned: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_support: bool = False,
    backend: Backend,
) -> LogprobOutput:
    """Log-prob of ``targets`` under the sampling distribution of ``rows`` (None: temperature 1, nothing truncated).

    Greedy rows (temperature 0) are scored at temperature 1, untruncated. ``support`` (bool [T, V]) is used instead of
    being computed from the filters; a target outside of it scores -inf. ``banned`` (bool [T, V]) removes ids before any
    transform, as in ``linear_sample``; with ``support`` it has no place and is refused. Rows with ``ignore_index`` give
    0 and no gradient. Differentiable in hidden, weight and bias through logprob, entropy and logsumexp.
    With e the largest of a row's ``(H + 2) 2^-23 (|hidden| @ |weight|.T + |bias|) / temperature``, over the support of
    the logits as computed, logprob and logsumexp err by at most 2 e + 4e-6 (1 + |value|), entropy by 2 e log V +
    4e-6 (1 + value), in every dtype.
    Raises ValueError for shapes or dtypes that do not fit, settings out of bounds, or a target that is no id. With
    backend="triton" on a GPU no value is read on the host: a row with such a setting or target gives NaN.
    """
    run = _IMPLEMENTATIONS[backend]
    read = reads_values(backend, hidden)
    check_head("linear_logprob", hidden, weight, bias, softcap, backend)
    check_integer("linear_logprob", "targets", targets, (hidden.shape[0],))
    if not isinstance(ignore_index, Integral) or isinstance(ignore_index, bool):
        raise ValueError(f"linear_logprob: ignore_index={ignore_index!r} is no int")
    kept = _check_targets(targets, weight.shape[0], ignore_index) if read else targets != ignore_index
    if rows is not None:
        rows.check("linear_logprob", hidden.shape[0], values=read)
    if support is not None and banned is not None:
        raise ValueError("linear_logprob: banned and support are both given; a support leaves banned ids out already")
    for name, mask in (("support", support), ("banned", banned)):
        _check_mask(name, mask, (hidden.shape[0], weight.shape[0]))
    return run(hidden, weight, bias, softcap, targets.long(), kept, rows, support, banned, return_support)


def _check_mask(name: str, mask: torch.Tensor | None, shape: tuple[int, int]) -> None:
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != shape):
        raise ValueError(f"linear_logprob: {name} is {mask.dtype} {tuple(mask.shape)}; expected bool {shape}")


def reads_values(backend: Backend, hidden: torch.Tensor) -> bool:
    """Whether values of targets and settings are checked on the host, which waits for a GPU that holds them."""
    return backend != "triton" or hidden.device.type == "cpu"


def check_head(
    operator: str,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    backend: Backend,
) -> None:
    """What linear_logprob and linear_sample ask of the output layer."""
    check_dtype(operator, backend, hidden=hidden)
    check_same(operator, hidden, weight=weight, bias=bias)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or weight.numel() == 0:
        raise ValueError(
            f"{operator}: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}; expected [T, H], [V, H], V and "
            "H > 0"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{operator}: bias has shape {tuple(bias.shape)}, expected {tuple(weight.shape[:1])}")
    if softcap is not None and (not isinstance(softcap, Real) or not 0 < softcap < math.inf):
        raise ValueError(f"{operator}: softcap={softcap!r} is not supported; use None or a finite value > 0")


def _check_targets(targets: torch.Tensor, vocab_size: int, ignore_index: int) -> torch.Tensor:
    """bool [T]: rows that count. Raises ValueError naming index and value of the first target that is no id."""
    kept = targets != ignore_index
    # On the host: a dozen tiny tensor operations would cost more than the log-prob of a small batch.
    values = targets.cpu().numpy()
    bad = (values != ignore_index) & ((values < 0) | (values >= vocab_size))
    if bad.any():
        index = int(bad.argmax())
        raise ValueError(
            f"linear_logprob: targets[{index}]={int(targets[index])} is outside the vocabulary [0, {vocab_size}) "
            f"and is not ignore_index={ignore_index}"
        )
    return kept
