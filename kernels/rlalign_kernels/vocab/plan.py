"""The plan of the output layer on a GPU: where the vocabulary is cut, and in which order its partial sums meet.

Logits are summed in float32 over ascending hidden channels, as ``linear`` does it: one chain on tensor cores; for
float32 weights, compensated sums of blocks of ``float32_block`` channels. Ids are cut at multiples of ``block``; a
block's sums fold its ids in halves. Blocks are cut into groups at multiples of ``group``; a group's sums fold its
blocks in halves, and groups are merged ascending. No size depends on the batch, nor on the model.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadPlan:
    """Sizes along the vocabulary; everything else about a tile is schedule."""

    block: int = 128
    group: int = 256
    float32_block: int = 16


HEAD_PLAN = HeadPlan()
