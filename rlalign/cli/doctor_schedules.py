"""Which schedules the operators of these shapes take on this machine, as far as they are known before a launch."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

from rlalign_kernels import CONFORMANCE
from rlalign_kernels.claims import Setting, Shapes

_ROWS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
# Enough to see where decoding splits its keys among programs: sequences, and keys of each.
_DECODES = ((1, 8192), (16, 4096), (128, 2048))


def schedules_in_use(shapes: Shapes, setting: Setting) -> dict[str, Any]:
    """JSON-ready, by operator and shape: of "triton" by row count, of "reference" the verdicts measured so far."""
    if setting.backend == "native":
        return {}
    if setting.backend == "reference":
        return CONFORMANCE.report()
    found = _linear(shapes, setting) | _head(shapes, setting) | _attention(shapes, setting) | _norm(shapes, setting)
    tuned = CONFORMANCE.report().get("tuned")
    return found if tuned is None else found | {"tuned": tuned}


def _by_rows(choose: Callable[[int], object]) -> dict[str, str]:
    """``{"1-64": "Tile(...)"}``: of the row counts asked, those in a row that take one schedule."""
    runs = [(str(tile), list(rows)) for tile, rows in groupby(_ROWS, key=choose)]
    return {f"{rows[0]}-{rows[-1]}" if len(rows) > 1 else str(rows[0]): tile for tile, rows in runs}


def _linear(shapes: Shapes, setting: Setting) -> dict[str, Any]:
    from rlalign_kernels import tuned
    from rlalign_kernels.gemm.schedules import Layer
    from rlalign_kernels.gemm.space import chosen
    from rlalign_kernels.gpu import BOX_ALIGNMENT, architecture, num_processors

    def choose(layer: Layer, num_rows: int) -> object:
        found = tuned.linear_tile(layer, num_rows, setting.dtype)
        return found or chosen(layer, num_rows, setting.dtype, num_processors(setting.device))

    result = {}
    for width, depth in shapes.linear:
        boxes = depth * setting.dtype.itemsize % BOX_ALIGNMENT == 0
        layer = Layer(width, depth, setting.dtype, 1, architecture(setting.device), boxes)
        result[f"linear {width} x {depth}"] = _by_rows(lambda rows, layer=layer: choose(layer, rows))
    return result


def _head(shapes: Shapes, setting: Setting) -> dict[str, Any]:
    from rlalign_kernels import tuned
    from rlalign_kernels.gpu import architecture
    from rlalign_kernels.vocab.schedules import head_tile

    where = setting.dtype, architecture(setting.device)

    def choose(sample: bool) -> Callable[[int], object]:
        return lambda rows: tuned.head_tile(rows, *shapes.head, *where, sample) or head_tile(rows, *where, sample)

    size = f"{shapes.head[0]} ids x {shapes.head[1]}"
    return {
        f"linear_logprob {size}": _by_rows(choose(sample=False)),
        f"linear_sample {size}": _by_rows(choose(sample=True)),
    }


def _attention(shapes: Shapes, setting: Setting) -> dict[str, Any]:
    from rlalign_kernels.attention import schedules
    from rlalign_kernels.attention.tile_plan import tile_plan
    from rlalign_kernels.gpu import architecture, num_processors

    processors, result = num_processors(setting.device), {}
    for one in shapes.attention:
        shape = schedules.Shape(
            one.head_dim, one.value_dim, one.query_heads // one.key_heads, setting.dtype, architecture(setting.device)
        )
        plan = tile_plan(one.head_dim, one.value_dim, setting.dtype, shape.architecture)
        named: dict[str, object] = {
            "packed": schedules.hopper_forward_tile(shape, False) or schedules.prefill_tile(shape, plan),
            "chunks on pages": schedules.prefill_tile(shape, plan),
            "gradient": schedules.hopper_backward_tiles(shape, False)
            or (schedules.dq_tile(shape), schedules.dkv_tile(shape)),
        }
        for sequences, keys in _DECODES:
            places, splits = sequences * one.key_heads, -(-keys // plan.split)
            apart = schedules.splits_apart(places, splits, processors)
            tile = schedules.decode_tile(shape, plan, places * (splits if apart else 1), processors, True)
            how = "a program per split" if apart else "a program per head"
            named[f"decode {sequences} of {keys}"] = f"{tile}, {how}"
        result[f"attention {one}"] = {name: str(tile) for name, tile in named.items()}
    return result


def _norm(shapes: Shapes, setting: Setting) -> dict[str, Any]:
    from rlalign_kernels.elementwise.row_plan import backward_tile, forward_tile
    from rlalign_kernels.gpu import architecture

    size, machine = setting.dtype.itemsize, architecture(setting.device)
    return {
        f"{name} {n}": {
            "forward": str(forward_tile(n, size)),
            "backward": str(backward_tile(n, size, machine, centered=centered)),
        }
        for name, centered in (("rms_norm", False), ("layer_norm", True))
        for n in shapes.norm
    }
