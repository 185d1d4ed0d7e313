"""The plan of the triton backend, as the fingerprint names it: the constants that its reductions follow from.

Sizes that a model's shapes or a GPU's architecture choose are named by the numbers that the choice is made with; the
rule itself is source, which the fingerprint hashes.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlalign_kernels.attention import tile_plan
from rlalign_kernels.elementwise import row_plan
from rlalign_kernels.gemm import chain_plan
from rlalign_kernels.vocab.plan import HEAD_PLAN, HeadPlan


@dataclass(frozen=True)
class ChainConstants:
    """``linear``: chains over ascending K, see gemm/chain_plan.py."""

    leaves: int = chain_plan.ChainPlan.leaves
    float32_block: int = chain_plan.FLOAT32_BLOCK


@dataclass(frozen=True)
class RowConstants:
    """Norms: column c belongs to lane c mod a power of two, at most this; see elementwise/row_plan.py."""

    most_lanes: int = row_plan.MOST_LANES


@dataclass(frozen=True)
class TileConstants:
    """``attention``: key tiles as large as these allow, splits, running sums; see attention/tile_plan.py."""

    tile_bytes: int = tile_plan.TILE_BYTES
    small_tile_bytes: int = tile_plan.SMALL_TILE_BYTES
    largest_tile: int = tile_plan.LARGEST_TILE
    largest_float32_tile: int = tile_plan.LARGEST_FLOAT32_TILE
    split: int = tile_plan.TilePlan.split
    sum_width: int = tile_plan.TilePlan.sum_width


@dataclass(frozen=True)
class GpuPlan:
    """Everything a reduction's bits follow from, on a GPU."""

    linear: ChainConstants = ChainConstants()
    norm: RowConstants = RowConstants()
    attention: TileConstants = TileConstants()
    vocab: HeadPlan = HEAD_PLAN
