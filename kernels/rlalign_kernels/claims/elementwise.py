"""What must hold of the norms, rotary and the activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from rlalign_kernels.activation import geglu, gelu, silu, swiglu
from rlalign_kernels.claims.rows import Rows, Run, backward_claim, row_claims, schedules_claim
from rlalign_kernels.claims.shapes import AttentionShape, Setting, Shapes
from rlalign_kernels.conformance import Claim, Subject, difference, hard_data
from rlalign_kernels.elementwise.row_plan import RowTile
from rlalign_kernels.layer_norm import layer_norm
from rlalign_kernels.norm import rms_norm
from rlalign_kernels.rope import apply_rotary, rotary_cos_sin

_EPS = 1e-6
_POSITIONS = 100_000
_THETA = 10_000.0


def subjects(shapes: Shapes, setting: Setting) -> Iterator[Subject]:
    for size in shapes.norm:
        yield Subject("rms_norm", f"{size}", partial(_norm_claims, _rms, False, size, setting))
    for size in shapes.norm:
        yield Subject("layer_norm", f"{size}", partial(_norm_claims, _layer, True, size, setting))
    for shape in shapes.attention:
        yield Subject("rotary", str(shape), partial(_rotary_claims, shape, setting))
    size = shapes.intermediate
    for name, run, gated in (
        ("silu", silu, False), ("swiglu", swiglu, True), ("gelu", gelu, False), ("geglu", geglu, True)
    ):  # fmt: skip
        yield Subject(name, f"{size}", partial(_activation_claims, name, run, gated, size, setting))


def _data(setting: Setting, *shape: int, seed: int, octaves: int = 4) -> torch.Tensor:
    return hard_data(*shape, seed=seed, dtype=setting.dtype, device=setting.device, octaves=octaves)


def _rms(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return rms_norm(x, weight, eps=_EPS, residual=residual, backend=backend)


def _layer(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return layer_norm(x, weight, weight, eps=_EPS, residual=residual, backend=backend)


def _norm_claims(norm: Callable[..., tuple], centered: bool, size: int, setting: Setting) -> list[Claim]:
    x, residual = (_data(setting, setting.rows[-1], size, seed=seed) for seed in (21, 22))
    weight = _data(setting, size, seed=23)
    claims = row_claims(Rows(lambda x, r: norm(x, r, weight, setting.backend), (x, residual)), setting.rows)
    if setting.backend == "triton" and setting.schedules:
        claims.append(_norm_schedules(x[:101], residual[:101], weight, centered))
    few = setting.rows[-1] // 2
    claims.append(backward_claim(partial(norm, backend=setting.backend), (x[:few], residual[:few], weight)))
    return claims


def _norm_schedules(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, centered: bool) -> Claim:
    from rlalign_kernels.elementwise.triton_norm_calls import forward, norm_settings

    settings = norm_settings("norm", _EPS, centered=centered)
    bias = weight if centered else None

    def run(tile: RowTile | None) -> tuple[torch.Tensor, ...]:
        return tuple(t for t in forward(x, residual, weight, bias, settings, save=True, tile=tile) if t is not None)

    sizes = ((1, 1), (1, 2), (1, 8), (4, 4)) if x.shape[1] > 128 else ((1, 1), (2, 8), (8, 2), (64, 4))
    tiles = [RowTile(*size) for size in sizes]
    return schedules_claim((partial(run, None), [(tile, partial(run, tile)) for tile in tiles]))


def _rotary_claims(shape: AttentionShape, setting: Setting) -> list[Claim]:
    num_rows, dim, device = setting.rows[-1], shape.head_dim // 2 * 2, setting.device
    counts = ((24, shape.query_heads), (29, shape.key_heads))
    query, key = (_data(setting, num_rows, count, shape.head_dim, seed=seed) for seed, count in counts)
    positions = torch.randint(0, _POSITIONS, (num_rows,), generator=torch.Generator().manual_seed(25)).to(device)
    frequencies = _THETA ** (-torch.arange(0, dim, 2, device=device) / dim)

    def turn(query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cos, sin = rotary_cos_sin(positions, frequencies, dtype=setting.dtype, backend=setting.backend)
        return cos, sin, *apply_rotary(query, key, cos, sin, backend=setting.backend)

    claims = row_claims(Rows(turn, (query, key, positions)), setting.rows)
    cos, sin, *_ = turn(query, key, positions)
    if setting.backend == "triton" and setting.schedules:
        claims.append(_rotary_schedules(query, key, cos, sin))
    claims.append(backward_claim(lambda *x: apply_rotary(*x, cos, sin, backend=setting.backend), (query, key)))
    return claims


def _rotary_schedules(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Claim:
    from rlalign_kernels.elementwise.triton_rotary import rotate

    run = partial(rotate, query, key, cos, sin, back=False)
    return schedules_claim((run, [(f"{pairs} pairs", partial(run, pairs=pairs)) for pairs in (64, 256, 4096)]))


def _activation_claims(
    name: str, run: Callable[..., torch.Tensor], gated: bool, size: int, setting: Setting
) -> list[Claim]:
    num_inputs = 2 if gated else 1
    inputs = tuple(_data(setting, setting.rows[-1], size, seed=26 + i) for i in range(num_inputs))
    claims = row_claims(Rows(lambda *x: (run(*x, backend=setting.backend),), inputs), setting.rows)
    claims.append(Claim("elements", lambda: _elsewhere(partial(run, backend=setting.backend), inputs)))
    if setting.backend == "triton" and setting.schedules:
        claims.append(_activation_schedules("silu" if name in ("silu", "swiglu") else "gelu none", *inputs))
    claims.append(backward_claim(partial(run, backend=setting.backend), inputs))
    return claims


@torch.no_grad()
def _elsewhere(run: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> Iterator[str | None]:
    """An element at another place of another tensor: vector units leave a tail to something else."""
    flat = tuple(x.flatten() for x in inputs)
    whole = run(*flat)
    for start, stop in ((0, 1), (1, 8), (3, 40), (5, 1003), (1, len(whole) - 1)):
        stop = min(stop, len(whole))
        found = run(*(x[start:stop] for x in flat))
        yield difference([found], [whole[start:stop]], f"elements {start} to {stop - 1} alone and among others")


def _activation_schedules(kind: str, x: torch.Tensor, up: torch.Tensor | None = None) -> Claim:
    from rlalign_kernels.elementwise.triton_activation_calls import KINDS, forward

    def run(**schedule: int) -> tuple[torch.Tensor]:
        return (forward(x, up, KINDS[kind], **schedule),)

    others: list[tuple[object, Run]] = [
        (f"{block} elements, {warps} warps", partial(run, block=block, num_warps=warps))
        for block, warps in ((256, 1), (1024, 2), (8192, 8))
    ]
    return schedules_claim((run, others))
