"""From last hidden states to log-probs, in each of the ways that ``ScoreSettings`` name.

Legend: N rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rlalign_kernels import SamplingRows, linear
from torch import Tensor

from rlalign.config import SamplingParams
from rlalign.modeling import Policy, sampling_rows
from rlalign.verifier.score import ScoreSettings, UnsupportedSetting

# bytes of one block of float32 logits
_MAX_BYTES = 64 * 2**20


@torch.no_grad()
def head_logprobs(
    policy: Policy,
    hidden: Tensor,
    targets: Tensor,
    settings: ScoreSettings,
    params: Sequence[SamplingParams] | None = None,
    banned: Tensor | None = None,
) -> Tensor:
    """Log-prob float32 [N] of ``targets`` int64 [N], of hidden [N, H].

    params: of each row, as ``effective_sampling`` gives them; None: temperature 1, nothing cut off. banned: bool
    [N, V], ids that could not be drawn.
    """
    step = max(1, _MAX_BYTES // (4 * policy.vocab_size))
    if settings.logits == "float32" and not settings.filters_first and settings.slack <= 0 and banned is None:
        step = max(step, len(targets))  # the operator holds no logits
    parts = []
    for start in range(0, len(targets), step):
        block = slice(start, start + step)
        rows = None if params is None else sampling_rows(params[block], policy.device)
        masked = None if banned is None else banned[block]
        parts.append(_block(policy, hidden[block], targets[block], settings, rows, masked))
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def _block(
    policy: Policy,
    hidden: Tensor,
    targets: Tensor,
    settings: ScoreSettings,
    rows: SamplingRows | None,
    banned: Tensor | None,
) -> Tensor:
    support = None
    if rows is not None and settings.filters_first:
        # what is kept is decided at temperature 1, what is divided by the temperature is the rest
        ones = torch.ones_like(rows.temperature)
        greedy = rows.temperature == 0
        support = _support(policy, hidden, targets, _with(rows, torch.where(greedy, 0.0, ones)), banned)
    if settings.slack > 0 and rows is not None and rows.any_truncated:
        kept = support if support is not None else _support(policy, hidden, targets, rows, banned)
        logits = _logits(policy, hidden, settings, rows, rounded=settings.logits != "float32")
        # neighbours in rank may have changed places, however large the mass between them
        least = logits.masked_fill(~kept, torch.inf).amin(1, keepdim=True)
        support = kept | (logits >= least - settings.slack)
        if banned is not None:
            support &= ~banned  # no rounding allows these
    if settings.logits == "float32":
        taken = {"banned": banned} if support is None else {"support": support}
        return policy.logprobs(hidden, targets, rows, **taken).logprob
    if support is None and (banned is not None or (rows is not None and rows.any_truncated)):
        support = _support(policy, hidden, targets, rows, banned)
    return _rounded(policy, hidden, targets, settings, rows, support)


def _support(
    policy: Policy, hidden: Tensor, targets: Tensor, rows: SamplingRows | None, banned: Tensor | None
) -> Tensor:
    found = policy.logprobs(hidden, targets, rows, banned=banned, return_support=True).support
    if found is None:
        raise RuntimeError("linear_logprob returned no support although it was asked for")
    return found


def _rounded(
    policy: Policy,
    hidden: Tensor,
    targets: Tensor,
    settings: ScoreSettings,
    rows: SamplingRows | None,
    support: Tensor | None,
) -> Tensor:
    """The log-softmax of rounded logits, in full."""
    logits = _logits(policy, hidden, settings, rows, rounded=True)
    if support is not None:
        logits = logits.masked_fill(~support, -torch.inf)
    return torch.log_softmax(logits, dim=1).gather(1, targets.unsqueeze(1)).squeeze(1).float()


def _logits(
    policy: Policy, hidden: Tensor, settings: ScoreSettings, rows: SamplingRows | None, *, rounded: bool
) -> Tensor:
    """[N, V] after the temperature, in the model's dtype or rounded as ``settings.logits`` says before it. Raises
    UnsupportedSetting where float16 can't hold the logits, or loses nothing of a bfloat16 model's."""
    logits = linear(hidden, policy.head.weight, policy.head.bias, backend=policy.backend)
    if rounded:
        coarse = torch.float16 if settings.logits.startswith("float16") else torch.bfloat16
        if coarse is torch.float16 and policy.dtype == torch.bfloat16:
            raise UnsupportedSetting(f"logits={settings.logits}: the model computes in bfloat16, which is coarser")
        if coarse is torch.float16 and (logits.abs() > torch.finfo(coarse).max).any():
            raise UnsupportedSetting(f"logits={settings.logits}: a logit is beyond float16's range")
        logits = logits.to(coarse)
    if not settings.logits.endswith("_softmax"):
        logits = logits.float()
    if policy.softcap is not None:
        logits = torch.tanh(logits / policy.softcap) * policy.softcap
    if rows is not None:
        logits = logits / torch.where(rows.temperature == 0, 1.0, rows.temperature).unsqueeze(1).to(logits.dtype)
    return logits


def _with(rows: SamplingRows, temperature: Tensor) -> SamplingRows:
    return SamplingRows(
        temperature=temperature, top_k=rows.top_k, top_p=rows.top_p, min_p=rows.min_p, truncates=rows.truncates
    )
