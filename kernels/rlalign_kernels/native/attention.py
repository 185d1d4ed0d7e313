"""Attention by ``scaled_dot_product_attention`` over padded batches, as an ordinary engine without our kernels does."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from rlalign_kernels.reference.attention_backward import Settings

# A padded batch larger than this many times its tokens runs one sequence at a time instead.
_MAX_PADDING = 4


@dataclass(frozen=True)
class _Padded:
    """Some sequences padded to the longest: rows int64 [b, L], valid bool [b, L], of queries and keys."""

    q_index: torch.Tensor
    q_valid: torch.Tensor
    k_index: torch.Tensor
    k_valid: torch.Tensor

    @cached_property
    def q_rows(self) -> torch.Tensor:
        return self.q_index[self.q_valid]


class Batch:
    """Padded indices of a batch: all sequences together, or one by one where padding would waste too much.

    cu_q: [B + 1]; key_rows: each sequence's key slots in order.
    """

    def __init__(self, cu_q: np.ndarray, key_rows: list[np.ndarray], device: torch.device) -> None:
        q_len = np.diff(cu_q)
        kv_len = np.array([len(rows) for rows in key_rows], dtype=np.int64)
        members = np.flatnonzero((q_len > 0) & (kv_len > 0))
        self.parts: list[_Padded] = []
        if not len(members):
            return
        padded = len(members) * q_len[members].max() * kv_len[members].max()
        together = padded <= _MAX_PADDING * int((q_len * kv_len)[members].sum())
        for group in [members] if together else [members[i : i + 1] for i in range(len(members))]:
            q_rows = [np.arange(cu_q[b], cu_q[b + 1]) for b in group]
            self.parts.append(_Padded(*_pad(q_rows, device), *_pad([key_rows[b] for b in group], device)))
        self.masks: dict[tuple[bool, int | None], list[torch.Tensor]] = {}

    def mask(self, index: int, settings: Settings) -> torch.Tensor:
        """bool [b, Lq, Lk] of part ``index``; kept unless a key mask is part of it."""
        if settings.key_mask is not None:
            return _mask(self.parts[index], settings)
        key = (settings.causal, settings.window)
        if key not in self.masks:
            self.masks[key] = [_mask(part, settings) for part in self.parts]
        return self.masks[key][index]


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, settings: Settings, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """q [T, Hq, D], k and v [slots, Hkv, .] -> out [T, Hq, Dv], lse float32 [T, Hq] or None."""
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = torch.full(q.shape[:2], -torch.inf, device=q.device) if return_lse else None
    if not batch.parts:
        # part of the graph, and of no value
        return out + sum(x[:0].sum() for x in (q, k, v)), lse
    for index, part in enumerate(batch.parts):
        values, sums = _padded(q, k, v, part, batch.mask(index, settings), settings, return_lse)
        out = out.index_copy(0, part.q_rows, values)
        if lse is not None and sums is not None:
            lse = lse.index_copy(0, part.q_rows, sums)
    return out, lse


def _padded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    part: _Padded,
    mask: torch.Tensor,
    settings: Settings,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Outputs of the part's query rows, and their log-sum-exp where asked for."""
    keys, values = k[part.k_index], v[part.k_index]
    if settings.key_mask is not None:
        hidden = ~settings.key_mask[part.k_index][:, :, None, None]
        keys, values = keys.masked_fill(hidden, 0.0), values.masked_fill(hidden, 0.0)
    heads = [x.transpose(1, 2) for x in (q[part.q_index], keys, values)]
    if settings.softcap is None and not return_lse:
        plain = settings.causal and settings.window is None and mask.shape[1] == mask.shape[2]
        plain = plain and mask.shape[0] == 1 and settings.key_mask is None
        attn_mask = None if plain else mask[:, None]
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            *heads, attn_mask=attn_mask, is_causal=plain, scale=settings.scale, enable_gqa=grouped
        )
        return out.transpose(1, 2)[part.q_valid], None
    out, sums = _explicit(*heads, mask, settings)
    return out.transpose(1, 2)[part.q_valid], sums.transpose(1, 2)[part.q_valid]


def _explicit(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores in full, for what the library call cannot do: soft cap, and log-sum-exp as an output."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)).float() * settings.scale
    if settings.softcap is not None:
        scores = torch.tanh(scores / settings.softcap) * settings.softcap
    blind = ~mask.any(2)[:, None, :, None]
    scores = scores.masked_fill(~mask[:, None], -torch.inf)
    weights = torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(blind, 0.0)
    return weights.to(v.dtype) @ v, torch.logsumexp(scores, dim=-1)


def _mask(part: _Padded, settings: Settings) -> torch.Tensor:
    """bool [b, Lq, Lk], queries bottom-right aligned."""
    q_valid, k_valid = part.q_valid, part.k_valid
    visible = k_valid if settings.key_mask is None else k_valid & settings.key_mask[part.k_index]
    offset = k_valid.sum(1) - q_valid.sum(1)
    absolute = (torch.arange(q_valid.shape[1], device=q_valid.device) + offset[:, None])[:, :, None]
    key = torch.arange(k_valid.shape[1], device=q_valid.device)
    mask = visible[:, None, :].expand(-1, q_valid.shape[1], -1)
    if settings.causal:
        mask = mask & (key <= absolute)
    if settings.window is not None:
        mask = mask & (key > absolute - settings.window)
    return mask


def _pad(rows: list[np.ndarray], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [b, longest], padded with each sequence's first row, and bool of the same shape."""
    lengths = np.array([len(row) for row in rows])
    valid = np.arange(int(lengths.max())) < lengths[:, None]
    index = np.repeat(np.array([row[0] for row in rows])[:, None], valid.shape[1], axis=1)
    index[valid] = np.concatenate(rows)
    return torch.from_numpy(index).to(device), torch.from_numpy(valid).to(device)
