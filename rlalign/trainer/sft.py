"""Supervised fine-tuning on (prompt, answer) pairs, on the same packing and optimizer.

loss = -(1/N) sum_t log p(answer_t | before it)          N answer tokens of the whole batch, temperature 1
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlalign.algorithms.metrics import Metric, merge, sum_of, values
from rlalign.config import SamplingParams, TrainerConfig
from rlalign.modeling import Policy
from rlalign.trainer.optimizer import MasterAdamW, trainable_parameters
from rlalign.trainer.packing import PackedBatch, TokenPair, pack
from rlalign.trainer.step import enable_checkpointing, response_hidden

_UNTRUNCATED = SamplingParams()


class SftTrainer:
    """Cross-entropy on answers only; the prompt is context."""

    def __init__(self, policy: Policy, config: TrainerConfig, *, total_steps: int) -> None:
        self.policy, self.config = policy, config
        self.optimizer = MasterAdamW(trainable_parameters(policy.model), config, total_steps=total_steps)
        if config.gradient_checkpointing:
            enable_checkpointing(policy.model)

    def step(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, float]:
        """One update on (prompt ids, answer ids) pairs, packed in the order given.

        Returns ``loss`` (before the update), ``tokens``, and what ``MasterAdamW.apply`` does. Raises ValueError for a
        batch without an answer token, FloatingPointError when the gradient is not finite.
        """
        tokens = sum(len(answer) for _, answer in pairs)
        if tokens == 0:
            raise ValueError("the batch has no answer token: there is nothing to learn from")
        loss = merge(self._accumulate(batch, tokens) for batch in self._pack(pairs))
        return {**values(loss), "tokens": float(tokens), **self.optimizer.apply()}

    def _pack(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[PackedBatch]:
        records = [
            TokenPair(np.asarray(prompt, np.int64), np.asarray(answer, np.int64), _UNTRUNCATED, name=f"pair {index}")
            for index, (prompt, answer) in enumerate(pairs)
        ]
        return pack(
            records,
            micro_batch_tokens=self.config.micro_batch_tokens,
            vocab_size=self.policy.vocab_size,
            max_positions=self.policy.max_positions,
            device=self.policy.device,
        )

    def _accumulate(self, batch: PackedBatch, tokens: int) -> dict[str, Metric]:
        logprob = self.policy.logprobs(response_hidden(self.policy, batch), batch.targets).logprob
        weighted = -logprob * (1.0 / tokens)
        weighted.sum().backward()
        self.optimizer.accumulate()
        return {"loss": sum_of(weighted)}
