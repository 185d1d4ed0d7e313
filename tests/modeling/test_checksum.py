"""The checksum that a weight sync compares: exact, the same in any layout, and nothing slips through."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlalign.modeling import checksum, checksum_tensors

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    return (torch.randn(shape, generator=generator) * 100).to(dtype)


def by_python(tensor: torch.Tensor) -> list[int]:
    """The formula, in Python's integers."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    words = np.frombuffer(data + b"\0" * (-len(data) % 4), np.int32).tolist()
    totals = []
    for lane in range(2):
        columns = checksum._coefficients(65536, 2 * lane, torch.device("cpu")).tolist()
        rows = checksum._coefficients(8, 2 * lane + 1, torch.device("cpu")).tolist()
        total = sum(rows[i // 65536] * columns[i % 65536] * word for i, word in enumerate(words)) % 2**64
        totals.append(total - 2**64 if total >= 2**63 else total)
    return totals


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 4), (7, 1001), (3, 50_001)])
def test_it_is_the_stated_formula(shape, dtype, monkeypatch):
    tensor = random(shape, dtype)
    expected = by_python(tensor)
    assert checksum._sums(tensor).tolist() == expected
    monkeypatch.setattr(checksum, "_PIECE", 65536)  # in pieces
    assert checksum._sums(tensor).tolist() == expected


def test_it_depends_on_content_alone():
    x = random((40, 60), torch.bfloat16)
    base = checksum_tensors({"a": x, "b": x[:3]})
    wide = torch.zeros(41, 61, dtype=torch.bfloat16)
    wide[1:, 1:] = x
    offset = torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(40, 60)  # begins two bytes after a word
    for same in (wide[1:, 1:], x.T.contiguous().T, offset):
        assert checksum_tensors({"b": same[:3], "a": same}) == base
    others = [
        {"a": x, "c": x[:3]}, {"a": x.view(60, 40), "b": x[:3]}, {"a": x.view(torch.float16), "b": x[:3]}, {"a": x},
        {"a": x[:3], "b": x}, {},
    ]  # fmt: skip
    assert len({base, *map(checksum_tensors, others)}) == 1 + len(others)


def test_every_flipped_bit_and_every_swap_shows():
    x = random((9, 7), torch.bfloat16)
    bits = x.view(torch.int16)
    seen = {checksum_tensors({"w": x})}
    for index in range(x.numel()):
        for bit in range(16):
            bits.view(-1)[index] ^= (1 << bit) - (1 << 16 if bit == 15 else 0)
            seen.add(checksum_tensors({"w": x}))
            bits.view(-1)[index] ^= (1 << bit) - (1 << 16 if bit == 15 else 0)
    assert len(seen) == 1 + x.numel() * 16
    rows = torch.stack([x, *(x[torch.randperm(9, generator=torch.Generator().manual_seed(i))] for i in range(20))])
    assert len({checksum_tensors({"w": one}) for one in rows}) == len(rows.unique(dim=0))


def test_minus_zero_and_nan_payloads_are_told_apart():
    nan = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    values = [torch.tensor([0.0]), torch.tensor([-0.0]), nan[:1], nan[1:]]
    assert len({checksum_tensors({"w": value}) for value in values}) == 4


def test_words_far_apart_have_their_own_coefficients():
    for stream in range(4):
        found = checksum._coefficients(1 << 17, stream, torch.device("cpu"))
        assert len(found.unique()) == len(found) and (found % 2 != 0).all()
        assert torch.equal(checksum._coefficients(8, stream, torch.device("cpu")), found[:8])
