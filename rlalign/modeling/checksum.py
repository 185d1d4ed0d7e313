"""A checksum of tensors that a GPU computes where they lie, in exact integers: the same on every device.

Of a tensor's 32-bit words w, laid out as rows of 65,536, and odd pseudo-random coefficients c and d, fixed for ever:

    sum over rows r of d[r] * (sum over columns i of c[i] * w[r, i])   mod 2^64

twice, with other coefficients: 128 bits. Integer sums have one value in any order. Odd numbers are invertible mod 2^64,
so a change within one word always shows; one of several words goes unseen with a chance of about 2^-128. That is for
accidents: against somebody who wants the same checksum there is SHA-256 (``hash_tensors``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_COLUMNS = 1 << 16
# Words whose products are held at once: 128 MiB of them.
_PIECE = 1 << 24
_LANES = 2


@torch.no_grad()
def checksum_tensors(tensors: Mapping[str, Tensor]) -> str:
    """64 hexadecimal digits of names, dtypes, shapes and bytes, in order of name. Waits for a device once per dict."""
    names = sorted(tensors)
    sums = [_sums(tensors[name].detach()) for name in names]
    digest = hashlib.sha256()
    for name, lanes in zip(names, torch.stack(sums).tolist() if sums else [], strict=True):
        digest.update(f"{name}\0{tensors[name].dtype}\0{tuple(tensors[name].shape)}\0{lanes}\0".encode())
    return digest.hexdigest()


def _sums(tensor: Tensor) -> Tensor:
    """int64 [2], on the tensor's device."""
    words = _words(tensor)
    total = torch.zeros(_LANES, dtype=torch.int64, device=words.device)
    for start in range(0, len(words), _PIECE):
        piece = words[start : start + _PIECE]
        for lane in range(_LANES):
            total[lane] += _sum(piece, start // _COLUMNS, lane)
    return total


def _sum(words: Tensor, first_row: int, lane: int) -> Tensor:
    """int64 []: of int32 words whose first one begins row ``first_row``."""
    num_rows, rest = divmod(len(words), _COLUMNS)
    columns = _coefficients(_COLUMNS, 2 * lane, words.device)
    rows = _coefficients(_power_of_two(first_row + num_rows + 1), 2 * lane + 1, words.device)[first_row:]
    whole = words[: num_rows * _COLUMNS].view(num_rows, _COLUMNS)
    total = ((whole * columns).sum(1) * rows[:num_rows]).sum()
    return total + (words[num_rows * _COLUMNS :] * columns[:rest]).sum() * rows[num_rows]


def _words(tensor: Tensor) -> Tensor:
    """The bytes as int32, zeros behind them where they are no multiple of four."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 4:
        flat = flat.clone()
    missing = -len(flat) % 4
    return (torch.nn.functional.pad(flat, (0, missing)) if missing else flat).view(torch.int32)


@lru_cache(64)
def _coefficients(count: int, stream: int, device: torch.device) -> Tensor:
    """Odd int64 [count]: splitmix64 of the position; a sequence per ``stream``. A longer one begins like a shorter."""
    with np.errstate(over="ignore"):
        z = np.arange(count, dtype=np.uint64) + np.uint64((stream + 1) << 48)
        z = (z + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = (z ^ (z >> np.uint64(31))) | np.uint64(1)
    return torch.from_numpy(z.view(np.int64)).to(device)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
