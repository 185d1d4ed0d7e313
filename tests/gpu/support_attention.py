"""Attention problems in several shapes: packed, paged with poisoned free slots, chunked; and what their bits are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from rlalign_kernels import attention_packed

DEVICE = "cuda"
LENGTHS = [1, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 2048, 4095, 4096, 4097]
SHORT = [1, 17, 64, 129, 300, 511]
PROBLEMS = {
    "bf16": {},
    "bf16 group of 5, sinks, window": {"heads": (5, 1), "dims": (80, 80), "sinks": True, "settings": {"window": 128}},
    "bf16 sinks": {"sinks": True},
    "bf16 64, sinks, window": {"heads": (8, 1), "dims": (64, 64), "sinks": True, "settings": {"window": 128}},
    "bf16 full": {"settings": {"causal": False}},
    "bf16 192/128, soft cap": {"heads": (4, 4), "dims": (192, 128), "settings": {"softcap": 20.0}},
    "fp16 64, window": {"heads": (6, 2), "dims": (64, 64), "dtype": torch.float16, "settings": {"window": 300}},
    "fp16": {"dtype": torch.float16},
    "fp32": {"dims": (64, 64), "dtype": torch.float32},
    "bf16 256": {"heads": (2, 1), "dims": (256, 256)},
}  # fmt: skip


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


def make(name: str, lengths: list[int] = LENGTHS) -> Problem:
    return Problem(list(lengths), **PROBLEMS[name])


def packed(p: Problem, q=None, k=None, v=None, cu_q=None, cu_k=None, **changed):
    """(out, lse) with outputs that nobody wrote before: the allocator is given NaN to hand out."""
    q, k, v = p.q if q is None else q, p.k if k is None else k, p.v if v is None else v
    poison = [torch.full((q.shape[0], q.shape[1], v.shape[2]), torch.nan, dtype=q.dtype, device=DEVICE)]
    poison.append(torch.full(q.shape[:2], torch.nan, device=DEVICE))
    del poison
    cu = {"cu_seqlens_q": p.cu if cu_q is None else cu_q, "cu_seqlens_k": p.cu if cu_k is None else cu_k}
    return attention_packed(q, k, v, **cu, **{**p.keywords, **changed})
