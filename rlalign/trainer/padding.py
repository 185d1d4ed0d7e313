"""Padded batches, for callers that have them: unpadded first, so that padding can't reach a bit.

``Trainer.logprobs_of_padded`` is the entry; from here on its rows take the way of every other sequence.

Legend: B sequences, L padded length, T tokens that the mask keeps.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from rlalign.config import SamplingParams
from rlalign.trainer.packing import TokenPair, banned_ids


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


def padded_pairs(
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    position_ids: Tensor | None = None,
    response_mask: Tensor | None = None,
    sampling: Sequence[SamplingParams] | None = None,
    eos_ids: Collection[int] | None = None,
) -> tuple[list[TokenPair], Tensor]:
    """One pair per row, and where its response tokens stand: int64 [N] into the flattened [B * L], row by row.

    Arguments as in ``unpad`` and ``Trainer.logprobs_of_padded``. Raises ValueError for what they refuse.
    """
    packed = unpad(input_ids, attention_mask, position_ids)
    rows = _per_row(sampling, len(input_ids), known_response=response_mask is not None)
    is_response = packed.position_ids > 0 if response_mask is None else _responses(response_mask, attention_mask)
    pairs = []
    for row, (start, end) in enumerate(pairwise(packed.cu_seqlens.tolist())):
        ids, marks = packed.token_ids[start:end].cpu().numpy(), is_response[start:end]
        first = end - start - int(marks.sum())
        if first == 0 or not bool(marks[first:].all()):
            raise ValueError(f"response_mask row {row}: a response is the end of what the mask keeps, not all of it")
        name = f"row {row}"
        pairs.append(TokenPair(ids[:first], ids[first:], rows[row], name, banned_ids(rows[row], eos_ids, name)))
    return pairs, packed.indices[is_response]


def _responses(response_mask: Tensor, attention_mask: Tensor) -> Tensor:
    """bool [T], which kept tokens belong to a response."""
    if response_mask.shape != attention_mask.shape:
        expected = tuple(attention_mask.shape)
        raise ValueError(f"response_mask has shape {tuple(response_mask.shape)}; expected {expected}")
    if not bool(((response_mask == 0) | (response_mask == attention_mask)).all()):
        raise ValueError("response_mask marks tokens that attention_mask leaves out, or isn't 0 and 1")
    return response_mask[attention_mask.bool()].bool()


def _per_row(sampling: Sequence[SamplingParams] | None, count: int, *, known_response: bool) -> list[SamplingParams]:
    rows = [SamplingParams()] * count if sampling is None else list(sampling)
    if len(rows) != count:
        raise ValueError(f"sampling has {len(rows)} entries for {count} rows")
    if not known_response and any(row.min_tokens > 0 for row in rows):
        raise ValueError("sampling.min_tokens counts from a response's start: give response_mask")
    return rows
