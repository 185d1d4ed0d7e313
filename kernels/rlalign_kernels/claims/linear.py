"""What must hold of ``linear``; on a GPU in float32 output, before rounding could hide a difference."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from rlalign_kernels import tuned
from rlalign_kernels.claims.rows import Rows, Run, backward_claim, row_claims, schedules_claim
from rlalign_kernels.claims.shapes import Setting, Shapes
from rlalign_kernels.conformance import Claim, Subject, hard_data
from rlalign_kernels.gemm.schedules import HopperTile, Layer, Tile
from rlalign_kernels.gemm.space import layer_of, table
from rlalign_kernels.gpu import BOX_ALIGNMENT, architecture, num_processors
from rlalign_kernels.linear import linear

# Row counts that every schedule of the table computes: part of a tile, and several.
_SCHEDULED_ROWS = (7, 200)


def subjects(shapes: Shapes, setting: Setting) -> Iterator[Subject]:
    compared: set[Tile | HopperTile] = set()
    for width, depth in shapes.linear:
        tiles = set()
        if setting.backend == "triton" and setting.schedules:
            tiles = {*_tiles(_layer(width, depth, setting), setting.device)}
        # a schedule's kernel is the same for all layers: what those before took need not be compared again
        scheduled = not tiles <= compared
        compared |= tiles
        yield Subject("linear", f"{width} x {depth}", partial(_claims, width, depth, setting, scheduled))


def _layer(width: int, depth: int, setting: Setting) -> Layer:
    boxes = depth * setting.dtype.itemsize % BOX_ALIGNMENT == 0
    return Layer(width, depth, setting.dtype, 1, architecture(setting.device), boxes)


def _tiles(layer: Layer, device: torch.device) -> list[Tile | HopperTile]:
    """All that its chooser takes, and those of the table that is in use."""
    known = table(layer, torch.float32, num_processors(device))
    return list(dict.fromkeys([*known, *tuned.linear_tiles(layer, torch.float32)]))


def _claims(width: int, depth: int, setting: Setting, scheduled: bool) -> list[Claim]:
    where = {"dtype": setting.dtype, "device": setting.device}
    # float16 has fewer octaves, and products have twice as many
    octaves = 3 if setting.dtype == torch.float16 else 10
    x = hard_data(setting.rows[-1], depth, seed=1, octaves=octaves, **where)
    weight = hard_data(width, depth, seed=2, octaves=octaves, **where)
    bias = hard_data(width, seed=3, octaves=octaves, **where)

    def call(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = linear(x, weight, bias, backend=setting.backend)
        return (out, _wide(x, weight, bias)) if setting.backend == "triton" else (out,)

    claims = row_claims(Rows(call, (x,)), setting.rows)
    if scheduled:
        claims.append(schedules_claim(*(_schedules(x[:num_rows], weight, bias) for num_rows in _SCHEDULED_ROWS)))
    few = x[: setting.rows[-1] // 2]
    claims.append(backward_claim(partial(linear, backend=setting.backend), (few, weight, bias)))
    return claims


def _wide(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    from rlalign_kernels.gemm.triton_backend import forward  # triton may be missing where nobody asks for it

    return forward(x, weight, bias, out_dtype=torch.float32)


def _schedules(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[Run, list[tuple[object, Run]]]:
    """The chosen, and all others."""
    from rlalign_kernels.gemm.triton_backend import forward

    tiles = _tiles(layer_of(x, weight), x.device)

    def run(schedule: Tile | HopperTile) -> tuple[torch.Tensor]:
        return (forward(x, weight, bias, out_dtype=torch.float32, schedule=schedule),)

    return lambda: (_wide(x, weight, bias),), [(tile, partial(run, tile)) for tile in tiles]
