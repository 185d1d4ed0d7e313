"""linear's cases for ``bench_kernels.py``: forward at four layer shapes, one to 16,384 rows, bfloat16, against cuBLAS.

Up to 1,024 rows from a CUDA graph, where the host's time would hide the kernel's. ``leaves``: K summed in 2, 4 or 8
parts, as on so many GPUs; one leaf is the chain that everything else runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from rlalign_kernels import linear

from rlalign.cli.bench_kernels import Case

_DEVICE, _DTYPE = "cuda", torch.bfloat16
_SHAPES = ((6144, 2048), (2048, 6144), (12288, 4096), (4096, 4096))
# By table; between: row counts that no tile fits.
_ROWS = {
    "forward": (1, 16, 64, 256, 512, 1024, 2048, 4096, 16384),
    "between": (96, 160, 300, 400, 600, 900, 1300, 1800, 2561, 3500),
    "leaves": (64, 512, 4096),
}
_GRAPHED_ROWS = 1024


def make_cases(only: str) -> Iterator[Callable[[], Case]]:
    """Cases whose name contains ``only``, each made when it is called."""
    for width, depth in _SHAPES:
        for table, row_counts in _ROWS.items():
            for num_rows in row_counts:
                name = f"{table} N {width}, K {depth}, M {num_rows}"
                if only in name:
                    make = _leaves if table == "leaves" else partial(_forward, table)
                    yield partial(make, name, num_rows, width, depth)


def make_host_cases(only: str) -> Iterator[tuple[str, dict[str, Callable[[], object]]]]:
    """One row of a layer so small that the host's time is all there is."""
    name = "host time, N 256, K 512, M 1"
    if only in name:
        x, weight = _operands(1, 256, 512)
        yield name, {"cublas": partial(F.linear, x, weight), "rlalign": partial(linear, x, weight, backend="triton")}


def _operands(num_rows: int, width: int, depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(num_rows, depth, device=_DEVICE).to(_DTYPE)
    return x, (torch.randn(width, depth, device=_DEVICE) / depth**0.5).to(_DTYPE)


def _forward(table: str, name: str, num_rows: int, width: int, depth: int) -> Case:
    x, weight = _operands(num_rows, width, depth)
    calls: dict[str, Callable[[], object]] = {
        "cublas": lambda: F.linear(x, weight),
        "rlalign": lambda: linear(x, weight, backend="triton"),
    }
    return _case(name, table, "cublas", calls, num_rows, width, depth)


def _leaves(name: str, num_rows: int, width: int, depth: int) -> Case:
    x, weight = _operands(num_rows, width, depth)
    calls: dict[str, Callable[[], object]] = {
        f"rlalign, leaves {leaves}": partial(linear, x, weight, leaves=leaves, backend="triton")
        for leaves in (1, 2, 4, 8)
    }
    return _case(name, "leaves", "rlalign, leaves 1", calls, num_rows, width, depth)


def _case(
    name: str, table: str, baseline: str, calls: dict[str, Callable[[], object]], num_rows: int, width: int, depth: int
) -> Case:
    """Few rows are a matter of bytes, many of operations."""
    graphed = num_rows <= _GRAPHED_ROWS
    if num_rows <= 64:
        num_bytes = (num_rows * depth + width * depth + num_rows * width) * _DTYPE.itemsize
        return Case(name, baseline, calls, num_bytes=float(num_bytes), graphed=graphed, table=table)
    return Case(name, baseline, calls, flops=2.0 * num_rows * width * depth, graphed=graphed, table=table)
