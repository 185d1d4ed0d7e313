"""float64 truths for tests: textbook formulas, one sequence or row at a time, sharing no code with the operators."""

from __future__ import annotations

import math

import torch


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K], weight [N, K], bias [N] -> float64 [..., N]."""
    out = torch.einsum("...k,nk->...n", x.double(), weight.double())
    return out if bias is None else out + bias.double()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, weight_offset: float = 0.0) -> torch.Tensor:
    """float64, nothing rounded in between."""
    wide = x.double()
    return wide * (wide.pow(2).mean(-1, keepdim=True) + eps).pow(-0.5) * (weight.double() + weight_offset)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """float64, nothing rounded in between."""
    wide = x.double()
    centered = wide - wide.mean(-1, keepdim=True)
    return centered * (centered.pow(2).mean(-1, keepdim=True) + eps).pow(-0.5) * weight.double() + bias.double()


def rotary(x: torch.Tensor, position_ids: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (i, i + R/2) of x [T, heads, D] as complex numbers; R = 2 len(inv_freq) <= D."""
    half = inv_freq.shape[0]
    angle = (position_ids.double()[:, None] * inv_freq.double())[:, None, :]
    wide = x.double()
    pairs = torch.complex(wide[..., :half], wide[..., half : 2 * half])
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag, wide[..., 2 * half :]), -1)


def silu(x: torch.Tensor) -> torch.Tensor:
    """float64."""
    return x.double() * torch.sigmoid(x.double())


def gelu(x: torch.Tensor, approximate: str) -> torch.Tensor:
    """float64."""
    wide = x.double()
    if approximate == "none":
        return 0.5 * wide * torch.erfc(-wide / math.sqrt(2))
    return wide * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out float64 [T, Hq, Dv], lse float64 [T, Hq]: one dense softmax per sequence and head."""
    outs, sums = [], []
    for b in range(len(cu_seqlens_q) - 1):
        queries, keys = (slice(int(cu[b]), int(cu[b + 1])) for cu in (cu_seqlens_q, cu_seqlens_k))
        hidden = None if key_mask is None else ~key_mask[keys]
        repeats = q.shape[1] // k.shape[1]
        heads = [
            _head(q[queries, h], k[keys, h // repeats], v[keys, h // repeats], scale, causal, window, softcap, hidden)
            for h in range(q.shape[1])
        ]
        outs.append(torch.stack([out for out, _ in heads], 1))
        sums.append(torch.stack([lse for _, lse in heads], 1))
    return torch.cat(outs), torch.cat(sums)


def _head(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
    hidden: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = scale * q.double() @ k.double().T
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    i = torch.arange(len(q))[:, None] + len(k) - len(q)
    j = torch.arange(len(k))[None, :]
    seen = torch.ones_like(scores, dtype=torch.bool)
    if causal:
        seen &= j <= i
    if window is not None:
        seen &= i - j < window
    if hidden is not None:
        seen &= ~hidden
    weights = torch.where(seen, scores.exp(), 0.0)
    total = weights.sum(1, keepdim=True)
    out = torch.where(total > 0, weights / torch.where(total > 0, total, 1.0), 0.0) @ v.double()
    return out, total.squeeze(1).log()


def support(logits: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """bool [V] of one row of temperature-scaled logits, by sorting ids in Python."""
    ids = sorted(range(len(logits)), key=lambda i: (-float(logits[i]), i))
    ids = ids[:top_k] if top_k else ids
    weights = [math.exp(float(logits[i]) - float(logits[ids[0]])) for i in ids]
    total, running, kept = sum(weights), 0.0, []
    for token, weight in zip(ids, weights, strict=True):
        if top_p < 1 and running >= top_p * total:
            break
        running += weight
        if weight >= min_p:
            kept.append(token)
    out = torch.zeros(len(logits), dtype=torch.bool)
    out[kept] = True
    return out


def logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor | float = 1.0,
    kept: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprob, entropy, logsumexp), float64 [T], of logits over ``kept`` (bool [T, V]) at ``temperature`` ([T])."""
    logits = linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.double()[:, None]
    logits = logits / temperature
    if kept is None:
        kept = torch.ones_like(logits, dtype=torch.bool)
    top = logits.detach().amax(1, keepdim=True)
    weights = torch.where(kept, (logits - top).exp(), 0.0)
    lse = top.squeeze(1) + weights.sum(1).log()
    log_p = logits - lse[:, None]
    probability = weights / weights.sum(1, keepdim=True)
    picked = torch.where(kept, log_p, -torch.inf).gather(1, targets[:, None]).squeeze(1)
    return picked, -(probability * torch.where(kept, log_p, 0.0)).sum(1), lse
