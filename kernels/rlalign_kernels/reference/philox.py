"""Philox4x32-10, and Gumbel noise as a function of (seed, response index, vocabulary id) alone.

Key: the 64-bit seed. Counter: (vocabulary id // 4, response index, 0, 0); the id's word is number id % 4.
On a device all arithmetic is in int64, whose wrap-around leaves the needed bits of the 32 x 32-bit products intact; on
the host NumPy has unsigned integers, and a fifth of the overhead per call. Integers: both give the same words.
"""

from __future__ import annotations

import numpy as np
import torch

from rlalign_kernels.reference.elementwise import elementwise

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Words int64 [4, ...] in [0, 2^32) of counter int64 [4, ...] and key int64 [2, ...] (broadcast over ...)."""
    multipliers = torch.tensor(_MULTIPLIERS, device=counter.device).view(2, *[1] * (counter.dim() - 1))
    weyl = torch.tensor(_WEYL, device=counter.device).view(2, *[1] * (key.dim() - 1))
    even, odd = counter[0::2], counter[1::2]
    for _ in range(_ROUNDS):
        # The second product feeds the first word and the other way round, hence the flip.
        products = (even * multipliers).flip(0)
        even = ((products >> 32) ^ odd).bitwise_xor_(key).bitwise_and_(_MASK)
        odd = products.bitwise_and_(_MASK)
        key = (key + weyl).bitwise_and_(_MASK)
    return torch.stack((even, odd), dim=1).flatten(0, 1)


def philox_host(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """``philox`` of uint64 arrays, on the host."""
    multipliers = np.array(_MULTIPLIERS, dtype=np.uint64).reshape(2, *[1] * (counter.ndim - 1))
    weyl = np.array(_WEYL, dtype=np.uint64).reshape(2, *[1] * (key.ndim - 1))
    mask, shift = np.uint64(_MASK), np.uint64(32)
    even, odd = counter[0::2], counter[1::2]
    for _ in range(_ROUNDS):
        products = (even * multipliers)[::-1]
        even = (products >> shift) ^ odd ^ key
        odd = products & mask
        key = (key + weyl) & mask
    return np.stack((even, odd), axis=1).reshape(counter.shape)


def _words(seeds: torch.Tensor, positions: torch.Tensor, groups: range) -> torch.Tensor:
    """int64 [T, groups, 4]: the words of each counter."""
    shape = (4, seeds.shape[0], len(groups))
    if seeds.device.type == "cpu":
        seed, position = seeds.numpy().view(np.uint64), positions.numpy().astype(np.uint64)
        counter = np.zeros(shape, dtype=np.uint64)
        counter[0], counter[1] = np.arange(groups.start, groups.stop), (position & np.uint64(_MASK))[:, None]
        key = np.stack((seed & np.uint64(_MASK), seed >> np.uint64(32)))[..., None]
        words = torch.from_numpy(philox_host(counter, key).view(np.int64))
    else:
        counter = torch.zeros(shape, dtype=torch.int64, device=seeds.device)
        counter[0] = torch.arange(groups.start, groups.stop, device=seeds.device)
        counter[1] = (positions.to(torch.int64) & _MASK).unsqueeze(1)
        words = philox(counter, torch.stack((seeds & _MASK, (seeds >> 32) & _MASK)).unsqueeze(-1))
    return words.permute(1, 2, 0)


def gumbel(seeds: torch.Tensor, positions: torch.Tensor, start: int, width: int) -> torch.Tensor:
    """float32 [T, width] Gumbel noise for vocabulary ids start ... start + width - 1 (start a multiple of 4).

    seeds int64 or uint64 [T], positions (response index) int64 [T]. u = (word + 1/2) 2^-32, at most 1 - 2^-24;
    noise = -log(-log1p(-u)).
    """
    words = _words(seeds.view(torch.int64), positions, range(start // 4, -(-(start + width) // 4)))
    words = words.reshape(seeds.shape[0], -1)[:, :width]
    uniform = (words.to(torch.float32) + 0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    exponential = elementwise("log1p", uniform.neg_(), inplace=True).neg_()
    return elementwise("log", exponential, inplace=True).neg_()
