"""The trainer in a process of its own. It holds one batch at a time; calls after ``begin_batch`` refer to it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rlalign_kernels import CONFORMANCE, Fingerprint

from rlalign.actors.faults import flip_weight_bit, position_fault
from rlalign.actors.inspection import Inspector, What, packed
from rlalign.actors.peak import peak_tflops
from rlalign.actors.process import plan_of, policy_settings, set_up, settle
from rlalign.actors.shared_memory import SharedBuffer, SharedWeights
from rlalign.actors.weight_sync import Transport, WeightBundle, bundle_weights
from rlalign.config import Config
from rlalign.modeling import checksum_tensors, eos_ids, load_policy, load_tokenizer, save_checkpoint
from rlalign.records import Sample
from rlalign.trainer import AccumulateResult, Critic, Trainer
from rlalign.trainer.checkpoint import atomic_folder

Arrays = list[np.ndarray]


class TrainerActor:
    """Wraps a Trainer. Arrays are float32 [L], one per sample of the batch, in its order."""

    def __init__(self, threads: int) -> None:
        set_up(threads)
        self._trainer: Trainer | None = None
        self._inspector: Inspector | None = None
        self._samples: list[Sample] = []
        self._shift_position = False
        self._shared, self._trial = SharedBuffer(), SharedBuffer()

    def load(self, config: Config, checkpoint: Path, total_updates: int) -> Fingerprint:
        """Load the checkpoint, with a critic or a reference where the algorithm needs one; returns the plan."""
        settings = policy_settings(config)
        algorithm = config.algorithm
        self._tokenizer = load_tokenizer(checkpoint)
        policy = load_policy(checkpoint, **settings)
        self._trainer = Trainer(
            policy,
            config.trainer,
            algorithm,
            total_steps=total_updates,
            seed=config.run.seed,
            eos_ids=eos_ids(self._tokenizer, policy.model),
            critic=Critic(load_policy(checkpoint, **settings)) if algorithm.adv_estimator == "gae" else None,
            reference=load_policy(checkpoint, **settings) if algorithm.kl_coef > 0 else None,
            correction=config.align.correction,
        )
        self._inspector = Inspector(policy, packed)
        self._peak = peak_tflops(config, policy.device.type)
        settle()
        return plan_of(config)

    def compute(self) -> dict[str, Any]:
        """How large the policy and the critic are (``Policy.size``), and what this device multiplies at most."""
        critic = self.trainer.critic
        sizes = {"policy": self.trainer.policy.size(), "critic": None if critic is None else critic.backbone.size()}
        return {**sizes, "peak_tflops": self._peak}

    def begin_batch(self, samples: Sequence[Sample]) -> int:
        """Hold these samples until the next call; returns the weights' version, the updates applied so far."""
        self._samples = list(samples)
        self.trainer.begin_batch()
        return self.trainer.version

    def compute_logprobs(self) -> Arrays:
        """Train log-probs of the batch, from a forward of their own."""
        with self._fault():
            return self.trainer.compute_logprobs(self._samples)

    def reference_logprobs(self) -> Arrays:
        """Log-probs of the batch under the initial policy."""
        return self.trainer.reference_logprobs(self._samples)

    def compute_values(self) -> Arrays:
        """The critic's values of the batch."""
        return self.trainer.compute_values(self._samples)

    def accumulate(self, indices: Sequence[int], advantages: Arrays, **arrays: Arrays | None) -> AccumulateResult:
        """Forward and backward over some samples of the batch: one optimizer batch. Changes no weight."""
        chosen = {name: None if values is None else [values[i] for i in indices] for name, values in arrays.items()}
        with self._fault():
            return self.trainer.accumulate(
                [self._samples[i] for i in indices], [advantages[i] for i in indices], **chosen
            )

    def apply_update(self) -> dict[str, float]:
        """One optimizer step."""
        return self.trainer.apply_update()

    def discard(self) -> None:
        """Forget gradients that were accumulated."""
        self.trainer.discard()

    def weights(self, transport: Transport) -> tuple[WeightBundle | SharedWeights, tuple[int, str]]:
        """Compute-dtype weights, to be handed to the engines; their version, and what each of them checks:

        their SHA-256, or on a GPU a checksum that it computes.
        """
        policy, version = self.trainer.policy, self.trainer.version
        if transport == "cuda_ipc":
            shared = self._shared.publish(policy.named_weights(), version)
            return shared, (version, shared.checksum)
        if policy.device.type == "cuda":
            checksum = checksum_tensors(policy.named_weights())
            return bundle_weights(policy.named_weights(), version, checksum=checksum), (version, checksum)
        weights, version, sha256 = self.trainer.weights()
        return bundle_weights(weights, version, sha256), (version, sha256)

    def shared_sha256(self) -> str:
        """SHA-256 of the weights that the engines were given last by "cuda_ipc"."""
        return self._shared.sha256()

    def offer_memory(self) -> SharedWeights | str:
        """A little of this process's GPU memory, for others to try whether they can read it; or why it can't be."""
        try:
            return self._trial.publish({"trial": torch.arange(4096, device=self.trainer.policy.device)}, 0)
        except RuntimeError as error:  # of torch or CUDA, whatever the system does not allow
            return f"the trainer can't share its memory: {error}"

    def masters_sha256(self) -> dict[str, str | None]:
        """SHA-256 of the float32 masters: ``policy``, and ``critic`` (None without one)."""
        return {"policy": self.trainer.masters_sha256(), "critic": self.trainer.critic_sha256()}

    def save(self, path: Path, data_state: dict[str, Any]) -> None:
        """Write a whole checkpoint, atomically."""
        self.trainer.save(path, tokenizer=self._tokenizer, data_state=data_state)

    def save_weights(self, path: Path) -> dict[str, Any]:
        """Write the weights alone, as they are at this moment of a step; returns their version and SHA-256."""
        _, version, sha256 = self.trainer.weights()
        with atomic_folder(path) as folder:
            save_checkpoint(self.trainer.policy.model, self._tokenizer, folder)
        return {"version": version, "sha256": sha256}

    def resume(self, path: Path) -> dict[str, Any]:
        """Continue from ``save(path)``; returns its data state."""
        return self.trainer.load(path)

    def plant_fault(self, kind: str) -> str:
        """A fault in this process, at once (trainer_weight) or in the next forward (position); returns where."""
        if kind == "trainer_weight":
            return flip_weight_bit(self.trainer.policy)
        self._shift_position = True
        return "position of one token in the next forward"

    def inspect(self, what: What, *args: Any) -> Any:
        """One of the checks of ``inspection.Inspector``, on the trainer's weights of this moment."""
        if self._inspector is None:
            raise RuntimeError("load() comes first")
        return getattr(self._inspector, what)(*args)

    def conformance(self) -> dict[str, Any]:
        """What this process found out about its machine, JSON-ready."""
        return CONFORMANCE.report()

    @property
    def trainer(self) -> Trainer:
        if self._trainer is None:
            raise RuntimeError("load() comes first")
        return self._trainer

    @contextlib.contextmanager
    def _fault(self) -> Any:
        planted, self._shift_position = self._shift_position, False
        with position_fault(self.trainer.policy) if planted else contextlib.nullcontext():
            yield
