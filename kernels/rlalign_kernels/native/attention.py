"""Attention by ``scaled_dot_product_attention`` over padded batches, as an ordinary engine without our kernels does."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from rlalign_kernels.reference.attention_backward import Settings

# A padded batch larger than this many times its tokens runs one sequence at a time instead.
_MAX_PADDING = 4


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: np.ndarray,
    key_rows: list[np.ndarray],
    settings: Settings,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """q [T, Hq, D], k and v [slots, Hkv, .]; ``key_rows``: each sequence's slots in order. out [T, Hq, Dv], lse."""
    q_len = np.diff(cu_q)
    kv_len = np.array([len(rows) for rows in key_rows])
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = torch.full(q.shape[:2], -torch.inf, device=q.device) if return_lse else None
    members = np.flatnonzero((q_len > 0) & (kv_len > 0))
    if not len(members):
        return out + 0 * q.sum() if q.requires_grad else out, lse
    padded = len(members) * q_len[members].max() * kv_len[members].max()
    together = padded <= _MAX_PADDING * int((q_len * kv_len)[members].sum())
    for group in [members] if together else [members[i : i + 1] for i in range(len(members))]:
        index, values, sums = _padded(q, k, v, cu_q, [key_rows[b] for b in group], group, settings, return_lse)
        out = out.index_copy(0, index, values)
        if lse is not None:
            lse = lse.index_copy(0, index, sums)
    return out, lse


def _padded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: np.ndarray,
    key_rows: list[np.ndarray],
    group: np.ndarray,
    settings: Settings,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """One padded batch: token rows that it covers, their outputs, their log-sum-exp."""
    q_rows = [np.arange(cu_q[b], cu_q[b + 1]) for b in group]
    q_index, q_valid = _pad(q_rows, q.device)
    k_index, k_valid = _pad(key_rows, q.device)
    visible = k_valid.clone()
    keys, values = k[k_index], v[k_index]
    if settings.key_mask is not None:
        visible &= settings.key_mask[k_index]
        keys, values = (x.masked_fill(~visible[:, :, None, None], 0.0) for x in (keys, values))
    mask = _mask(q_valid, k_valid, visible, settings)
    heads = [x.transpose(1, 2) for x in (q[q_index], keys, values)]
    if settings.softcap is None and not return_lse:
        plain = settings.causal and settings.window is None and mask.shape[1] == mask.shape[2]
        plain = plain and len(group) == 1 and settings.key_mask is None
        attn_mask = None if plain else mask[:, None]
        out = F.scaled_dot_product_attention(
            *heads, attn_mask=attn_mask, is_causal=plain, scale=settings.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        sums = None
    else:
        out, sums = _explicit(*heads, mask, settings)
        sums = sums.transpose(1, 2)[q_valid]
    rows = q_index[q_valid]
    return rows, out.transpose(1, 2)[q_valid], sums


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


def _mask(q_valid: torch.Tensor, k_valid: torch.Tensor, visible: torch.Tensor, settings: Settings) -> torch.Tensor:
    """bool [b, Lq, Lk], queries bottom-right aligned."""
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
