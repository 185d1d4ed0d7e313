"""Denominators of the losses: counted over the whole optimizer batch, never over a micro-batch.

With N tokens in S sequences of the batch and L_s tokens in sequence s, the loss is a weighted sum of token losses

    token_mean:     w_t = 1 / N                    every token counts the same
    sequence_mean:  w_t = 1 / (S * L_s)            every sequence counts the same

so that splitting the batch into micro-batches changes the order of the additions and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

Aggregation = Literal["token_mean", "sequence_mean"]


@dataclass(frozen=True, slots=True)
class Denominators:
    """Response tokens and sequences with at least one response token, over one optimizer batch."""

    tokens: int
    sequences: int

    @classmethod
    def of(cls, response_lengths: Sequence[int]) -> Denominators:
        """Denominators of a batch of responses; ValueError when it holds no token at all."""
        tokens = sum(response_lengths)
        if tokens == 0:
            raise ValueError("the optimizer batch has no response token: there is nothing to average over")
        return cls(tokens=tokens, sequences=sum(length > 0 for length in response_lengths))


def token_weights(sequence_lengths: torch.Tensor, denominators: Denominators, aggregation: Aggregation) -> torch.Tensor:
    """Weight of every token's loss, float32 [N].

    sequence_lengths: int64 [N], the number of response tokens of the sequence that each token belongs to.
    """
    if aggregation not in get_args(Aggregation):
        raise ValueError(f"aggregation={aggregation!r} is not supported: use one of {get_args(Aggregation)}")
    # float64 until the one rounding, so that the weight does not depend on how the product is formed.
    lengths = sequence_lengths.double()
    if aggregation == "token_mean":
        return torch.full_like(lengths, 1.0 / denominators.tokens).float()
    return (1.0 / (denominators.sequences * lengths)).float()
