"""One micro-batch through the policy: the log-probs and entropies of its response tokens.

Legend: N rows that predict a response token, M of them with a truncated support, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
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
    hidden = policy.hidden(batch.token_ids, batch.position_ids, PackedContext(batch.cu_seqlens, batch.max_seqlen))
    return hidden.index_select(0, batch.predict_rows)


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows that are scored in one call; index int64 into N, masks bool [len(index), V]."""

    index: Tensor
    support: Tensor | None = None
    banned: Tensor | None = None
    return_support: bool = False


def score(policy: Policy, batch: PackedBatch, *, support: Tensor | None = None, return_support: bool = False) -> Scores:
    """Log-prob of every response token under the distribution that it was drawn from.

    support: bool [M, V], held constant instead of recomputed. Rows are independent, so that scoring them in groups
    changes no bit; it keeps [rows, V] masks to the rows that need one.
    """
    hidden = response_hidden(policy, batch)
    groups = _groups(batch, policy.vocab_size, support, return_support)
    outputs = [
        policy.logprobs(
            hidden.index_select(0, group.index),
            batch.targets[group.index],
            batch.rows[group.index],
            support=group.support,
            banned=group.banned,
            return_support=group.return_support,
        )
        for group in groups
    ]
    # Back to the batch's order: groups partition its rows.
    order = torch.argsort(torch.cat([group.index for group in groups]))
    return Scores(
        torch.cat([output.logprob for output in outputs]).index_select(0, order),
        torch.cat([output.entropy for output in outputs]).index_select(0, order),
        next((output.support for output in outputs if output.support is not None), None),
    )


def _groups(batch: PackedBatch, vocab_size: int, support: Tensor | None, return_support: bool) -> list[_Group]:
    """The rows in up to three groups: with a support to hold or to return, with banned ids, and all others."""
    truncated, banned = _marks(batch, batch.truncated_rows), _marks(batch, batch.ban_rows)
    if support is None and not return_support:
        truncated = torch.zeros_like(truncated)  # recomputed inside the operator, no mask needed
    groups = []
    for mark, is_truncated in ((truncated, True), (banned & ~truncated, False), (~banned & ~truncated, False)):
        index = mark.nonzero().squeeze(1)
        if len(index) == 0:
            continue
        held = support if is_truncated else None
        # A stored support leaves banned ids out already.
        mask = None if held is not None else _ban_mask(batch, index, vocab_size)
        groups.append(_Group(index, held, mask, return_support and is_truncated))
    return groups


def _marks(batch: PackedBatch, rows: Tensor) -> Tensor:
    """bool [N], True at ``rows``."""
    marks = torch.zeros(len(batch.targets), dtype=torch.bool, device=batch.targets.device)
    marks[rows] = True
    return marks


def _ban_mask(batch: PackedBatch, index: Tensor, vocab_size: int) -> Tensor | None:
    """bool [len(index), V] of banned ids; None if no row of ``index`` has any."""
    place = torch.full_like(batch.targets, -1)
    place[index] = torch.arange(len(index), device=index.device)
    row, inside = place[batch.ban_rows], place[batch.ban_rows] >= 0
    if not bool(inside.any()):
        return None
    mask = torch.zeros(len(index), vocab_size, dtype=torch.bool, device=index.device)
    mask[row[inside], batch.ban_ids[inside]] = True
    return mask


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
