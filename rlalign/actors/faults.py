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


def flip_weight_bit(policy: Policy) -> str:
    """One bit of the largest element of the last weight by name (a model's final norm); returns where."""
    name, weight = list(policy.named_weights().items())[-1]
    index = tuple(int(i) for i in torch.unravel_index(weight.abs().argmax(), weight.shape))
    flip_bit(weight, index)
    return f"{name}{list(index)}"


@contextmanager
def kv_page_fault(policy: Policy) -> Iterator[None]:
    """Flip one bit of the first cached key that the second forward reads, once."""
    forwards = 0

    def hidden(token_ids: Tensor, position_ids: Tensor, context: Any) -> Tensor:
        nonlocal forwards
        forwards += 1
        if forwards == 2:
            keys = context.k_caches[0][context.block_tables[0, 0]][0]
            flip_bit(context.k_caches[0], (int(context.block_tables[0, 0]), 0, *_largest(keys)))
        return type(policy).hidden(policy, token_ids, position_ids, context)

    with _instead_of_hidden(policy, hidden):
        yield
    if forwards < 2:
        raise RuntimeError(
            f"fault kv_page was not planted: it needs a second forward, and there were {forwards}; "
            "a response of more than one token has one"
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


def _largest(values: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(values.abs().argmax(), values.shape))


@contextmanager
def _instead_of_hidden(policy: Policy, hidden: Any) -> Iterator[None]:
    policy.hidden = hidden  # type: ignore[method-assign]  # on this instance only
    try:
        yield
    finally:
        del policy.hidden  # type: ignore[method-assign]
