"""Faults planted on purpose, so that one can see the verifier catch them. Each changes one bit, or one position.

A fault enters where a real one would: in the trainer's weights, in the engine's cache, in the trainer's position ids.
Values stay finite, since a NaN would be caught by simpler means. A context that ends without having planted its fault
raises RuntimeError: a run that finds no mismatch must not be one that had none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlalign.modeling import Policy

_INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
# the exponent's lowest bit: the value doubles or halves
_BIT = {torch.float32: 23, torch.bfloat16: 7}


def flip_bit(values: Tensor, index: tuple[int, ...]) -> None:
    """Flip one high bit of one element, in place."""
    values.view(_INTEGER[values.dtype])[index] ^= 1 << _BIT[values.dtype]


def flip_weight_bit(policy: Policy, name: str | None = None) -> str:
    """One bit of the largest element of a weight, of the last by name (a model's final norm) if none is named.

    Returns where."""
    weights = policy.named_weights()
    name = name or list(weights)[-1]
    weight = weights[name]
    index = tuple(int(i) for i in torch.unravel_index(weight.abs().argmax(), weight.shape))
    flip_bit(weight, index)
    return f"{name}{list(index)}"


@contextmanager
def kv_page_fault(policy: Policy, *, layer: int = 0, of_value: bool = False) -> Iterator[None]:
    """Flip one bit of a layer's newest cached key, or value, of the first sequence that has any, before the forward
    that reads it."""
    done = False

    def hidden(token_ids: Tensor, position_ids: Tensor, context: Any) -> Tensor:
        nonlocal done
        if not done and (slot := _newest_cached_slot(context)) is not None:
            cache = (context.v_caches if of_value else context.k_caches)[layer]
            flip_bit(cache, (*slot, *_largest(cache[slot])))
            done = True
        return type(policy).hidden(policy, token_ids, position_ids, context)

    with _instead_of_hidden(policy, hidden):
        yield
    if not done:
        raise RuntimeError(
            "fault kv_page was not planted: no forward read a cached key; a response of more than one token does"
        )


@contextmanager
def position_fault(policy: Policy) -> Iterator[None]:
    """Shift the position of the second token of the first forward's first sequence by one, once."""
    done = False

    def hidden(token_ids: Tensor, position_ids: Tensor, context: Any) -> Tensor:
        nonlocal done
        if not done:
            position_ids = position_ids.clone()
            position_ids[1] += 1
            done = True
        return type(policy).hidden(policy, token_ids, position_ids, context)

    with _instead_of_hidden(policy, hidden):
        yield
    if not done:
        raise RuntimeError("fault position was not planted: there was no forward")


def _newest_cached_slot(context: Any) -> tuple[int, int] | None:
    """(page, offset) of a key that this forward reads and does not write; None where every sequence begins.

    The newest one, because a sliding window may hide older ones.
    """
    cached = context.kv_lens - context.cu_seqlens_q.diff()
    for sequence in cached.nonzero().flatten().tolist():
        page, offset = divmod(int(cached[sequence]) - 1, context.k_caches[0].shape[1])
        return int(context.block_tables[sequence, page]), offset
    return None


def _largest(values: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(values.abs().argmax(), values.shape))


@contextmanager
def _instead_of_hidden(policy: Policy, hidden: Any) -> Iterator[None]:
    policy.hidden = hidden  # type: ignore[method-assign]  # on this instance only
    try:
        yield
    finally:
        del policy.hidden  # type: ignore[method-assign]
