"""Padded batches, for callers that have them: unpadded first, so that padding can't reach a bit.

Legend: B sequences, L padded length, T tokens that the mask keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlalign.modeling import PackedContext, Policy


@dataclass(frozen=True, slots=True)
class Unpadded:
    """token_ids, position_ids: int64 [T]. cu_seqlens: int32 [B + 1]. indices: int64 [T] into the flattened [B * L]."""

    token_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    indices: Tensor


def unpad(input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None) -> Unpadded:
    """Packed rows of a right-, left- or both-side-padded batch. All arguments int64 (mask: any integer or bool) [B, L].

    Positions count the kept tokens of a row from 0. ``position_ids``, where given, must say the same at every kept
    token (what they hold at padding is not looked at). Raises ValueError for a mask that is not 0/1, has a hole or
    an empty row, and for positions that disagree with it.
    """
    if input_ids.dim() != 2 or attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}, attention_mask {tuple(attention_mask.shape)}; "
            "expected both [B, L]"
        )
    if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
        raise ValueError("attention_mask holds values other than 0 and 1")
    kept = attention_mask.bool()
    lengths = kept.sum(dim=1)
    _refuse_holes(kept, lengths)
    positions = kept.long().cumsum(dim=1) - 1
    if position_ids is not None:
        _refuse_other_positions(position_ids, positions, kept)
    starts = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=input_ids.device)
    starts[1:] = lengths.cumsum(0)
    return Unpadded(input_ids[kept], positions[kept], starts, kept.flatten().nonzero().squeeze(1))


def _refuse_holes(kept: Tensor, lengths: Tensor) -> None:
    if bool((lengths == 0).any()):
        raise ValueError(f"attention_mask keeps nothing in row {int((lengths == 0).nonzero()[0])}")
    columns = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    first = columns.masked_fill(~kept, kept.shape[1]).amin(dim=1)
    last = columns.masked_fill(~kept, -1).amax(dim=1)
    holes = last - first + 1 != lengths
    if bool(holes.any()):
        raise ValueError(
            f"attention_mask has a hole in row {int(holes.nonzero()[0])}: padding may only stand left or right"
        )


def _refuse_other_positions(position_ids: Tensor, expected: Tensor, kept: Tensor) -> None:
    if position_ids.shape != kept.shape:
        raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}; expected {tuple(kept.shape)}")
    wrong = (position_ids != expected) & kept
    if bool(wrong.any()):
        row, column = (int(x) for x in wrong.nonzero()[0])
        raise ValueError(
            f"position_ids[{row}, {column}]={int(position_ids[row, column])} disagrees with attention_mask, "
            f"which makes it {int(expected[row, column])}"
        )


@torch.no_grad()
def score_padded(
    policy: Policy, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None
) -> Tensor:
    """Log-prob of every token given those before it, float32 [B, L], temperature 1; 0 at padding and first tokens.

    The bits are those of the same sequences packed, for any amount, side and value of padding.
    """
    packed = unpad(input_ids, attention_mask, position_ids)
    hidden = policy.hidden(packed.token_ids, packed.position_ids, PackedContext(packed.cu_seqlens))
    # Row t predicts token t + 1; the row before a sequence's first token belongs to its neighbour.
    scored = (packed.position_ids > 0).nonzero().squeeze(1)
    result = torch.zeros(input_ids.numel(), dtype=torch.float32, device=input_ids.device)
    if len(scored):
        selected = hidden.index_select(0, scored - 1)
        result[packed.indices[scored]] = policy.logprobs(selected, packed.token_ids[scored]).logprob
    return result.view(input_ids.shape)
