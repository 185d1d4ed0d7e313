"""Schedules that scripts/tune.py measured on a GPU: read from its table, where one is named, and nowhere else.

A table is named by the environment variable ``RLALIGN_TUNED`` or by ``use(path)``, before the first launch. It can
change speed only: a schedule of another plan, or one that tune.py would not try, is refused when the table is read, and
so is a table for another architecture, plan or Triton. Layers, row counts and layouts that it lacks run as without it.
``Conformance.report`` names the table in use, hence a run's ``summary.json`` does; a fingerprint does not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from rlalign_kernels.conformance import CONFORMANCE
from rlalign_kernels.gemm import space as gemm_space
from rlalign_kernels.gemm.chain_plan import FLOAT32_BLOCK
from rlalign_kernels.gemm.schedules import HopperTile, Layer, Tile, fitted, takes_hopper_tiles
from rlalign_kernels.gpu_plan import GpuPlan
from rlalign_kernels.plan import version
from rlalign_kernels.vocab import space as head_space
from rlalign_kernels.vocab.plan import HEAD_PLAN
from rlalign_kernels.vocab.schedules import HeadTile

VARIABLE = "RLALIGN_TUNED"
FORMAT = 1
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
_TILES: dict[str, type[Tile] | type[HopperTile]] = {"Tile": Tile, "HopperTile": HopperTile}
T = TypeVar("T")


@dataclass(frozen=True)
class LinearEntry:
    """For first_row <= rows <= last_row of a layer of one leaf."""

    width: int
    depth: int
    dtype: torch.dtype
    boxes: bool
    first_row: int
    last_row: int
    tile: Tile | HopperTile

    def __post_init__(self) -> None:
        if self.dtype == torch.float32 and self.tile.block_k != FLOAT32_BLOCK:
            raise ValueError(f"{self.tile} is another plan: float32 sums are of blocks of {FLOAT32_BLOCK} k")

    def serves(self, layer: Layer, num_rows: int) -> bool:
        return self.is_of(layer) and self.first_row <= num_rows <= self.last_row

    def is_of(self, layer: Layer) -> bool:
        mine = (self.width, self.depth, self.dtype, self.boxes, 1)
        return mine == (layer.width, layer.depth, layer.dtype, layer.boxes, layer.leaves)


@dataclass(frozen=True)
class HeadEntry:
    """For first_row <= rows <= last_row of log-probs, or of draws; nothing masked."""

    vocab: int
    depth: int
    dtype: torch.dtype
    sample: bool
    first_row: int
    last_row: int
    tile: HeadTile

    def __post_init__(self) -> None:
        if self.dtype == torch.float32 and self.tile.block_k != HEAD_PLAN.float32_block:
            raise ValueError(f"{self.tile} is another plan: float32 sums are of {HEAD_PLAN.float32_block} channels")


@dataclass(frozen=True)
class Table:
    """A table's content; ``path`` and ``sha256`` of its file."""

    path: Path
    sha256: str
    linear: tuple[LinearEntry, ...]
    head: tuple[HeadEntry, ...]


def plan_fields(architecture: tuple[int, int]) -> dict[str, str]:
    """What a table is for, and what it was proven with."""
    plan = asdict(GpuPlan())
    named = {
        f"plan.{name}": ",".join(f"{k}={v}" for k, v in sorted(plan[name].items())) for name in ("linear", "vocab")
    }
    return {
        "architecture": f"sm_{architecture[0]}{architecture[1]}",
        "triton": version("triton"),
        **named,
    }


def to_json(entry: LinearEntry | HeadEntry) -> dict[str, Any]:
    """As tables hold it."""
    values = {field.name: getattr(entry, field.name) for field in fields(entry)}
    values["dtype"] = str(entry.dtype).removeprefix("torch.")
    return values | {"kind": type(entry.tile).__name__, "tile": asdict(entry.tile)}


def read(path: Path | str, architecture: tuple[int, int]) -> Table:
    """The table at ``path``, for GPUs of ``architecture``. Raises ValueError naming what can't be used."""
    path = Path(path)
    try:
        data = path.read_bytes()
        content = json.loads(data)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no table of schedules can be read ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: not a table of schedules of format {FORMAT}; write one with scripts/tune.py")
    ours = plan_fields(architecture)
    theirs = content.get("for", {})
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise ValueError(f"{path}: made for {name}={theirs.get(name)}, here it is {value}; run scripts/tune.py")
    return Table(
        path,
        hashlib.sha256(data).hexdigest(),
        tuple(_entries(path, content, "linear", lambda raw: _linear(raw, architecture))),
        tuple(_entries(path, content, "head", lambda raw: _head(raw, architecture))),
    )


def _entries(path: Path, content: Mapping[str, Any], name: str, make: Callable[[dict[str, Any]], T]) -> Iterator[T]:
    for index, raw in enumerate(content.get(name, [])):
        try:
            yield make(dict(raw))
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"{path}: {name}[{index}] is refused: {error}") from None


def _linear(raw: dict[str, Any], architecture: tuple[int, int]) -> LinearEntry:
    kind, values = raw.pop("kind"), raw.pop("tile")
    if kind not in _TILES:
        raise ValueError(f"kind={kind!r} is unknown; supported: {', '.join(_TILES)}")
    entry = LinearEntry(**_typed(raw), tile=_TILES[kind](**values))
    layer = Layer(entry.width, entry.depth, entry.dtype, 1, architecture, entry.boxes)
    _check_known(entry.tile, gemm_space.known_tiles(layer))
    return entry


def _head(raw: dict[str, Any], architecture: tuple[int, int]) -> HeadEntry:
    values = raw.pop("tile")
    if (kind := raw.pop("kind")) != "HeadTile":
        raise ValueError(f"kind={kind!r} is unknown; supported: HeadTile")
    entry = HeadEntry(**_typed(raw), tile=HeadTile(**values))
    _check_known(entry.tile, head_space.known_tiles(entry.dtype, architecture, entry.sample))
    return entry


def _typed(raw: dict[str, Any]) -> dict[str, Any]:
    if raw["dtype"] not in _DTYPES:
        raise ValueError(f"dtype={raw['dtype']!r} is not supported; use one of {', '.join(_DTYPES)}")
    return {**raw, "dtype": _DTYPES[raw["dtype"]]}


def _check_known(tile: object, known: object) -> None:
    if tile not in known:
        raise ValueError(f"{tile} is no schedule that scripts/tune.py tries here, so nobody has proven its bits")


class _InUse:
    """The process's table: None before anybody asked, False where there is none."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.table: Table | bool | None = None


_IN_USE = _InUse()


def use(path: Path | str | None) -> None:
    """Take schedules from the table at ``path``, before ``RLALIGN_TUNED``'s; None: from that variable's again.

    Raises RuntimeError once a schedule was asked for: launches are remembered.
    """
    if _IN_USE.table is not None:
        raise RuntimeError("tuned.use: schedules have been chosen in this process already; call it before the first")
    _IN_USE.path = None if path is None else Path(path)


def in_use(architecture: tuple[int, int]) -> Table | None:
    """The process's table, read when it is first asked for. Raises ValueError for one that can't be used."""
    if _IN_USE.table is None:
        path = _IN_USE.path or os.environ.get(VARIABLE) or None
        _IN_USE.table = False if path is None else read(path, architecture)
        if isinstance(_IN_USE.table, Table):
            found = _IN_USE.table
            sizes = {"linear": len(found.linear), "head": len(found.head)}
            CONFORMANCE.note("tuned", {"path": str(found.path.absolute()), "sha256": found.sha256, **sizes})
    return _IN_USE.table or None


def linear_tile(layer: Layer, num_rows: int, out_dtype: torch.dtype) -> Tile | HopperTile | None:
    """The table's, if it has one that can run."""
    table = in_use(layer.architecture)
    found = next((e.tile for e in table.linear if e.serves(layer, num_rows)), None) if table else None
    return _runnable(found, layer, out_dtype)


def linear_tiles(layer: Layer, out_dtype: torch.dtype) -> list[Tile | HopperTile]:
    """All of the table's for this layer that can run."""
    table = in_use(layer.architecture)
    tiles = [_runnable(e.tile, layer, out_dtype) for e in table.linear if e.is_of(layer)] if table else []
    return [tile for tile in tiles if tile is not None]


def _runnable(tile: Tile | HopperTile | None, layer: Layer, out_dtype: torch.dtype) -> Tile | HopperTile | None:
    if not isinstance(tile, HopperTile):
        return tile
    return fitted(tile, out_dtype) if takes_hopper_tiles(layer, out_dtype) else None


@lru_cache(1024)
def head_tile(
    num_rows: int, vocab: int, depth: int, dtype: torch.dtype, architecture: tuple[int, int], sample: bool
) -> HeadTile | None:
    """The table's, if it has one."""
    found = _head_entries(vocab, depth, dtype, architecture, sample)
    return next((e.tile for e in found if e.first_row <= num_rows <= e.last_row), None)


def head_tiles(
    vocab: int, depth: int, dtype: torch.dtype, architecture: tuple[int, int], sample: bool
) -> list[HeadTile]:
    """All of the table's for this layer."""
    return [entry.tile for entry in _head_entries(vocab, depth, dtype, architecture, sample)]


def _head_entries(
    vocab: int, depth: int, dtype: torch.dtype, architecture: tuple[int, int], sample: bool
) -> list[HeadEntry]:
    table, wanted = in_use(architecture), (vocab, depth, dtype, sample)
    return [e for e in table.head if (e.vocab, e.depth, e.dtype, e.sample) == wanted] if table else []
