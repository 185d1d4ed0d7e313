"""Whether the promised bits hold on this machine: every operator on a model's shapes, rows alone and rows in a crowd.

What ``probe`` is to the reference backend on a CPU, ``sweep`` is to the triton backend on a GPU: it runs before the
first token, takes seconds once kernels are compiled, and refuses a machine on which a schedule changes a bit. Nothing
is chosen by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from rlalign_kernels.activation import gelu, silu, swiglu
from rlalign_kernels.attention import attention_packed, attention_paged
from rlalign_kernels.conformance import CONFORMANCE
from rlalign_kernels.dispatch import Backend
from rlalign_kernels.linear import linear
from rlalign_kernels.linear_logprob import linear_logprob
from rlalign_kernels.norm import rms_norm
from rlalign_kernels.rope import rotary_cos_sin
from rlalign_kernels.rows import SamplingRows
from rlalign_kernels.sampling import linear_sample

# Rows in the crowd, and how many of its first ones are computed again by themselves.
_CROWD, _PARTS = 1025, (1, 2, 17, 64, 257)
# Logits' rows: the output layer is as large as all else together.
_HEAD_CROWD, _HEAD_PARTS = 257, (1, 5, 64)
_LENGTHS = (1, 700, 129, 1100)
_PAGE = 128
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def sweep(
    shapes: Iterable[tuple[str, tuple[int, ...]]], *, backend: Backend, dtype: torch.dtype, device: torch.device
) -> None:
    """Check every (operator, shape), those of ``probe``, once per process; verdicts are in ``CONFORMANCE``.

    Raises RuntimeError naming operator and shape where rows' bits depend on other rows, ValueError for an unknown
    operator.
    """
    for operator, shape in [*shapes, ("elementwise", ())]:
        check = _CHECKS.get(operator)
        if check is None:
            raise ValueError(f"sweep: operator {operator!r} is unknown; supported: {', '.join(_CHECKS)}")
        data = _Data(backend, dtype, device)
        name = str(dtype).removeprefix("torch.")
        holds = CONFORMANCE.get(("sweep", operator, *shape, backend, name), lambda: check(data, *shape))  # noqa: B023
        if not holds:
            raise RuntimeError(
                f"{operator}{shape} with backend={backend!r}, {name}: a row's bits depend on the rows beside it on "
                f"{_name(device)}; please report it, and use numerics=native or another device meanwhile"
            )


class _Data:
    """Random tensors, the same at every call: normal values over four decades, so that sums round at every step."""

    def __init__(self, backend: Backend, dtype: torch.dtype, device: torch.device) -> None:
        self.backend, self.dtype, self.device = backend, dtype, device
        self._generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, spread: bool = True) -> torch.Tensor:
        values = torch.randn(shape, generator=self._generator, device=self.device)
        if spread:
            exponents = torch.randint(-7, 8, shape[-1:], generator=self._generator, device=self.device)
            values *= torch.exp2(exponents.float())
        return values.to(self.dtype)


def _linear(data: _Data, width: int, depth: int) -> bool:
    weight = data(width, depth)
    return _holds(lambda x: linear(x, weight, backend=data.backend), data(_CROWD, depth))


def _rms_norm(data: _Data, size: int) -> bool:
    weight = data(size)
    return _holds(lambda x: rms_norm(x, weight, eps=1e-6, backend=data.backend), data(_CROWD, size))


def _elementwise(data: _Data) -> bool:
    frequencies = torch.logspace(0, -5, 48, device=data.device)

    def tables(x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(len(x), device=data.device)
        return torch.cat(rotary_cos_sin(positions, frequencies, dtype=data.dtype, backend=data.backend), 1)

    return all(
        _holds(function, data(_CROWD, 96))
        for function in (
            lambda x: silu(x, backend=data.backend),
            lambda x: gelu(x, backend=data.backend),
            lambda x: gelu(x, approximate="tanh", backend=data.backend),
            lambda x: swiglu(x, x, backend=data.backend),
        )
    ) and _holds(tables, data(_CROWD, 1), last=False)


def _linear_logprob(data: _Data, vocab_size: int, depth: int) -> bool:
    weight, hidden = data(vocab_size, depth, spread=False) * depth**-0.5, data(_HEAD_CROWD, depth, spread=False)

    def draw(x: torch.Tensor) -> torch.Tensor:
        """Token and log-prob, the latter from the sampler and again from the scorer."""
        rows = _plain_rows(len(x), data.device)
        order = torch.arange(len(x), device=data.device)
        seeds = torch.full_like(order, 7)
        drawn = linear_sample(
            x, weight, rows=rows, seeds=seeds, positions=torch.zeros_like(order), backend=data.backend
        )
        scored = linear_logprob(x, weight, drawn.token, rows=rows, backend=data.backend)
        parts = (drawn.token, _bits(drawn.logprob).long(), _bits(scored.logprob).long(), _bits(scored.entropy).long())
        return torch.stack(parts, 1)

    found = draw(hidden)
    return torch.equal(found[:, 1], found[:, 2]) and _holds(draw, hidden, parts=_HEAD_PARTS)


def _plain_rows(count: int, device: torch.device) -> SamplingRows:
    temperature = torch.full((count,), 0.7, device=device)
    nothing = torch.zeros(count, device=device)
    return SamplingRows(temperature, torch.zeros_like(nothing, dtype=torch.int64), nothing + 1, nothing, False)


def _attention(data: _Data, head_dim: int, value_dim: int, group: int) -> bool:
    """Sequences together, each alone, and their last rows once more from pages: as a chunk, and as a decoded token."""
    total = sum(_LENGTHS)
    q, k, v = data(total, 2 * group, head_dim), data(total, 2, head_dim), data(total, 2, value_dim)
    scale = head_dim**-0.5
    ends = [0, *torch.tensor(_LENGTHS).cumsum(0).tolist()]

    def packed(start: int, offsets: list[int]) -> torch.Tensor:
        cu = torch.tensor(offsets, dtype=torch.int32, device=data.device)
        rows = slice(start, start + offsets[-1])
        return attention_packed(
            q[rows], k[rows], v[rows], cu_seqlens_q=cu, cu_seqlens_k=cu, scale=scale, backend=data.backend
        )

    together = packed(0, ends)
    for start, length in zip(ends, _LENGTHS, strict=False):
        own = slice(start, start + length)
        if not _same(packed(start, [0, length]), together[own]):
            return False
        caches = _paged(k[own]), _paged(v[own])
        for last in {1, min(length, 33)}:
            out = _from_pages(q[own][-last:], *caches, length, scale, data.backend)
            if not _same(out, together[own][-last:]):
                return False
    return True


def _paged(rows: torch.Tensor) -> torch.Tensor:
    """[pages, page, heads, D], pages in reverse; slots that are not read hold NaN."""
    num_pages = -(-len(rows) // _PAGE)
    pages = rows.new_full((num_pages * _PAGE, *rows.shape[1:]), torch.nan)
    pages[: len(rows)] = rows
    return pages.unflatten(0, (num_pages, _PAGE)).flip(0).contiguous()


def _from_pages(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, length: int, scale: float, backend: Backend
) -> torch.Tensor:
    pages = torch.arange(len(k_cache) - 1, -1, -1, dtype=torch.int32, device=q.device)
    return attention_paged(
        q, k_cache, v_cache, block_tables=pages.unsqueeze(0), scale=scale, backend=backend,
        cu_seqlens_q=torch.tensor([0, len(q)], dtype=torch.int32, device=q.device),
        kv_lens=torch.tensor([length], dtype=torch.int32, device=q.device),
        max_seqlen_q=len(q), max_seqlen_k=length,
    )  # fmt: skip


def _holds(
    function: Callable[[torch.Tensor], torch.Tensor], crowd: torch.Tensor, *, parts: tuple[int, ...] = _PARTS,
    last: bool = True,
) -> bool:  # fmt: skip
    """Whether the first rows of ``crowd``, and its last one, have the same bits by themselves."""
    whole = function(crowd)
    alone = not last or _same(function(crowd[-1:]), whole[-1:])
    return alone and all(_same(function(crowd[:count]), whole[:count]) for count in parts)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(_bits(a), _bits(b))


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(_INTEGER[x.element_size()])


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


_CHECKS: dict[str, Callable[..., bool]] = {
    "linear": _linear,
    "rms_norm": _rms_norm,
    "linear_logprob": _linear_logprob,
    "attention": _attention,
    "elementwise": _elementwise,
}
