"""Run by test_compile_hopper.py outside of Triton's interpreter: compiles Hopper's kernels for a GPU that isn't there.

The host code runs as on that GPU, but a launch compiles its kernel and returns. Prints one JSON object: for every case
the kernels that it launched, or the error that it met.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from rlalign_kernels.attention import hopper_backend as attention
from rlalign_kernels.attention import hopper_softmax, schedules, triton_backend
from rlalign_kernels.attention.tile_plan import tile_plan
from rlalign_kernels.attention.triton_problem import Keys, Masking
from rlalign_kernels.gemm import hopper_backend as gemm
from rlalign_kernels.gemm.schedules import HopperTile, fitted
from rlalign_kernels.launch import Launch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime import driver
from triton.runtime.cache import triton_key

DTYPE = torch.bfloat16
TOKENS, HEADS, KV_HEADS = 256, 4, 2


class Hopper:
    """What Triton asks a GPU's driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Lowered(Exception):
    """The kernel's source, types and layouts are sound; enough of it."""


def lowered(*_: Any) -> None:
    raise Lowered


def integers(*shape: int, wide: bool = False) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int64 if wide else torch.int32)


def shape_of(dim: int) -> schedules.Shape:
    return schedules.Shape(dim, dim, HEADS // KV_HEADS, DTYPE, (9, 0))


def forward(
    dim: int, *, page: int = 0, left: int | None = None, sinks: bool = False, one_split: bool, wide: bool = False
) -> None:
    shape = shape_of(dim)
    launch = attention.forward(
        shape, tile_plan(dim, dim, DTYPE, (9, 0)), schedules.hopper_forward_tile(shape, False), Masking(0.1, left, 0),
        num_tokens=TOKENS, num_sequences=2, num_heads=HEADS, num_programs=132, has_sinks=sinks, has_lse=True,
        one_split=one_split, few_rows=16 if page else 0, page_size=page, stride_table=8,
    )  # fmt: skip
    q, keys = torch.zeros(TOKENS, HEADS, dim, dtype=DTYPE), (8, page) if page else (TOKENS,)
    k = torch.zeros(*keys, KV_HEADS, dim, dtype=DTYPE)
    cu, lse = integers(3, wide=wide), torch.zeros(TOKENS, HEADS)
    tables, lens = integers(2, 8, wide=wide), integers(2, wide=wide)
    launch(q, k, k, q, lse, torch.zeros(HEADS), cu, cu, lens, tables, integers(1))


def backward(dim: int, *, left: int | None = None, of_queries: bool, wide: bool = False) -> None:
    shape = shape_of(dim)
    q = torch.zeros(TOKENS, HEADS, dim, dtype=DTYPE)
    k = torch.zeros(TOKENS, KV_HEADS, dim, dtype=DTYPE)
    launches = attention.Backward(
        shape, schedules.hopper_backward_tiles(shape, False), Masking(0.1, left, 0), (*q.stride()[:2], *q.stride()[:2]),
        num_tokens=TOKENS, num_keys=TOKENS, num_sequences=2, kv_heads=KV_HEADS, num_programs=132,
    )  # fmt: skip
    dq, dk, dv = (q, None, None) if of_queries else (None, k, k)
    cu = integers(3, wide=wide)
    launches(q, k, k, q, torch.zeros(TOKENS, HEADS), q, dq, dk, dv, cu, cu, integers(1))


def stock(num_queries: int, longest: int) -> None:
    """On pages, by the kernels of any GPU."""
    triton_backend.num_processors = lambda device: 132
    shape, plan = shape_of(128), tile_plan(128, 128, DTYPE, (9, 0))
    q, cache = torch.zeros(2 * num_queries, HEADS, 128, dtype=DTYPE), torch.zeros(8, 128, KV_HEADS, 128, dtype=DTYPE)
    keys = Keys(cache, cache, None, integers(2, 32, wide=True), integers(2, wide=True), longest)
    tiles = schedules.prefill_tile(shape, plan), schedules.decode_tile(shape, plan, 1, 132, True)
    triton_backend.forward(
        q, keys, integers(3, wide=True), Masking(0.1, None, 0), max_seqlen_q=num_queries, return_lse=True, tiles=tiles
    )


def linear(tile: HopperTile, *, leaves: int = 1) -> None:
    x = torch.zeros(256, 256, dtype=DTYPE)
    call = gemm.make_call(256, 256, 256 // leaves, leaves, DTYPE, DTYPE, True, fitted(tile, DTYPE), 132)
    call(x, x, x[0], x)


@gluon.jit
def column_left_where_it_was(x, layout: gl.constexpr):
    return gl.expand_dims(x, 1)


def broken() -> None:
    hopper_softmax.column = column_left_where_it_was
    forward(64, one_split=False)


# Compiled to the end; of the others only what depends on the source, which takes a tenth of the time.
WHOLE: dict[str, Callable[[], None]] = {
    "forward": lambda: forward(64, one_split=True),
    "gradient of queries": lambda: backward(64, of_queries=True),
    "linear": lambda: linear(HopperTile(1, 64, block_k=128, swap=False, chunk=16), leaves=2),
}
LOWERED: dict[str, Callable[[], None]] = {
    "forward on pages": lambda: forward(128, page=128, left=63, sinks=True, one_split=False, wide=True),
    "gradient of keys": lambda: backward(128, left=63, of_queries=False, wide=True),
    "gradient of queries, wide offsets": lambda: backward(64, of_queries=True, wide=True),
    "stock forward": lambda: stock(128, 1024),
    "stock decode": lambda: stock(1, 4096),
    "linear, two warpgroups": lambda: linear(HopperTile(2, 128, more=64)),
    "linear, three warpgroups": lambda: linear(HopperTile(3, 128, swap=False, more=64)),
    "broken": broken,
}


def stack_bytes(cubin: bytes) -> int:
    """Per thread: what registers had no room for."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", usage).group(1))


def run(name: str) -> tuple[str, dict[str, Any]]:
    """What case ``name`` launched: {kernel: its bytes of shared memory and stack}, None where it was only lowered."""
    kernels: dict[str, Any] = {}

    def compile_instead(launch: Launch, *tensors: torch.Tensor | None) -> None:
        kernel = launch._kernel.fn.__name__
        kernels[kernel] = None
        try:
            made = launch._kernel.warmup(
                *launch._arguments(tensors), *launch._numbers, grid=launch._grid, **launch._constants
            )
        except Lowered:
            return
        kernels[kernel] = {"shared": made.metadata.shared, "stack": stack_bytes(made.asm["cubin"])}

    Launch.__call__ = compile_instead
    if name in LOWERED:
        CUDABackend.make_llir = lowered
    try:
        (WHOLE | LOWERED)[name]()
    except Exception as error:
        return name, {"error": f"{type(error).__name__}: {error}"}
    return name, {"kernels": kernels}


def main() -> None:
    driver.set_active(Hopper())
    schedules.hopper_available = lambda architecture: True
    triton_key()  # takes seconds, and is remembered
    with multiprocessing.get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        json.dump(dict(pool.imap_unordered(run, [*WHOLE, *LOWERED])), sys.stdout)


if __name__ == "__main__":
    main()
