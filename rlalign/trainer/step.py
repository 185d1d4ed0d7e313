"""One micro-batch through the policy: the log-probs and entropies of its response tokens.

Legend: N rows that predict a response token, M of them with a truncated support, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rlalign_kernels import SamplingRows
from torch import Tensor
from transformers import PreTrainedModel

from rlalign.modeling import PackedContext, Policy
from rlalign.records import Sample
from rlalign.trainer.packing import PackedBatch
from rlalign.trainer.support import SupportStore


@dataclass(frozen=True, slots=True)
class Scores:
    """logprob, entropy: float32 [N]; support: bool [M, V] of the truncated rows if it was asked for."""

    logprob: Tensor
    entropy: Tensor
    support: Tensor | None = None


def response_hidden(policy: Policy, batch: PackedBatch) -> Tensor:
    """Hidden states of the rows that predict response tokens, [N, H], from token ids alone."""
    hidden = policy.hidden(batch.token_ids, batch.position_ids, PackedContext(batch.cu_seqlens))
    return hidden.index_select(0, batch.predict_rows)


def score(policy: Policy, batch: PackedBatch, *, support: Tensor | None = None, return_support: bool = False) -> Scores:
    """Log-prob of every response token under the distribution that it was drawn from.

    support: bool [M, V], held constant instead of recomputed. Rows are independent, so that scoring truncated and
    other rows apart changes no bit; it keeps [rows, V] masks to the rows that need one.
    """
    hidden = response_hidden(policy, batch)
    if len(batch.truncated_rows) == 0 or (support is None and not return_support):
        output = policy.logprobs(hidden, batch.targets, batch.rows)
        return Scores(output.logprob, output.entropy)
    held = _score_rows(policy, hidden, batch, batch.truncated_rows, support, return_support)
    mask = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
    mask[batch.truncated_rows] = False
    plain_rows = mask.nonzero().squeeze(1)
    if len(plain_rows) == 0:
        return held
    plain = _score_rows(policy, hidden, batch, plain_rows, None, False)
    back = torch.argsort(torch.cat([plain_rows, batch.truncated_rows]))
    return Scores(
        torch.cat([plain.logprob, held.logprob]).index_select(0, back),
        torch.cat([plain.entropy, held.entropy]).index_select(0, back),
        held.support,
    )


def _score_rows(
    policy: Policy, hidden: Tensor, batch: PackedBatch, index: Tensor, support: Tensor | None, return_support: bool
) -> Scores:
    output = policy.logprobs(
        hidden.index_select(0, index),
        batch.targets.index_select(0, index),
        select_rows(batch.rows, index),
        support=support,
        return_support=return_support,
    )
    return Scores(output.logprob, output.entropy, output.support)


def select_rows(rows: SamplingRows, index: Tensor) -> SamplingRows:
    """The sampling parameters of some rows."""
    return SamplingRows(
        temperature=rows.temperature[index], top_k=rows.top_k[index], top_p=rows.top_p[index], min_p=rows.min_p[index]
    )


def store_support(batch: PackedBatch, samples: Sequence[Sample], support: Tensor, store: SupportStore) -> None:
    """Keep ``support`` bool [M, V] by sample."""
    members = [index for index, cut in zip(batch.owners, batch.truncated, strict=True) if cut]
    lengths = [len(samples[index].completion.token_ids) for index in members]
    for index, piece in zip(members, support.split(lengths), strict=True):
        store.put(samples[index], piece)


def stored_support(batch: PackedBatch, samples: Sequence[Sample], store: SupportStore) -> Tensor | None:
    """bool [M, V] of the batch's truncated rows as it was stored; None if none was, or none is truncated."""
    members = [samples[index] for index, cut in zip(batch.owners, batch.truncated, strict=True) if cut]
    held = [sample in store for sample in members]
    if not any(held):
        return None
    if not all(held):
        missing = members[held.index(False)].key
        raise ValueError(f"sample {missing} has no stored support, but others of its batch do: score all of them first")
    return torch.cat([store.get(sample) for sample in members]).to(batch.token_ids.device)


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute each layer in backward. Non-reentrant: it replays keyword arguments, the attention context included."""
    settings = {"use_reentrant": False}
    # transformers renamed both the method and its argument, and warns about the old ones.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    # Layers checkpoint in training mode only. Dropout, the one other thing it switches, was refused by align().
    model.train()
