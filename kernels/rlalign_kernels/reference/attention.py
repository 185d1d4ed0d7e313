"""The invariant attention forward, packed and paged alike.

Plan: key tiles of 64 at absolute positions, ascending; per tile, in float32: s = q @ k.T (one product over D <= 256),
s * scale, soft cap, masked scores -inf; m' = max(m, max s) from m0 = -1e30; p = exp(s - m'); alpha = exp(m - m'),
both exactly 0 from -80 down (``softmax_exp``); [acc, l] = [acc, l] alpha + p @ [v, 1] (one product over the 64 keys).
Then acc / l and lse = m + log l.
A tile that a row may not see is an exact no-op (p = 0, alpha = 1), so skipping it is schedule, and so are batching,
fewer rows than a base tile and fewer keys than 64 where the further ones are masked: each where the probe proves it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from rlalign_kernels.reference.attention_layout import KV_TILE, Chunk, Layout, Step
from rlalign_kernels.reference.elementwise import elementwise, scalar, softmax_exp
from rlalign_kernels.reference.gemm import BatchSchedule, batch_bases, batch_schedule, product_batched

FLOOR = -1e30
MAX_HEAD_DIM = 256
MAX_SCORES = 2**18
MAX_ITEMS = 128
# Rows per item in units of the base tile: chunks of a prompt use one, prefill and training four.
ROW_UNITS = (1, 4)
# A decoding item has a group's heads as rows; where the probe refuses so few, the next of these.
FEW_ROWS = (4, 8)
KEY_WIDTHS = (16, 32, 48, KV_TILE)
# the columns of [v, 1] are filled up to a multiple of so many where they must be
_COLUMNS = 16


@dataclass(frozen=True)
class Products:
    """q @ k.T and p @ [v, 1, 0 …] of one head shape, on one base tile of rows. columns: of the second."""

    base: int
    head_dim: int
    value_dim: int
    columns: int

    def schedules(self, rows: int, keys: int) -> tuple[BatchSchedule, BatchSchedule]:
        """Proven batches of both products for items of ``rows`` rows, over the first ``keys`` of a tile."""
        scores = batch_schedule(self.base, rows, (self.head_dim, keys), (self.head_dim, KV_TILE), True)
        return scores, batch_schedule(self.base, rows, (keys, self.columns), (KV_TILE, self.columns), False)

    def _proven(self, rows: int, keys: int) -> bool:
        return all(schedule.proven for schedule in self.schedules(rows, keys))

    def row_counts(self, group: int) -> tuple[int, ...]:
        """Rows that items may have, ascending: of one decoded token if so few are proven, then whole base tiles."""
        few = (rows for rows in (group, *FEW_ROWS) if group <= rows < self.base and self._proven(rows, KV_TILE))
        return (*[rows for rows in few][:1], *(units * self.base for units in ROW_UNITS))

    def key_widths(self, rows: int) -> tuple[int, ...]:
        """Key counts that items of ``rows`` rows may have, ascending; the last one is the whole tile."""
        return (*(keys for keys in KEY_WIDTHS[:-1] if self._proven(rows, keys)), KV_TILE)


def products(head_dim: int, value_dim: int) -> Products:
    """Both products on the first base tile that is position free. Raises RuntimeError if there is none.

    Where the second one is not with as many columns as it needs (nine, on an AMD EPYC), it has some of zeros too.
    """
    bases = batch_bases(head_dim, KV_TILE, True)
    needed = value_dim + 1
    for columns in (needed, -(-needed // _COLUMNS) * _COLUMNS):
        values = batch_bases(KV_TILE, columns, False)
        for base in bases:
            if base in values:
                return Products(base, head_dim, value_dim, columns)
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
    run = _Run(
        q.reshape(-1, head_dim),
        k.reshape(-1, head_dim),
        v.reshape(-1, value_dim),
        k.shape[1],
        products(head_dim, value_dim),
        scale,
        softcap,
        key_mask,
    )
    states = [run.chunk(chunk) for chunk in layout.chunks]
    empty = torch.empty(0, device=q.device)
    out = _in_order([state.output() for state in states] or [empty], layout.order)
    lse = _in_order([state.lse() for state in states] or [empty], layout.order) if return_lse else None
    return out.view(num_tokens, num_heads, value_dim), None if lse is None else lse.view(num_tokens, num_heads)


def _in_order(parts: list[torch.Tensor], order: torch.Tensor | None) -> torch.Tensor:
    """Rows of all chunks, back in the order of q."""
    rows = parts[0] if len(parts) == 1 else torch.cat(parts)
    return rows if order is None else rows.index_select(0, order)


class _State:
    """What n items have seen so far: highest score [n, used, 1]; acc [n, used, C], weighted sum of the Dv values, then
    sum of the weights; what there is behind it, of ``Products.columns``, is zeros."""

    def __init__(self, chunk: Chunk, products: Products, device: torch.device) -> None:
        self.count = chunk.count
        self.shape = (chunk.count, chunk.used)
        self.value_dim, self.columns, self.device = products.value_dim, products.columns, device
        self.highest: torch.Tensor | None = None
        self.acc: torch.Tensor | None = None

    def raised(self, tile_highest: torch.Tensor) -> torch.Tensor:
        """The running maximum with another tile's, of the first a items: [a, used, 1]."""
        if self.highest is None:
            return tile_highest.clamp_min_(FLOOR)
        return torch.maximum(self.highest[: tile_highest.shape[0]], tile_highest)

    def add(self, highest: torch.Tensor, weighted: torch.Tensor) -> None:
        """Merge a tile of the first a items: its ``raised`` maximum, and p @ [v, 1]."""
        active = highest.shape[0]
        if self.highest is None:
            # Nothing to rescale yet: 0 * alpha + pv is pv.
            self.highest, self.acc = (highest, weighted) if active == self.count else self._filled(highest, weighted)
            return
        before, acc = self.highest[:active], self.acc[:active]
        acc.mul_(softmax_exp(before - highest)).add_(weighted)
        before.copy_(highest)

    def _filled(self, highest: torch.Tensor, weighted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """With the items that have no key at all."""
        active = highest.shape[0]
        all_highest = torch.full((*self.shape, 1), FLOOR, device=self.device)
        acc = torch.zeros(*self.shape, self.columns, device=self.device)
        all_highest[:active], acc[:active] = highest, weighted
        return all_highest, acc

    def finish(self) -> _State:
        """After the last tile."""
        if self.highest is None:
            nothing = torch.empty(0, device=self.device)
            self.highest, self.acc = self._filled(
                nothing.view(0, self.shape[1], 1), nothing.view(0, self.shape[1], self.columns)
            )
        return self

    def output(self) -> torch.Tensor:
        """[n * used, Dv]; a row that saw no key is 0."""
        total = self._total()
        # + 0.0: a skipped tile leaves -0.0 as it is, a masked one adds +0.0 to it; both end as +0.0.
        values = (self.acc[..., : self.value_dim] / total).add_(scalar(0.0, total.device)).masked_fill_(total == 0, 0.0)
        return values.reshape(-1, self.value_dim)

    def _total(self) -> torch.Tensor:
        return self.acc[..., self.value_dim : self.value_dim + 1]

    def lse(self) -> torch.Tensor:
        """[n * used]; a row that saw no key has -inf."""
        total = self._total()
        return (self.highest + elementwise("log", total)).masked_fill_(total == 0, -torch.inf).reshape(-1)


@dataclass
class _Run:
    """One call: q_rows [T * Hq, D], k_rows and v_rows [slots * Hkv, .]."""

    q_rows: torch.Tensor
    k_rows: torch.Tensor
    v_rows: torch.Tensor
    num_kv_heads: int
    products: Products
    scale: float
    softcap: float | None
    key_mask: torch.Tensor | None

    def chunk(self, chunk: Chunk) -> _State:
        """Online softmax over the chunk's tiles; the items still active at a step are a prefix."""
        state = self._attend(chunk, shielded=False)
        # A value that is not finite reaches rows that may not see its key, for 0 * NaN is NaN; then it shows here.
        # The sum alone may overflow without harm.
        if math.isfinite(state.acc.sum().item()):
            return state
        return self._attend(chunk, shielded=True)

    def _attend(self, chunk: Chunk, *, shielded: bool) -> _State:
        state = _State(chunk, self.products, self.q_rows.device)
        q = self.q_rows if chunk.q_rows is None else self.q_rows.index_select(0, chunk.q_rows)
        q = q.float().view(chunk.count, chunk.rows, -1)
        for number in range(chunk.num_steps):
            step = chunk.step(number)
            k, values, hidden = self._gather(step)
            scores, weighted = self.products.schedules(chunk.rows, step.width)
            s = product_batched(q if step.active == chunk.count else q[: step.active], k.transpose(1, 2), scores)
            s = self._transform(s, chunk.used, step, hidden)
            shield = _Shield.against(values, s) if shielded else None
            highest = state.raised(s.amax(-1, keepdim=True))
            p = _pad_items(softmax_exp(s.sub_(highest)), chunk.rows)
            pv = product_batched(p, values, weighted)
            pv = pv if chunk.used == chunk.rows else pv[:, : chunk.used]
            state.add(highest, pv if shield is None else shield.restore(pv))
        return state.finish()

    def _gather(self, step: Step) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """k [n, w, D], [v, 1, 0 …] [n, w, C], float32, and bool [n, w] of keys that ``key_mask`` hides."""
        shape = (step.active, step.width, -1)
        k = self.k_rows.index_select(0, step.index).view(shape).float()
        v = self.v_rows.index_select(0, step.index).view(shape).float()
        hidden = None
        if self.key_mask is not None:
            hidden = ~self.key_mask[step.index // self.num_kv_heads].view(step.active, step.width)
            # 0 * NaN is not 0.
            k, v = (x.masked_fill_(hidden.unsqueeze(2), 0.0) for x in (k, v))
        values = torch.constant_pad_nd(v, (0, 1), 1.0)
        more = self.products.columns - values.shape[2]
        return k, torch.constant_pad_nd(values, (0, more)) if more else values, hidden

    def _transform(self, s: torch.Tensor, used: int, step: Step, hidden: torch.Tensor | None) -> torch.Tensor:
        """Scores [n, used, w]: scaled, capped, and -inf where a row may not see the key."""
        scale = scalar(self.scale, s.device)
        s = s.mul_(scale) if used == s.shape[1] else s[:, :used] * scale
        if self.softcap is not None:
            s = elementwise("tanh", s.div_(self.softcap), inplace=True).mul_(self.softcap)
        if step.outside is not None:
            (s[step.first_masked :] if step.first_masked else s).masked_fill_(step.outside, -torch.inf)
        if hidden is not None:
            s.masked_fill_(hidden.unsqueeze(1), -torch.inf)
        return s


def _pad_items(p: torch.Tensor, rows: int) -> torch.Tensor:
    """p [n, used, w] followed by zero rows: [n, rows, w]."""
    if p.shape[1] == rows:
        return p
    padded = p.new_zeros(p.shape[0], rows, p.shape[2])
    padded[:, : p.shape[1]] = p
    return padded


@dataclass(frozen=True)
class _Shield:
    """Keeps a value that is not finite from rows that may not see its key.

    hit bool [n, used, C]: sums that did see one.
    """

    hit: torch.Tensor

    @classmethod
    def against(cls, values: torch.Tensor, masked_scores: torch.Tensor) -> _Shield:
        """Zeroes what is not finite in values [n, w, C]."""
        broken = ~torch.isfinite(values)
        values.masked_fill_(broken, 0.0)
        seen = (masked_scores != -torch.inf).float()
        return cls(torch.bmm(seen, broken.float()) > 0)

    def restore(self, weighted: torch.Tensor) -> torch.Tensor:
        return weighted.masked_fill_(self.hit, torch.nan)
