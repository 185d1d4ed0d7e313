"""The invariant attention forward, packed and paged alike.

Plan: key tiles of 64 at absolute positions, ascending; per tile, in float32: s = q @ k.T (one product over D <= 256),
s * scale, soft cap, masked scores -inf; m' = max(m, max s) from m0 = -1e30; p = exp(s - m'); alpha = exp(m - m'),
both exactly 0 from -80 down (``softmax_exp``); [acc, l] = [acc, l] alpha + p @ [v, 1] (one product over the 64 keys).
Then acc / l and lse = m + log l.
A tile that a row may not see is an exact no-op (p = 0, alpha = 1), so skipping it is schedule, and so is batching.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rlalign_kernels.reference.attention_layout import KV_TILE, Chunk, Layout
from rlalign_kernels.reference.elementwise import elementwise, softmax_exp
from rlalign_kernels.reference.gemm import BatchSchedule, batch_schedules, product_batched

FLOOR = -1e30
MAX_HEAD_DIM = 256
MAX_SCORES = 2**18
MAX_ITEMS = 128
# Rows per item in units of the base tile: decode and short chunks use one, prefill and training four.
ROW_UNITS = (1, 4)


def schedules(head_dim: int, value_dim: int) -> tuple[BatchSchedule, BatchSchedule]:
    """Proven schedules of q @ k.T and p @ [v, 1], on one base tile. Raises RuntimeError if no tile is position free."""
    scores = batch_schedules(ROW_UNITS, head_dim, KV_TILE, True)
    values = batch_schedules(ROW_UNITS, KV_TILE, value_dim + 1, False)
    for base, schedule in scores.items():
        if base in values:
            return schedule, values[base]
    raise RuntimeError(
        f"attention: on this machine no row tile is free of position in float32 products with head_dim={head_dim}, "
        f"value_dim={value_dim}; no invariant schedule is known for it"
    )


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Layout,
    *,
    scale: float,
    softcap: float | None,
    key_mask: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """q [T, Hq, D], k [slots, Hkv, D], v [slots, Hkv, Dv] -> out float32 [T, Hq, Dv], lse float32 [T, Hq] or None."""
    num_tokens, num_heads, head_dim = q.shape
    value_dim = v.shape[2]
    spare = num_tokens * num_heads
    out = torch.zeros(spare + 1, value_dim, device=q.device)
    lse = torch.full((spare + 1,), -torch.inf, device=q.device) if return_lse else None
    tiles = _Tiles(k, v, layout.slot_tiles, key_mask)
    q_rows = q.reshape(-1, head_dim)
    products = schedules(head_dim, value_dim)
    for chunk in layout.chunks:
        if chunk.steps:
            _run_chunk(q_rows, tiles, chunk, products, scale, softcap, out, lse)
    out = out[:spare].view(num_tokens, num_heads, value_dim)
    return out, None if lse is None else lse[:spare].view(num_tokens, num_heads)


class _Tiles:
    """Gathers key and value tiles; keys that ``key_mask`` hides become zero, for 0 * NaN is not 0."""

    def __init__(
        self, k: torch.Tensor, v: torch.Tensor, slot_tiles: torch.Tensor, key_mask: torch.Tensor | None
    ) -> None:
        self.k, self.v = k.reshape(-1, k.shape[2]), v.reshape(-1, v.shape[2])
        self.slot_tiles, self.key_mask, self.num_heads = slot_tiles, key_mask, k.shape[1]

    def gather(
        self, chunk: Chunk, step: int, active: int, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """k [n, 64, D] float32, and bool [n, 64] of keys masked by ``key_mask``; v goes into values [n, 64, Dv]."""
        slots = self.slot_tiles.index_select(0, chunk.tiles[:active] + step)
        index = (slots + chunk.head[:active]).view(-1)
        k = self.k.index_select(0, index).view(active, KV_TILE, -1).float()
        values.copy_(self.v.index_select(0, index).view(active, KV_TILE, -1))
        if self.key_mask is None:
            return k, None
        hidden = ~self.key_mask[slots // self.num_heads]
        values.masked_fill_(hidden.unsqueeze(2), 0.0)
        return k.masked_fill_(hidden.unsqueeze(2), 0.0), hidden


def _run_chunk(
    q_rows: torch.Tensor,
    tiles: _Tiles,
    chunk: Chunk,
    products: tuple[BatchSchedule, BatchSchedule],
    scale: float,
    softcap: float | None,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Online softmax over the tiles of n items; the items still active at a step are a prefix."""
    count, rows, used = chunk.tiles.shape[0], chunk.rows, chunk.used
    q = q_rows.index_select(0, chunk.q_rows).float().view(count, rows, -1)
    value_dim = tiles.v.shape[1]
    highest = q.new_full((count, used, 1), FLOOR)
    # The last column of the values is 1: that of their weighted sum is the sum of the weights.
    acc = q.new_zeros(count, used, value_dim + 1)
    scores = q.new_empty(count, rows, KV_TILE)
    values = q.new_ones(count, KV_TILE, value_dim + 1)
    weighted = q.new_empty(count, rows, value_dim + 1)
    # Padding rows of p meet only themselves; they are zero once and stay so.
    padded = q.new_zeros(count, rows, KV_TILE) if used < rows else None
    for step, (active, first_masked) in enumerate(chunk.steps):
        v = values[:active, :, :value_dim]
        k, hidden = tiles.gather(chunk, step, active, v)
        s = product_batched(q[:active], k.transpose(1, 2), scores[:active], products[0])
        s = s.mul_(scale) if used == rows else s[:, :used] * scale
        if softcap is not None:
            s = elementwise("tanh", s.div_(softcap), inplace=True).mul_(softcap)
        _mask(s, chunk, step, first_masked, active, hidden)
        shield = None if first_masked == active else _Shield.against(v, s)
        if shield is not None:
            v.copy_(shield.clean)
        m, a = highest[:active], acc[:active]
        new_m = torch.maximum(m, s.amax(-1, keepdim=True))
        p = softmax_exp(s.sub_(new_m))
        if padded is not None:
            padded[:active, :used] = p
            p = padded[:active]
        pv = product_batched(p, values[:active], weighted[:active], products[1])[:, :used]
        if shield is not None:
            pv[:, :, :value_dim].masked_fill_(shield.hit, torch.nan)
        if step == 0:
            # Nothing to rescale yet: 0 * alpha + pv is pv.
            a.copy_(pv)
        else:
            a.mul_(softmax_exp(m - new_m)).add_(pv)
        m.copy_(new_m)
    _store(highest, acc, chunk, out, lse)


@dataclass(frozen=True)
class _Shield:
    """Keeps a value that is not finite from rows that may not see its key: in a product, 0 * NaN would be NaN.

    clean [n, 64, Dv]: the values, 0 where they were not finite. hit bool [n, used, Dv]: sums that did see one.
    """

    clean: torch.Tensor
    hit: torch.Tensor

    @classmethod
    def against(cls, v: torch.Tensor, masked_scores: torch.Tensor) -> _Shield | None:
        """None where every value is finite, as nearly always; the sum alone may overflow without harm."""
        if math.isfinite(v.sum().item()):
            return None
        broken = ~torch.isfinite(v)
        seen = (masked_scores != -torch.inf).float()
        return cls(v.masked_fill(broken, 0.0), torch.bmm(seen, broken.float()) > 0)


def _mask(
    s: torch.Tensor, chunk: Chunk, step: int, first_masked: int, active: int, hidden: torch.Tensor | None
) -> None:
    """Scores of keys that a row may not see become -inf, in place."""
    if first_masked < active:
        part = slice(first_masked, active)
        position = torch.arange(step * KV_TILE, (step + 1) * KV_TILE, dtype=torch.int32, device=s.device)
        outside = position >= chunk.high[part]
        if chunk.low is not None:
            outside |= position < chunk.low[part]
        s[part].masked_fill_(outside, -torch.inf)
    if hidden is not None:
        s.masked_fill_(hidden.unsqueeze(1), -torch.inf)


def _store(highest: torch.Tensor, acc: torch.Tensor, chunk: Chunk, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    """Divide, and scatter; a row that saw no key is 0 with lse -inf."""
    acc, total = acc[..., :-1], acc[..., -1:]
    empty = total == 0
    # + 0.0: a skipped tile leaves -0.0 as it is, a masked one adds +0.0 to it; both end as +0.0.
    values = (acc / total).add_(0.0).masked_fill_(empty, 0.0)
    out.index_copy_(0, chunk.out_rows, values.reshape(-1, values.shape[2]))
    if lse is not None:
        logs = (highest + elementwise("log", total)).masked_fill_(empty, -torch.inf)
        lse.index_copy_(0, chunk.out_rows, logs.reshape(-1))
