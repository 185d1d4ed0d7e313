"""Transcendentals whose bits depend on the element alone, and exact row sums' building block: the halving tree.

``+ - * / sqrt`` are correctly rounded by IEEE 754, so any layout gives the same bits. Library transcendentals are not:
a vector body and its scalar tail may differ. The plan is: each element is computed in the body of a flat block, padded
to a multiple of 64 elements and at most 16,384 long (short enough never to be split over threads).
"""

from __future__ import annotations

import functools

import torch

from rlalign_kernels.conformance import CONFORMANCE, probe_data, same_bits

BLOCK = 16384
LANES = 64
# Where a softmax weight counts as 0: exp(-80) is 1.8e-35, and still far from where it would be subnormal.
ZERO_EXP = -80.0
FUNCTIONS = {
    "exp": torch.exp,
    "log": torch.log,
    "log1p": torch.log1p,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "sin": torch.sin,
    "cos": torch.cos,
}


def elementwise(name: str, x: torch.Tensor, *, inplace: bool = False) -> torch.Tensor:
    """``name(x)`` for float32 ``x`` of any shape: an element's bits depend on its value only.

    ``inplace`` may overwrite ``x`` (it must then be contiguous). Raises RuntimeError where not even the padded blocks
    are independent of position.
    """
    x = x.contiguous()
    if CONFORMANCE.get(("elementwise", name), lambda: _probe(name)):
        return FUNCTIONS[name](x, out=x) if inplace else FUNCTIONS[name](x)
    return _blocked(name, x)


@functools.cache
def scalar(value: float, device: torch.device) -> torch.Tensor:
    """float32 []: as an operand it has the bits of the number, which PyTorch wraps anew at every call (5 µs).

    Never written to.
    """
    return torch.tensor(value, dtype=torch.float32, device=device)


def softmax_exp(x: torch.Tensor) -> torch.Tensor:
    """``exp(max(x, -80)) - exp(-80)`` of contiguous x <= 0, which is overwritten: exp, but exactly 0 from -80 down.

    Masked scores are -inf, and vector libraries take up to 100 times as long where exp underflows. The subtraction
    is exact, or rounds to what was there, wherever the result is above 1e-27.
    """
    return elementwise("exp", x.clamp_min_(ZERO_EXP), inplace=True).sub_(_smallest_exp(x.device))


@functools.cache
def _smallest_exp(device: torch.device) -> torch.Tensor:
    return elementwise("exp", torch.full((1,), ZERO_EXP, device=device)).squeeze(0)


def _blocked(name: str, x: torch.Tensor) -> torch.Tensor:
    """The defining schedule."""
    size = x.numel()
    padded = -(-size // LANES) * LANES
    flat = x.new_zeros(padded)
    flat[:size] = x.reshape(-1)
    for start in range(0, padded, BLOCK):
        block = flat[start : start + BLOCK]
        FUNCTIONS[name](block, out=block)
    return flat[:size].view(x.shape)


def _probe(name: str) -> bool:
    """True if the plain call equals the padded blocks at every length up to 200, at offsets, and split over threads."""
    # Seen in 1 of 12 fresh processes: when several threads make a vector library's first call together, one of them
    # may still run its generic code, with other bits. One short call, on one thread, settles the choice first.
    FUNCTIONS[name](torch.ones(LANES))
    x = probe_data(5 * BLOCK + 37, seed=1)
    if name in ("log", "log1p"):
        x = x.abs()
    truth = _blocked(name, x)
    order = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(2))
    if not same_bits(_blocked(name, x[order]), truth[order]):
        raise RuntimeError(f"elementwise {name!r}: bits depend on the position within a padded block on this machine")
    function = FUNCTIONS[name]
    if not same_bits(function(x), truth) or not same_bits(function(x[1:]), truth[1:]):
        return False
    pieces = ((offset, length) for length in range(1, 201) for offset in (0, length % 17))
    return all(same_bits(function(x[o : o + n]), truth[o : o + n]) for o, n in pieces)


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over the last axis of [..., W] by halving, keeping it as width 1: element i + element i + half, repeatedly.

    The width counts as padded with zeros to a power of two, so only the width decides the order. ``x`` is not changed.
    """
    width = x.shape[-1]
    if width == 1:
        return x.clone()
    half = 1 << ((width - 1).bit_length() - 1)
    total = torch.add(*x.chunk(2, -1)) if width == 2 * half else _fold(x, half, width)
    while half > 8:
        half //= 2
        total = torch.add(*total.chunk(2, -1))
    # A short last axis wastes the vector unit: the last folds run along the rows instead.
    columns = total.movedim(-1, 0).contiguous()
    while half > 1:
        half //= 2
        columns = torch.add(*columns.chunk(2))
    return columns.movedim(0, -1)


def _fold(x: torch.Tensor, half: int, width: int) -> torch.Tensor:
    """First halving of a width that is no power of two: what is missing counts as zero."""
    folded = x[..., :half].clone()
    folded[..., : width - half] += x[..., half:]
    return folded
