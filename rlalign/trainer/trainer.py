"""The trainer: scores samples from token ids alone, accumulates gradients, updates, saves.

One batch of samples goes through

    begin_batch → [compute_logprobs] → accumulate → apply_update          one optimizer step per batch
    begin_batch → compute_logprobs → (accumulate → apply_update) ...     several epochs or minibatches

``accumulate`` changes no weight, so that its log-probs can be verified before ``apply_update``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rlalign.algorithms import grpo, ppo
from rlalign.algorithms.aggregation import Denominators
from rlalign.algorithms.corrections import importance_weights
from rlalign.algorithms.metrics import Metric, merge, values
from rlalign.config import AlgorithmConfig, Correction, SamplingParams, TrainerConfig
from rlalign.generators import Generators
from rlalign.modeling import Policy, save_checkpoint
from rlalign.records import Sample, derive_seed
from rlalign.trainer.checkpoint import atomic_folder, existing_folder, read_state, write_state
from rlalign.trainer.critic import Critic
from rlalign.trainer.optimizer import MasterAdamW, trainable_parameters
from rlalign.trainer.packing import PackedBatch, pack, pack_samples
from rlalign.trainer.padding import padded_pairs
from rlalign.trainer.step import Scores, enable_checkpointing, score, store_support, stored_support
from rlalign.trainer.support import SupportStore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Arrays = Sequence[np.ndarray]
_Weights = tuple[Tensor | None, dict[str, Metric]]
# sets this purpose apart from others of the same run seed
_GENERATORS = 0x7261696E


@dataclass(frozen=True, slots=True)
class AccumulateResult:
    """train_logprobs: float32 [L] per sample in the caller's order, the exact bits of the forward that was trained on.

    parts: metrics with their reduction, for ``merge_updates`` with those of other minibatches; metrics: the numbers.
    """

    train_logprobs: list[np.ndarray]
    parts: dict[str, Metric] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        return values(self.parts)


@dataclass(frozen=True, slots=True)
class _Inputs:
    """What the losses need besides the forward; arrays float32 [L] per sample in the caller's order."""

    advantages: Arrays
    old_logprobs: Arrays | None
    ref_logprobs: Arrays | None
    values: Arrays | None
    returns: Arrays | None
    denominators: Denominators


class Trainer:
    """One policy under training; with ``adv_estimator=gae`` its critic too, with ``kl_coef > 0`` its reference."""

    def __init__(
        self,
        policy: Policy,
        config: TrainerConfig,
        algorithm: AlgorithmConfig,
        *,
        total_steps: int,
        critic: Critic | None = None,
        reference: Policy | None = None,
        eos_ids: Collection[int] | None = None,
        seed: int = 0,
        correction: Correction | None = None,
    ) -> None:
        """``total_steps``: optimizer updates of the whole run (steps * epochs * minibatches).

        seed: of the global generators as a loss of the user's own meets them; nothing here draws from them.
        eos_ids: ids at which the engine ends a response; needed to score samples drawn with ``min_tokens``.
        correction: of algorithms/corrections.py; None: none, and no rollout log-prob is ever looked at.
        Raises ValueError when a critic or reference is missing, or given where nothing would use it.
        """
        _require_both("adv_estimator", algorithm.adv_estimator, algorithm.adv_estimator == "gae", "critic", critic)
        _require_both("kl_coef", algorithm.kl_coef, algorithm.kl_coef > 0, "reference", reference)
        self.policy, self.config, self.algorithm = policy, config, algorithm
        self.critic, self.reference, self.eos_ids = critic, reference, eos_ids
        self.correction = correction
        parameters = trainable_parameters(policy.model)
        self.optimizers = {"optimizer": MasterAdamW(parameters, config, total_steps=total_steps)}
        if critic is not None:
            critic_config = replace(config, lr=algorithm.critic_lr)
            self.optimizers["critic"] = MasterAdamW(critic.named_parameters(), critic_config, total_steps=total_steps)
        if config.gradient_checkpointing:
            for model in [policy.model] + ([critic.backbone.model] if critic else []):
                enable_checkpointing(model)
        self._supports = SupportStore()
        self._generators = Generators(derive_seed(seed, _GENERATORS))

    @property
    def version(self) -> int:
        """Updates applied so far: the version of the weights."""
        return self.optimizers["optimizer"].num_updates

    def begin_batch(self) -> None:
        """Forget the kept supports of the batch before: the next one starts."""
        self._supports.clear()

    @torch.no_grad()
    def compute_logprobs(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """Train log-probs of every response token, float32 [L] per sample, from token ids alone.

        The supports of truncated samples are stored until ``begin_batch``, and used by everything that follows.
        Raises ValueError for a truncated sample that other weights sampled: its support can't be recomputed.
        """
        result = _empty(samples)
        for batch in self._pack(samples):
            support = self._support(batch, samples)
            scores = score(self.policy, batch, support=support, return_support=support is None)
            if scores.support is not None:
                store_support(batch, samples, scores.support, self._supports)
            batch.scatter(scores.logprob, result)
        return result

    @torch.no_grad()
    def logprobs_of_padded(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        *,
        position_ids: Tensor | None = None,
        response_mask: Tensor | None = None,
        sampling: Sequence[SamplingParams] | None = None,
    ) -> Tensor:
        """Log-probs of a right-, left- or both-side-padded batch, float32 [B, L]: the bits of ``compute_logprobs``.

        All tensors [B, L], ids int64, masks 0/1. position_ids: those that the mask gives, or refused. response_mask:
        the tokens to score, each row's last ones; None scores all but a row's first. Elsewhere the result is 0.
        sampling: one per row, None for temperature 1; supports are recomputed under the weights of now.
        Raises ValueError naming the argument, or the row, that doesn't fit.
        """
        pairs, indices = padded_pairs(
            input_ids,
            attention_mask,
            position_ids=position_ids,
            response_mask=response_mask,
            sampling=sampling,
            eos_ids=self.eos_ids,
        )
        found = [np.empty(0, dtype=np.float32) for _ in pairs]
        for batch in pack(pairs, **self._packing()):
            batch.scatter(score(self.policy, batch).logprob, found)
        result = torch.zeros(input_ids.numel(), dtype=torch.float32)
        result[indices.cpu()] = torch.from_numpy(np.concatenate(found))
        return result.view(input_ids.shape).to(input_ids.device)

    @torch.no_grad()
    def reference_logprobs(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """Log-probs under the frozen reference, float32 [L] per sample, over the *policy's* kept support.

        Both sides of the KL are then distributions over the same ids, and it is finite.
        """
        if self.reference is None:
            raise ValueError("reference=None: this trainer was made without a reference policy")
        unseen = [s for s in samples if s.sampling.truncated and s not in self._supports]
        if unseen:
            self.compute_logprobs(unseen)
        result = _empty(samples)
        for batch in self._pack(samples):
            scores = score(self.reference, batch, support=self._support(batch, samples))
            batch.scatter(scores.logprob, result)
        return result

    @torch.no_grad()
    def compute_values(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """The critic's value of the state before every response token, float32 [L] per sample."""
        if self.critic is None:
            raise ValueError("critic=None: this trainer was made without a critic")
        result = _empty(samples)
        for batch in self._pack(samples):
            batch.scatter(self.critic.values(batch), result)
        return result

    def accumulate(
        self,
        samples: Sequence[Sample],
        advantages: Arrays,
        *,
        old_logprobs: Arrays | None = None,
        ref_logprobs: Arrays | None = None,
        values: Arrays | None = None,
        returns: Arrays | None = None,
        denominators: Denominators | None = None,
    ) -> AccumulateResult:
        """Forward and backward over micro-batches; nothing is updated.

        All arrays float32 [L], one per sample in the caller's order. old_logprobs: of ``compute_logprobs`` before the
        batch's first update; None takes this forward's own, which are the same while no update came in between.
        ref_logprobs: with ``kl_coef`` and ``adv_estimator=grpo`` (GAE takes its KL through the rewards). values,
        returns: of the critic before this batch's first update, with ``gae``. denominators: those of the whole
        optimizer batch; None says that ``samples`` is all of it.
        Raises ValueError naming the argument that is missing, too much or of the wrong length, and without
        ``old_logprobs`` for a sample of other weights.
        """
        if denominators is None:
            denominators = Denominators.of([len(sample.completion.token_ids) for sample in samples])
        inputs = _Inputs(advantages, old_logprobs, ref_logprobs, values, returns, denominators)
        self._check(samples, inputs)
        train, parts = _empty(samples), []
        with self._generators:
            for batch in self._pack(samples):
                scores = score(self.policy, batch, support=self._support(batch, samples))
                parts.append(self._backward_policy(batch, scores, samples, inputs))
                batch.scatter(scores.logprob, train)
                if self.critic is not None:
                    parts.append(self._backward_critic(self.critic, batch, inputs))
        return AccumulateResult(train, merge(parts))

    def apply_update(self) -> dict[str, float]:
        """One optimizer step. Returns what ``MasterAdamW.apply`` does, with a critic ``critic/…`` of the same.

        Raises FloatingPointError naming the update when a gradient is not finite; no weight changes then.
        """
        try:
            for optimizer in self.optimizers.values():
                optimizer.finite_grad_norm()
        except FloatingPointError:
            self.discard()
            raise
        metrics = self.optimizers["optimizer"].apply()
        if self.critic is not None:
            metrics |= {f"critic/{name}": value for name, value in self.optimizers["critic"].apply().items()}
        self._generators.commit()
        return metrics

    def discard(self) -> None:
        """Forget accumulated gradients, and the random numbers that were drawn for them."""
        for optimizer in self.optimizers.values():
            optimizer.discard()
        self._generators.rewind()

    def weights(self) -> tuple[dict[str, Tensor], int, str]:
        """Weights in compute dtype (views that later updates change), their version and their SHA-256."""
        return self.policy.named_weights(), self.version, self.policy.weights_hash()

    def masters_sha256(self) -> str:
        """SHA-256 of the policy's float32 masters: sorted name, dtype, shape, bytes; tied weights once."""
        return self.optimizers["optimizer"].masters_sha256()

    def critic_sha256(self) -> str | None:
        """SHA-256 of the critic's masters, None without a critic."""
        return None if self.critic is None else self.optimizers["critic"].masters_sha256()

    def save(
        self,
        path: Path | str,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        data_state: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a whole checkpoint to ``path``, atomically; see ``checkpoint``.

        data_state: the caller's position in its data, as JSON; ``load`` gives it back. Call it between updates.
        """
        with atomic_folder(Path(path)) as folder:
            save_checkpoint(self.policy.model, tokenizer, folder)
            sha256 = self.policy.weights_hash()
            write_state(folder / "trainer", self.optimizers, self._generators, data_state or {}, sha256)

    def load(self, path: Path | str) -> dict[str, Any]:
        """Continue from ``save(path)``, bit for bit; returns its ``data_state``. ValueError where it doesn't fit."""
        folder = existing_folder(Path(path)) / "trainer"
        state = read_state(folder, self.optimizers, self._generators)
        if self.policy.weights_hash() != state["weights_sha256"]:
            raise ValueError(f"{folder}: the restored weights' SHA-256 is not the recorded one (another model.dtype?)")
        self._supports.clear()
        return state["data_state"]

    def _pack(self, samples: Sequence[Sample]) -> list[PackedBatch]:
        return pack_samples(samples, eos_ids=self.eos_ids, **self._packing())

    def _packing(self) -> dict[str, Any]:
        return {
            "micro_batch_tokens": self.config.micro_batch_tokens,
            "vocab_size": self.policy.vocab_size,
            "max_positions": self.policy.max_positions,
            "device": self.policy.device,
        }

    def _support(self, batch: PackedBatch, samples: Sequence[Sample]) -> Tensor | None:
        """The stored supports, or None where the policy may recompute them: under the weights that sampled, only."""
        support = stored_support(batch, samples, self._supports)
        if support is None:
            for index, truncated in zip(batch.owners, batch.truncated, strict=True):
                if truncated and samples[index].completion.weights_version != self.version:
                    raise ValueError(
                        f"sample {samples[index].key} was sampled by weights version "
                        f"{samples[index].completion.weights_version}, the trainer is at {self.version}: its kept "
                        "support can't be recomputed. Call compute_logprobs before the batch's first update"
                    )
        return support

    def _check(self, samples: Sequence[Sample], inputs: _Inputs) -> None:
        gae = self.algorithm.adv_estimator == "gae"
        wanted = {
            "advantages": (True, inputs.advantages),
            "old_logprobs": (inputs.old_logprobs is not None, inputs.old_logprobs),
            "ref_logprobs": (self.algorithm.kl_coef > 0 and not gae, inputs.ref_logprobs),
            "values": (gae, inputs.values),
            "returns": (gae, inputs.returns),
        }
        for name, (needed, arrays) in wanted.items():
            if needed != (arrays is not None):
                raise ValueError(
                    f"{name} is {'missing' if needed else 'given, but nothing would use it'}: "
                    f"adv_estimator={self.algorithm.adv_estimator}, kl_coef={self.algorithm.kl_coef}"
                )
            if arrays is not None and len(arrays) != len(samples):
                raise ValueError(f"{name} has {len(arrays)} arrays for {len(samples)} samples")
        if inputs.old_logprobs is None:
            self._check_on_policy(samples)

    def _check_on_policy(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            if (sampled_by := sample.completion.weights_version) != self.version:
                raise ValueError(
                    f"old_logprobs is missing: sample {sample.key} was sampled by weights version {sampled_by}, the "
                    f"trainer is at {self.version}. Give those of compute_logprobs before the batch's first update"
                )

    def _backward_policy(
        self, batch: PackedBatch, scores: Scores, samples: Sequence[Sample], inputs: _Inputs
    ) -> dict[str, Metric]:
        config, given = self.algorithm, inputs.old_logprobs
        old = scores.logprob.detach() if given is None else batch.gather("old_logprobs", given)
        weights, correction = self._correction(batch, old, samples)
        tensors = (
            scores.logprob,
            old,
            batch.gather("advantages", inputs.advantages),
            scores.entropy if config.entropy_coef > 0 else scores.entropy.detach(),
        )
        common = {
            "sequence_lengths": batch.sequence_lengths,
            "denominators": inputs.denominators,
            "clip_low": config.clip_low,
            "clip_high": config.clip_high,
            "aggregation": config.aggregation,
            "entropy_coef": config.entropy_coef,
            "weights": weights,
        }
        if config.adv_estimator == "gae":
            loss, metrics = ppo.policy_loss(*tensors, **common)
        else:
            ref = None if inputs.ref_logprobs is None else batch.gather("ref_logprobs", inputs.ref_logprobs)
            loss, metrics = grpo.loss(*tensors, ref_logprobs=ref, kl_coef=config.kl_coef, **common)
        loss.backward()
        self.optimizers["optimizer"].accumulate()
        return metrics | correction

    def _correction(self, batch: PackedBatch, old: Tensor, samples: Sequence[Sample]) -> _Weights:
        if self.correction is None:
            return None, {}
        rollout = batch.gather("rollout log-probs", [sample.completion.logprobs for sample in samples])
        return importance_weights(old, rollout, batch.response_lengths, self.correction)

    def _backward_critic(self, critic: Critic, batch: PackedBatch, inputs: _Inputs) -> dict[str, Metric]:
        loss, metrics = ppo.value_loss(
            critic.values(batch),
            batch.gather("values", inputs.values or []),
            batch.gather("returns", inputs.returns or []),
            denominators=inputs.denominators,
            value_clip=self.algorithm.value_clip,
        )
        loss.backward()
        self.optimizers["critic"].accumulate()
        return metrics


def _empty(samples: Sequence[Sample]) -> list[np.ndarray]:
    """A place for every sample's result; one without a response token keeps its empty array."""
    return [np.empty(0, dtype=np.float32) for _ in samples]


def _require_both(setting: str, value: object, needed: bool, name: str, given: object | None) -> None:
    if needed != (given is not None):
        raise ValueError(f"{setting}={value} {'needs a' if needed else 'would not use the'} {name}")
