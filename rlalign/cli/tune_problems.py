"""What tune.py tunes: an operator at one shape, its candidates, how they run and what proves their bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from rlalign_kernels import tuned
from rlalign_kernels.conformance import difference, hard_data
from rlalign_kernels.gemm import space as gemm_space
from rlalign_kernels.gemm.schedules import HopperTile, Layer, Tile, fitted
from rlalign_kernels.gpu import architecture, num_processors
from rlalign_kernels.vocab import space as head_space
from rlalign_kernels.vocab.schedules import HeadTile, head_tile

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Row counts from first to last that share a schedule."""

    first: int
    last: int

    @property
    def measured(self) -> tuple[int, ...]:
        """Row counts that stand for the others: the last, and the middle."""
        return tuple(sorted({(self.first + self.last + 1) // 2, self.last}))

    @property
    def proven(self) -> tuple[int, ...]:
        return tuple(sorted({self.first, *self.measured}))


def buckets(ends: Sequence[int]) -> list[Bucket]:
    """Up to each of ``ends``. Raises ValueError unless they ascend from 1 or more."""
    starts = (0, *ends)
    if not ends or any(a >= b for a, b in zip(starts, ends, strict=False)):
        raise ValueError(f"--rows {','.join(map(str, ends))}: need row counts from 1 on, ascending")
    return [Bucket(a + 1, b) for a, b in zip(starts, ends, strict=False)]


class Problem(Protocol):
    """An operator at one shape."""

    name: str

    def default(self, num_rows: int) -> Any:
        """What runs without a table."""

    def candidates(self, num_rows: int) -> list[Any]: ...

    def call(self, tile: Any, num_rows: int) -> Call: ...

    def differs(self, tile: Any, num_rows: int) -> str | None:
        """What of the float32 results differs from the default's bits; None if nothing does."""

    def entry(self, bucket: Bucket, tile: Any) -> tuned.LinearEntry | tuned.HeadEntry: ...


@dataclass(frozen=True)
class LinearProblem:
    """x [M, depth] and weight [width, depth]; one chain over K."""

    width: int
    depth: int
    dtype: torch.dtype
    device: torch.device
    most_rows: int

    @property
    def name(self) -> str:
        return f"linear {self.width} x {self.depth}"

    @cached_property
    def operands(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._data(self.most_rows, seed=1, octaves=0), self._data(self.width, seed=2, octaves=0)

    def _data(self, size: int, *, seed: int, octaves: int) -> torch.Tensor:
        return hard_data(size, self.depth, seed=seed, dtype=self.dtype, device=self.device, octaves=octaves)

    @cached_property
    def layer(self) -> Layer:
        return gemm_space.layer_of(*self.operands)

    def default(self, num_rows: int, out_dtype: torch.dtype | None = None) -> Tile | HopperTile:
        return gemm_space.chosen(self.layer, num_rows, out_dtype or self.dtype, num_processors(self.device))

    def candidates(self, num_rows: int) -> list[Tile | HopperTile]:
        return gemm_space.candidates(self.layer, num_rows, self.dtype)

    def call(self, tile: Tile | HopperTile, num_rows: int) -> Call:
        from rlalign_kernels.gemm.triton_backend import forward  # triton may be missing where nobody asks for it

        x, weight = self.operands
        return partial(forward, x[:num_rows], weight, schedule=tile)

    def differs(self, tile: Tile | HopperTile, num_rows: int) -> str | None:
        from rlalign_kernels.gemm.triton_backend import forward

        octaves = 3 if self.dtype == torch.float16 else 10
        x, weight = (self._data(n, seed=3 + i, octaves=octaves) for i, n in enumerate((num_rows, self.width)))
        run = partial(forward, x, weight, out_dtype=torch.float32)
        wide = fitted(tile, torch.float32) if isinstance(tile, HopperTile) else tile
        expected = run(schedule=self.default(num_rows, torch.float32))
        return difference([run(schedule=wide)], [expected], f"{tile}, {num_rows} rows")

    def entry(self, bucket: Bucket, tile: Tile | HopperTile) -> tuned.LinearEntry:
        layer = self.layer
        return tuned.LinearEntry(
            self.width, self.depth, self.dtype, layer.boxes, bucket.first, bucket.last, tile
        )  # fmt: skip


@dataclass(frozen=True)
class HeadProblem:
    """hidden [M, depth] and the output layer's weight [vocab, depth]: log-probs, or draws with ``sample``.

    What is tuned is the scan over the logits, nearly all of the work.
    """

    vocab: int
    depth: int
    dtype: torch.dtype
    device: torch.device
    most_rows: int
    sample: bool

    @property
    def name(self) -> str:
        return f"{'linear_sample' if self.sample else 'linear_logprob'} {self.vocab} x {self.depth}"

    @cached_property
    def operands(self) -> tuple[torch.Tensor, torch.Tensor]:
        where = {"dtype": self.dtype, "device": self.device, "octaves": 0}
        hidden = hard_data(self.most_rows, self.depth, seed=1, **where)
        return hidden, hard_data(self.vocab, self.depth, seed=2, **where) * (2 * self.depth**-0.5)

    def default(self, num_rows: int) -> HeadTile:
        return head_tile(num_rows, self.dtype, architecture(self.device), self.sample)

    def candidates(self, num_rows: int) -> list[HeadTile]:
        return head_space.candidates(num_rows, self.dtype, architecture(self.device), self.sample)

    def call(self, tile: HeadTile, num_rows: int) -> Callable[[], torch.Tensor]:
        from rlalign_kernels.vocab import triton_launches as launches

        hidden, weight = self.operands
        numbers = torch.arange(num_rows, device=self.device)
        half = torch.full((num_rows,), 0.6, device=self.device)
        # temperature alone reaches the scan
        settings = launches.Settings(half, numbers, half, half)
        drawing = {"seeds": numbers * 977, "positions": numbers} if self.sample else {}
        head = launches.Head.of(weight, None, None)
        return partial(launches.scan, hidden[:num_rows], head, settings, None, tile=tile, **drawing)

    def differs(self, tile: HeadTile, num_rows: int) -> str | None:
        found, expected = (self.call(one, num_rows)() for one in (tile, self.default(num_rows)))
        return difference([found], [expected], f"{tile}, {num_rows} rows")

    def entry(self, bucket: Bucket, tile: HeadTile) -> tuned.HeadEntry:
        return tuned.HeadEntry(self.vocab, self.depth, self.dtype, self.sample, bucket.first, bucket.last, tile)
