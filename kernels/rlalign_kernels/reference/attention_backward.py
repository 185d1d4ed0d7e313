"""Gradient of packed attention from the saved log-sum-exp: recomputed, memory bounded, deterministic run to run.

Sequences of similar length share padded batches; query positions are cut so that at most ``MAX_SCORES`` scores exist.
Per cut, in float32: P = exp(s - lse); dV += P^T dO; dS = P (dO V^T - delta) with delta = sum(dO * O); dQ = dS K;
dK += dS^T Q. Cuts run in ascending order and every output row is written by one batch: no atomics anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

MAX_SCORES = 2**20


class Settings(NamedTuple):
    """What attention was asked for."""

    scale: float
    causal: bool
    window: int | None
    softcap: float | None
    key_mask: torch.Tensor | None = None
    sinks: torch.Tensor | None = None


@dataclass(frozen=True)
class Saved:
    """Tensors of the forward, float32, heads last but one: [T, Hq, D], [S, Hkv, D], [S, Hkv, Dv]; lse [T, Hq]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    grad_out: torch.Tensor


def backward(
    saved: Saved, cu_q: np.ndarray, cu_k: np.ndarray, settings: Settings
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, float32."""
    grads = torch.zeros_like(saved.q), torch.zeros_like(saved.k), torch.zeros_like(saved.v)
    for members in _groups(np.diff(cu_q), np.diff(cu_k), saved.q.shape[1]):
        _Group(saved, cu_q, cu_k, members, settings).run(grads)
    return grads


def _groups(q_len: np.ndarray, kv_len: np.ndarray, num_heads: int) -> list[np.ndarray]:
    """Sequences by length, cut where a padded batch would hold more than ``MAX_SCORES`` scores."""
    order = np.lexsort((np.arange(len(q_len)), -q_len, -kv_len))
    order = order[(q_len[order] > 0) & (kv_len[order] > 0)]
    groups, start = [], 0
    for end in range(1, len(order) + 1):
        if end < len(order):
            members = order[start : end + 1]
            if len(members) * num_heads * q_len[members].max() * kv_len[members].max() <= MAX_SCORES:
                continue
        groups.append(order[start:end])
        start = end
    return [group for group in groups if len(group)]


class _Group:
    """b sequences, padded to the longest: queries [b * Hkv, Lq * G, .], keys [b * Hkv, Lk, .]."""

    def __init__(
        self, saved: Saved, cu_q: np.ndarray, cu_k: np.ndarray, members: np.ndarray, settings: Settings
    ) -> None:
        self.settings, self.saved = settings, saved
        self.batch, self.kv_heads = len(members), saved.k.shape[1]
        self.group = saved.q.shape[1] // self.kv_heads
        self.q_len, self.kv_len = np.diff(cu_q)[members], np.diff(cu_k)[members]
        device = saved.q.device
        self.q_rows, self.q_valid = _padded_rows(cu_q[members], self.q_len, device)
        self.k_rows, self.k_valid = _padded_rows(cu_k[members], self.kv_len, device)
        self.k_seen = self.k_valid if settings.key_mask is None else self.k_valid & settings.key_mask[self.k_rows]
        offset = torch.from_numpy(self.kv_len - self.q_len).to(device)
        self.absolute = torch.arange(self.q_rows.shape[1], device=device) + offset.unsqueeze(1)

    def _queries(self, x: torch.Tensor) -> torch.Tensor:
        """[T, Hq, C] -> [b * Hkv, Lq * G, C], padding zero."""
        rows = x[self.q_rows].masked_fill_(~self.q_valid[:, :, None, None], 0.0)
        rows = rows.unflatten(2, (self.kv_heads, self.group)).permute(0, 2, 1, 3, 4)
        return rows.reshape(self.batch * self.kv_heads, -1, x.shape[2])

    def _keys(self, x: torch.Tensor) -> torch.Tensor:
        """[S, Hkv, C] -> [b * Hkv, Lk, C], unseen keys zero."""
        rows = x[self.k_rows].masked_fill_(~self.k_seen[:, :, None, None], 0.0)
        return rows.transpose(1, 2).reshape(self.batch * self.kv_heads, -1, x.shape[2])

    def run(self, grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
        saved = self.saved
        q, grad_out = self._queries(saved.q), self._queries(saved.grad_out)
        k, v = self._keys(saved.k), self._keys(saved.v)
        delta = self._queries((saved.grad_out * saved.out).sum(-1, keepdim=True))
        lse = self._queries(saved.lse.unsqueeze(2))
        grad_q, grad_k, grad_v = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        num_positions = self.q_rows.shape[1]
        per_position = self.batch * self.kv_heads * self.group * k.shape[1]
        size = max(1, MAX_SCORES // per_position)
        for start in range(0, num_positions, size):
            positions = slice(start, min(start + size, num_positions))
            keys = self._key_range(positions)
            rows = slice(positions.start * self.group, positions.stop * self.group)
            probability, grad_scores = self._scores(
                q[:, rows], k[:, keys], v[:, keys], grad_out[:, rows], delta[:, rows], lse[:, rows], positions, keys
            )
            grad_v[:, keys] += probability.transpose(1, 2) @ grad_out[:, rows]
            grad_q[:, rows] = grad_scores @ k[:, keys]
            grad_k[:, keys] += grad_scores.transpose(1, 2) @ q[:, rows]
        self._scatter(grads, grad_q, grad_k, grad_v)

    def _key_range(self, positions: slice) -> slice:
        """Keys that any query of the cut may see."""
        offsets = self.kv_len - self.q_len
        stop = int(self.kv_len.max())
        if self.settings.causal:
            stop = max(0, min(stop, int(offsets.max()) + positions.stop))
        start = 0
        if self.settings.window is not None:
            start = min(stop, max(0, int(offsets.min()) + positions.start - self.settings.window + 1))
        return slice(start, stop)

    def _visible(self, positions: slice, keys: slice) -> torch.Tensor:
        """bool [b, 1, positions, 1, keys]."""
        absolute = self.absolute[:, positions, None]
        key = torch.arange(keys.start, keys.stop, device=absolute.device)
        visible = self.q_valid[:, positions, None] & self.k_seen[:, None, keys]
        if self.settings.causal:
            visible &= key <= absolute
        if self.settings.window is not None:
            visible &= key > absolute - self.settings.window
        return visible[:, None, :, None, :]

    def _scores(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        grad_out: torch.Tensor,
        delta: torch.Tensor,
        lse: torch.Tensor,
        positions: slice,
        keys: slice,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities and the gradient at q @ k.T, both [b * Hkv, rows, keys]."""
        settings = self.settings
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(settings.scale)
        slope = None
        if settings.softcap is not None:
            capped = torch.tanh(scores / settings.softcap)
            slope = 1.0 - capped.square()
            scores = capped.mul_(settings.softcap)
        probability = scores.sub_(lse).exp_()
        hidden = ~self._visible(positions, keys)
        shape = (self.batch, self.kv_heads, -1, self.group, k.shape[1])
        probability.view(shape).masked_fill_(hidden, 0.0)
        grad = torch.bmm(grad_out, v.transpose(1, 2)).sub_(delta).mul_(probability).mul_(settings.scale)
        return probability, grad if slope is None else grad.mul_(slope)

    def _scatter(
        self, grads: tuple[torch.Tensor, ...], grad_q: torch.Tensor, grad_k: torch.Tensor, grad_v: torch.Tensor
    ) -> None:
        heads = (self.batch, self.kv_heads)
        rows = grad_q.view(*heads, -1, self.group, grad_q.shape[2]).permute(0, 2, 1, 3, 4).flatten(2, 3)
        grads[0][self.q_rows[self.q_valid]] = rows[self.q_valid]
        for target, values in ((grads[1], grad_k), (grads[2], grad_v)):
            rows = values.view(*heads, -1, values.shape[2]).transpose(1, 2)
            target[self.k_rows[self.k_valid]] = rows[self.k_valid]


def _padded_rows(starts: np.ndarray, lengths: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Row numbers int64 [b, longest] (0 beyond the end), and bool of the same shape."""
    local = np.arange(int(lengths.max()))
    valid = local < lengths[:, None]
    rows = np.where(valid, starts[:, None] + local, 0)
    return torch.from_numpy(rows).to(device), torch.from_numpy(valid).to(device)
