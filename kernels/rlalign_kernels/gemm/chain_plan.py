"""The plan of ``linear`` on a GPU: in which order the products of a row and a weight row are added.

A chain takes k in ascending order. In bfloat16 and float16 it is one float32 accumulator of the tensor cores, from 0.
In float32, where that would lose more digits than torch's sums in parallel do, k is cut at multiples of 16; each block
is fused multiply-adds from 0, and the blocks' sums are added ascending while what each addition rounds away (two-sum)
is kept in a second float32, added last. A chain ends by adding +0, so that no sum is -0.
``leaves`` = 1: one chain over all of K. ``leaves`` = 2, 4 or 8: K is cut into so many equal parts, each a chain of its
own, whose results meet in a binary tree, for instance (l0 + l1) + (l2 + l3), in float32: 2, 4 or 8 GPUs can later share
the sum without changing it. The bias is one more float32 addition; rounding to the output's dtype comes last and once.

Nothing else fixes bits: tiles, warps, stages, which operand comes first and who computes what are schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

LEAVES = (1, 2, 4, 8)
# k per block of a float32 chain
FLOAT32_BLOCK = 16


@dataclass(frozen=True)
class ChainPlan:
    """``leaves`` chains over equal parts of K."""

    leaves: int = 1

    def leaf_length(self, depth: int) -> int:
        """k per chain, for K = depth."""
        return depth // self.leaves


def chain_plan(operator: str, leaves: int, depth: int) -> ChainPlan:
    """Raises ValueError for a number of leaves that is no plan, or into which K = depth can't be cut evenly.

    Example:
        >>> chain_plan("linear", 4, 6144).leaf_length(6144)
        1536
    """
    if leaves not in LEAVES:
        raise ValueError(f"{operator}: leaves={leaves} is not supported; use one of {LEAVES}")
    if depth % leaves:
        raise ValueError(f"{operator}: leaves={leaves} does not divide K={depth}; all leaves are equally long")
    return ChainPlan(leaves)
