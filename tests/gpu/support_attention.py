"""One attention problem in several shapes: packed, paged with poisoned free slots, chunked; and what its bits are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

DEVICE = "cuda"


def bits(x: torch.Tensor) -> torch.Tensor:
    """Integer view, so that equality is bitwise."""
    return x.detach().contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)


def same_bits(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    return all(x.shape == y.shape and torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


def offsets(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)


def heavy(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Normal values, a few of them large: sums whose order matters."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    values = torch.randn(shape, generator=generator, device=DEVICE)
    return (values * torch.where(torch.rand(shape, generator=generator, device=DEVICE) < 0.02, 8.0, 1.0)).to(dtype)


@dataclass
class Problem:
    """q, k, v of sequences of ``lengths``; ``settings`` are keywords of the operators."""

    lengths: list[int]
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (128, 128)
    dtype: torch.dtype = torch.bfloat16
    settings: dict[str, object] = field(default_factory=dict)
    sinks: bool = False

    def __post_init__(self) -> None:
        tokens = sum(self.lengths)
        self.q = heavy((tokens, self.heads[0], self.dims[0]), self.dtype, 1)
        self.k = heavy((tokens, self.heads[1], self.dims[0]), self.dtype, 2)
        self.v = heavy((tokens, self.heads[1], self.dims[1]), self.dtype, 3)
        self.cu = offsets(self.lengths)
        self.keywords = {"scale": self.dims[0] ** -0.5, "backend": "triton", "return_lse": True, **self.settings}
        if self.sinks:
            self.keywords["sinks"] = heavy((self.heads[0],), torch.float32, 4)

    def rows(self, b: int) -> slice:
        return slice(sum(self.lengths[:b]), sum(self.lengths[: b + 1]))

    def last(self, counts: Sequence[int]) -> tuple[list[int], torch.Tensor]:
        """Each sequence's last queries, at most counts[b]: how many there are, and their rows."""
        taken = [min(count, length) for count, length in zip(counts, self.lengths, strict=True)]
        ends = self.cu[1:].tolist()
        index = [torch.arange(end - n, end, device=DEVICE) for end, n in zip(ends, taken, strict=True)]
        return taken, torch.cat(index)

    def cache(self, page: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """Fragmented pages in random order; free slots and pages are NaN, unused table entries nonsense."""
        counts = [-(-length // page) for length in self.lengths]
        free = 5
        shape = (sum(counts) + free, page, self.heads[1])
        k_cache = torch.full((*shape, self.dims[0]), torch.nan, dtype=self.dtype, device=DEVICE)
        v_cache = torch.full((*shape, self.dims[1]), torch.nan, dtype=self.dtype, device=DEVICE)
        order = torch.randperm(shape[0], generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)
        tables = torch.full((len(counts), max(counts) + 1), 10**6, dtype=torch.int32, device=DEVICE)
        start = 0
        for b, (length, count) in enumerate(zip(self.lengths, counts, strict=True)):
            pages = order[start : start + count]
            tables[b, :count] = pages.int()
            start += count
            position = torch.arange(length, device=DEVICE)
            k_cache[pages[position // page], position % page] = self.k[self.rows(b)]
            v_cache[pages[position // page], position % page] = self.v[self.rows(b)]
        kv_lens = torch.tensor(self.lengths, dtype=torch.int32, device=DEVICE)
        return {"k_cache": k_cache, "v_cache": v_cache, "block_tables": tables, "kv_lens": kv_lens}
