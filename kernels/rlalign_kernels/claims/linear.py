"""What must hold of ``linear``; on a GPU in float32 output, before rounding could hide a difference."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from rlalign_kernels.claims.rows import Rows, Run, backward_claim, row_claims, schedules_claim
from rlalign_kernels.claims.shapes import Setting, Shapes
from rlalign_kernels.conformance import Claim, Subject, hard_data
from rlalign_kernels.gemm.schedules import HopperTile, Tile
from rlalign_kernels.linear import linear

# Row counts that every schedule of the table computes: part of a tile, and several.
_SCHEDULED_ROWS = (7, 200)


def subjects(shapes: Shapes, setting: Setting) -> Iterator[Subject]:
    for index, (width, depth) in enumerate(shapes.linear):
        # kernels are compiled alike for layers alike: one tells of all
        scheduled = setting.schedules and index == 0
        yield Subject("linear", f"{width} x {depth}", partial(_claims, width, depth, setting, scheduled))


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
    if setting.backend == "triton" and scheduled:
        claims.append(schedules_claim(*(_schedules(x[:num_rows], weight, bias) for num_rows in _SCHEDULED_ROWS)))
    few = x[: setting.rows[-1] // 2]
    claims.append(backward_claim(partial(linear, backend=setting.backend), (few, weight, bias)))
    return claims


def _wide(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    from rlalign_kernels.gemm.triton_backend import forward  # triton may be missing where nobody asks for it

    return forward(x, weight, bias, out_dtype=torch.float32)


def _schedules(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[Run, list[tuple[object, Run]]]:
    """The chosen, and all others, the table's that is in use among them."""
    from rlalign_kernels import tuned
    from rlalign_kernels.gemm.space import layer_of, table
    from rlalign_kernels.gemm.triton_backend import forward
    from rlalign_kernels.gpu import num_processors

    layer = layer_of(x, weight)
    known = table(layer, torch.float32, num_processors(x.device))
    tiles = dict.fromkeys([*known, *tuned.linear_tiles(layer, torch.float32)])

    def run(schedule: Tile | HopperTile) -> tuple[torch.Tensor]:
        return (forward(x, weight, bias, out_dtype=torch.float32, schedule=schedule),)

    return lambda: (_wide(x, weight, bias),), [(tile, partial(run, tile)) for tile in tiles]
