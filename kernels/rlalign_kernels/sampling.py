"""Draw one token per row straight from hidden states, with its log-prob.

``token = argmax(z + gumbel)`` over the kept support, z as in ``linear_logprob``; greedy rows take the lowest id among
the maximal logits. The noise is a function of (seed, response index, vocabulary id) only (``reference/philox.py``).
Promised: token and log-prob depend on the row, its settings, seed and position only; the log-prob has the bits of
``linear_logprob`` on the same hidden row. Not differentiable.
"""

from __future__ import annotations

from typing import Any

import torch

from rlalign_kernels.checks import check_integer
from rlalign_kernels.dispatch import Backend, Implementations, operator
from rlalign_kernels.linear_logprob import check_head, reads_values
from rlalign_kernels.native import vocab as native_vocab
from rlalign_kernels.reference import sample as reference_sample
from rlalign_kernels.rows import SampleOutput, SamplingRows


def _triton(*args: Any) -> SampleOutput:
    from rlalign_kernels.vocab import triton_backend  # triton may be missing where nobody asks for it

    return triton_backend.linear_sample(*args)


_IMPLEMENTATIONS = Implementations(
    "linear_sample", reference=reference_sample.linear_sample, native=native_vocab.linear_sample, triton=_triton
)


@operator
def linear_sample(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    rows: SamplingRows,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    raw_logprobs: bool = False,
    banned: torch.Tensor | None = None,
    backend: Backend,
) -> SampleOutput:
    """Token int64 [T] and log-prob float32 [T] of each row of hidden [T, H], weight [V, H].

    seeds: int64 or uint64 [T], all 64 bits count; positions: response index, int [T], modulo 2^32. ``raw_logprobs``
    adds the log-prob at temperature 1, nothing truncated. ``banned`` (bool [T, V]) removes ids before any transform,
    also from both log-probs. Raises ValueError for shapes, dtypes or settings that do not fit, or a row with every id
    banned.
    Log-probs err by no more than ``linear_logprob``'s; two ids whose z + gumbel are closer than that and 1e-5 may swap
    between backends.
    With backend="triton" on a GPU no value is read on the host unless rows are truncated or may be (see SamplingRows):
    a row with such a setting or ban gives some id and NaN. Such a call can be captured in a CUDA graph.
    """
    run = _IMPLEMENTATIONS[backend]
    num_rows = hidden.shape[0]
    read = reads_values(backend, hidden)
    check_head("linear_sample", hidden, weight, bias, softcap, backend)
    rows.check("linear_sample", num_rows, values=read)
    if seeds.dtype not in (torch.int64, torch.uint64) or tuple(seeds.shape) != (num_rows,):
        raise ValueError(f"linear_sample: seeds is {seeds.dtype} {tuple(seeds.shape)}; expected int64 ({num_rows},)")
    check_integer("linear_sample", "positions", positions, (num_rows,))
    if banned is not None:
        _check_banned(banned, num_rows, weight.shape[0], read)
    with torch.no_grad():
        return run(hidden, weight, bias, softcap, rows, seeds, positions, raw_logprobs, banned)


def _check_banned(banned: torch.Tensor, num_rows: int, vocab_size: int, values: bool) -> None:
    if banned.dtype != torch.bool or tuple(banned.shape) != (num_rows, vocab_size):
        raise ValueError(
            f"linear_sample: banned is {banned.dtype} {tuple(banned.shape)}; expected bool {(num_rows, vocab_size)}"
        )
    if not values:
        return
    full = banned.all(dim=1)
    if bool(full.any()):
        raise ValueError(f"linear_sample: banned[{int(full.nonzero()[0])}] leaves no id to draw")
