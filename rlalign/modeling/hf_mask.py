"""What a mask of transformers comes down to: offsets of the sequences in a batch, made once per forward.

Rows of a padded batch [B, T] stay where they are. Between the sequences lie gaps, which are sequences too: padded
queries see no key (their output is 0, their gradient too), padded keys have no query. So nothing is gathered or
scattered, and no length is read on the host. Legend: B rows, T queries and L keys per row, n sequences and gaps.

``mask_offsets`` is what transformers calls instead of making a mask. It reads the device once, to refuse holes, where a
2-D mask is given, and once to count sequences where position ids tell them apart; otherwise never.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

MaskFunction = Callable[..., Tensor]

_PLAIN = frozenset(
    {"causal_mask_function", "bidirectional_mask_function", "sliding_window_overlay", "packed_sequence_mask_function"}
)
# arguments that say how transformers' own masks are stored
_ABOUT_STORAGE = frozenset({"allow_is_causal_skip", "allow_is_bidirectional_skip", "dtype", "config"})
_CAUSAL, _PADDED, _PACKED = 1, 2, 4
# sequences and gaps of a row of a padded batch
_PER_ROW = 5


@dataclass(frozen=True, slots=True)
class Rule:
    """What every sequence of a batch has in common. ``padded``: a mask hides tokens; ``packed``: rows hold several."""

    causal: bool
    window: int | None = None
    padded: bool = False
    packed: bool = False


def mask_offsets(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor:
    """Offsets of a batch (``pack``) in place of its mask; ``attention_mask`` bool [B, L or fewer], False is padding.

    ``q_offset``: position of the first query, on the device where a static cache has it there; ``kv_offset``: of the
    first key.
    Raises ValueError for a mask with a hole in a row, NotImplementedError for a pattern that is not plain attention,
    or a model that would take the offsets for a mask.
    """
    if (config := others.get("config")) is not None:
        _refuse_own_attention(type(config))
    if unknown := sorted(name for name, value in others.items() if value is not None and name not in _ABOUT_STORAGE):
        raise NotImplementedError(f"attn_implementation='rlalign': mask argument {unknown[0]}=… is not supported")
    leaves = {_name(leaf): leaf for leaf in _leaves(mask_function)}
    if use_vmap or (strange := sorted(leaves.keys() - _PLAIN)):
        what = "a mask function of the model's own" if use_vmap else strange[0]
        raise NotImplementedError(
            f"attn_implementation='rlalign': the model masks by {what}; supported: causal and full attention, causal "
            "sliding windows, padding, packed sequences"
        )
    causal = "causal_mask_function" in leaves
    window = local_size if "sliding_window_overlay" in leaves else None
    packed = leaves.get("packed_sequence_mask_function")
    if packed is not None:
        row, at = torch.arange(batch_size, device=device)[:, None], torch.arange(q_length, device=device)[None]
        cu = starts_to_offsets(~packed(row, 0, at[:, 1:], at[:, :-1]))
        return pack(cu, cu, Rule(causal, window, packed=True), (batch_size * q_length,) * 2)
    if attention_mask is None and isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length:
        return whole_rows(batch_size, q_length, kv_length, Rule(causal, window), device)
    if isinstance(q_offset, int) and causal and q_offset + q_length > kv_offset + kv_length:
        raise NotImplementedError(
            f"attn_implementation='rlalign': queries end at position {q_offset + q_length}, behind the last key's "
            f"{kv_offset + kv_length}"
        )
    seen = _seen(attention_mask, batch_size, q_offset + q_length if causal else None, kv_offset + kv_length, device)
    padded = attention_mask is not None and _has_padding(seen)
    if not padded and isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length:
        return whole_rows(batch_size, q_length, kv_length, Rule(causal, window), device)
    first = seen.int().argmax(1)  # documented: the first of several maxima
    last = first + seen.sum(1)
    keys = tuple((edge - kv_offset).clamp(0, kv_length) for edge in (first, last))
    if causal:
        queries = tuple((edge - q_offset).clamp(0, q_length) for edge in (first, last))
    else:  # every query sees all keys, whether or not it is padding itself
        queries = torch.zeros_like(first), torch.full_like(first, q_length)
    rule = Rule(causal, window, padded=padded)
    totals = batch_size * q_length, batch_size * kv_length
    return pack(*_with_gaps(queries, keys, q_length, kv_length), rule, totals)


@cache
def _refuse_own_attention(config: type) -> None:
    """Raises NotImplementedError for a model that asks for masks by this name and then calls an attention of its own:
    offsets would be added to its scores, where the shapes happen to fit."""
    name = config.__module__.replace(".configuration_", ".modeling_")
    modeling = sys.modules.get(name)
    if name == config.__module__ or modeling is None or hasattr(modeling, "ALL_ATTENTION_FUNCTIONS"):
        return
    if any(
        kind.endswith("Attention") and getattr(one, "__module__", "") == name for kind, one in vars(modeling).items()
    ):
        raise NotImplementedError(
            f"attn_implementation='rlalign': {config.__name__.removesuffix('Config')} has an attention of its own, "
            "which transformers can't replace; use attn_implementation='eager'"
        )


def whole_rows(batch_size: int, q_length: int, kv_length: int, rule: Rule, device: torch.device | str) -> Tensor:
    """Offsets of rows without padding, queries being the last positions of each."""
    rows = torch.arange(batch_size + 1, device=device)
    return pack(rows * q_length, rows * kv_length, rule, (batch_size * q_length, batch_size * kv_length))


def starts_to_offsets(inner_starts: Tensor) -> Tensor:
    """Int [n + 1] of bool [B, T - 1]: whether positions 1 … T - 1 of each row start a sequence. Reads their number."""
    starts = torch.nn.functional.pad(inner_starts, (1, 0), value=True).flatten()
    return torch.nn.functional.pad(starts.nonzero().squeeze(1), (0, 1), value=starts.numel())


def position_starts(position_ids: Tensor) -> Tensor:
    """Bool [B, T - 1]: positions [B, T] that do not follow the one before, which is where transformers cuts too."""
    return position_ids.diff(dim=-1) != 1


def pack(cu_q: Tensor, cu_k: Tensor, rule: Rule, totals: tuple[int, int]) -> Tensor:
    """Int32 [2, n + 2, 1, 1]: offsets [n + 1] of queries and keys, which end at ``totals``, then the rule.

    A mask of four dimensions is handed through by transformers as it is. The rule and the totals are attributes as
    well, so that no layer reads them from the device; a copy (layers on several devices) has lost them.
    """
    flags = _CAUSAL * rule.causal + _PADDED * rule.padded + _PACKED * rule.packed
    ends = (cu_q.new_full((1,), flags), cu_k.new_full((1,), rule.window or 0))
    columns = [torch.cat([cu, end]) for cu, end in zip((cu_q, cu_k), ends, strict=True)]
    packed = torch.stack(columns).to(torch.int32)[:, :, None, None]
    packed.rlalign_rule, packed.rlalign_totals = rule, totals
    return packed


def is_packed(mask: Tensor) -> bool:
    """Whether ``mask`` is of ``pack``."""
    return mask.dtype == torch.int32 and mask.dim() == 4 and mask.shape[0] == 2 and mask.shape[2:] == (1, 1)


def unpack(mask: Tensor) -> tuple[Tensor, Tensor, Rule]:
    """Offsets and rule that ``pack`` was given."""
    rule = getattr(mask, "rlalign_rule", None)
    if rule is None:
        (queries, flags), (keys, window) = mask[:, -2:, 0, 0].tolist()
        rule = Rule(bool(flags & _CAUSAL), window or None, bool(flags & _PADDED), bool(flags & _PACKED))
        mask.rlalign_rule, mask.rlalign_totals = rule, (queries, keys)
    return mask[0, :-1, 0, 0], mask[1, :-1, 0, 0], rule


def check_totals(mask: Tensor, queries: int, keys: int) -> None:
    """Raises ValueError unless the offsets of ``pack`` end at ``queries`` and ``keys``: kernels don't look at them."""
    unpack(mask)
    if mask.rlalign_totals != (queries, keys):
        raise ValueError(
            f"attn_implementation='rlalign': the model's mask is of {mask.rlalign_totals[0]} queries and "
            f"{mask.rlalign_totals[1]} keys in all its rows, but a layer has {queries} and {keys}"
        )


def _seen(
    attention_mask: Tensor | None, batch_size: int, end: int | Tensor | None, length: int, device: torch.device | str
) -> Tensor:
    """Bool [B, length] by absolute position: not padding, and, if ``end`` is given, before it."""
    position = torch.arange(length, device=device)
    if attention_mask is None:
        seen = torch.ones(batch_size, length, dtype=torch.bool, device=device)
    else:
        # a static cache has room for more than the mask speaks of
        missing = max(0, length - attention_mask.shape[1])
        seen = torch.nn.functional.pad(attention_mask.bool()[:, :length], (0, missing), value=False)
    return seen if end is None else seen & (position < end)


def _has_padding(seen: Tensor) -> bool:
    """Whether a token is hidden. Raises ValueError naming a row with a hole. A padded batch waits for the device here.

    A mask that hides nothing says nothing: position ids may then tell sequences apart, as without one.
    """
    runs = seen[:, 0].int() + (seen[:, 1:] & ~seen[:, :-1]).sum(1)
    *pieces, hidden = torch.cat([runs, (~seen).sum()[None]]).tolist()
    for row, count in enumerate(pieces):
        if count > 1:
            raise ValueError(
                f"attention_mask: row {row} has a hole: its tokens are in {count} pieces; supported is padding on the "
                "left, on the right, or none"
            )
    return hidden > 0


def tokens_beside(mask: Tensor, batch_size: int, length: int) -> Tensor:
    """Bool [B, T - 1]: whether positions t and t + 1 are both tokens, by a padded batch's offsets (``pack``)."""
    first, last = (mask[0, start:-2:_PER_ROW, 0, 0][:, None] for start in (2, 3))
    at = torch.arange(batch_size * length, device=mask.device).view(batch_size, length)
    return (at[:, :-1] >= first) & (at[:, 1:] < last)


def _with_gaps(
    queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], q_length: int, kv_length: int
) -> tuple[Tensor, Tensor]:
    """Offsets int [5 B + 1] of B sequences, each [from, to) in its row, with a gap of queries and of keys on each side.

    Per row: queries that see nothing, keys that nothing sees, the sequence, such keys, such queries. No gap reaches
    into the next row, so none is longer than a row: whoever states that bound to a kernel counts on it.
    """
    row = torch.arange(len(queries[0]), device=queries[0].device)
    q_row, k_row = row * q_length, row * kv_length
    q_from, q_to = (edge + q_row for edge in queries)
    k_from, k_to = (edge + k_row for edge in keys)
    cu_q = torch.stack([q_row, q_from, q_from, q_to, q_to], dim=1).flatten()
    cu_k = torch.stack([k_row, k_row, k_from, k_to, k_row + kv_length], dim=1).flatten()
    ends = (row.new_full((1,), len(row) * length) for length in (q_length, kv_length))
    return tuple(torch.cat([cu, end]) for cu, end in zip((cu_q, cu_k), ends, strict=True))


def _leaves(function: MaskFunction) -> Iterator[MaskFunction]:
    """The mask functions that ``function`` is the intersection of; what is combined in another way is one by itself."""
    name = _name(function)
    if name == "and_masks":
        for part in _closure(function)["mask_functions"]:
            yield from _leaves(part)
    elif name == "remap_positions_for_packed_sequence":
        # positions count from each sequence's start: within a sequence the same mask
        yield from _leaves(_closure(function)["mask_function"])
    else:
        yield function


def _name(function: MaskFunction) -> str:
    """Of the function that made it; anything that transformers' masking module did not make has its full name."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    own = getattr(function, "__module__", "") == causal_mask_function.__module__
    return name.partition(".")[0] if own else f"{getattr(function, '__module__', '?')}.{name}"


def _closure(function: MaskFunction) -> dict[str, Any]:
    return dict(
        zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True)
    )
