"""AdamW on float32 masters and gradient accumulators; module parameters hold the compute dtype.

With gradient g (scaled by min(1, grad_clip / norm)), update number t from 1 and learning rate lr:

    m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2
    w = w (1 - lr weight_decay)                                     matrices only
    w = w - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

and each module parameter becomes w rounded to its dtype. Everything walks parameters in order of name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rlalign.algorithms.schedules import learning_rate
from rlalign.config import TrainerConfig
from rlalign.modeling import hash_tensors

_STATE = ("master", "exp_avg", "exp_avg_sq")


def trainable_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """What an optimizer should own, by name, tied weights once: a frozen parameter must not even decay."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


class MasterAdamW:
    """The optimizer of one model. Give it ``trainable_parameters(module)``."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: TrainerConfig, *, total_steps: int) -> None:
        """``total_steps``: updates of the whole run, for the schedule."""
        self.config = config
        self.total_steps = total_steps
        self.num_updates = 0
        self._parameters = dict(sorted(parameters.items()))
        self.masters = {name: p.detach().to(torch.float32, copy=True) for name, p in self._parameters.items()}
        self._gradients = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        self._exp_avg = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        self._exp_avg_sq = {name: torch.zeros_like(master) for name, master in self.masters.items()}
        self._has_gradient = False

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add every ``p.grad`` to its float32 accumulator and free it: call once per micro-batch."""
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self._gradients[name] += parameter.grad
                parameter.grad = None
        self._has_gradient = True

    def discard(self) -> None:
        """Forget what was accumulated."""
        for name, parameter in self._parameters.items():
            self._gradients[name].zero_()
            parameter.grad = None
        self._has_gradient = False

    @torch.no_grad()
    def grad_norm(self) -> float:
        """Global 2-norm of the accumulators, squares summed in float64, parameters in order of name."""
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in self._gradients.values()]
        total = 0.0
        for norm in torch.stack(norms).tolist():  # one wait for a GPU, not one per parameter
            total += norm**2
        return math.sqrt(total)

    def finite_grad_norm(self) -> float:
        """``grad_norm()``, or FloatingPointError naming the update when it is NaN or infinite."""
        norm = self.grad_norm()
        if not math.isfinite(norm):
            raise FloatingPointError(f"gradient norm is {norm} at update {self.num_updates}: nothing was updated")
        return norm

    @torch.no_grad()
    def apply(self) -> dict[str, float]:
        """One update from what was accumulated, which is then forgotten.

        Returns ``grad_norm`` (unclipped), ``lr``, and ``weights_changed_frac``: the share of the module parameters'
        elements that have another value now, for a float32 step may be too small for their dtype.
        Raises RuntimeError when nothing was accumulated, FloatingPointError when the norm is not finite; masters,
        moments and parameters are untouched then.
        """
        if not self._has_gradient:
            raise RuntimeError("apply() without a gradient: accumulate() at least one micro-batch first")
        norm, lr = self.finite_grad_norm(), self.learning_rate()
        self.num_updates += 1
        scale = self.config.grad_clip / norm if norm > self.config.grad_clip else None
        for name in self.masters:
            self._update(name, lr, scale)
        changed = self.copy_to_parameters()
        self.discard()
        return {"grad_norm": norm, "lr": lr, "weights_changed_frac": changed}

    def learning_rate(self) -> float:
        """Learning rate of the next update."""
        config = self.config
        return learning_rate(
            self.num_updates,
            base=config.lr,
            total_steps=self.total_steps,
            warmup_steps=config.warmup_steps,
            schedule=config.schedule,
            min_lr_ratio=config.min_lr_ratio,
        )

    def _update(self, name: str, lr: float, scale: float | None) -> None:
        config, master, gradient = self.config, self.masters[name], self._gradients[name]
        if scale is not None:
            gradient.mul_(scale)
        exp_avg = self._exp_avg[name].mul_(config.beta1).add_(gradient, alpha=1.0 - config.beta1)
        exp_avg_sq = self._exp_avg_sq[name].mul_(config.beta2).addcmul_(gradient, gradient, value=1.0 - config.beta2)
        denominator = exp_avg_sq.div(1.0 - config.beta2**self.num_updates).sqrt_().add_(config.eps)
        # Norm weights and biases scale the function directly: decaying them towards 0 is not a prior anyone wants.
        if master.dim() >= 2 and config.weight_decay > 0.0:
            master.mul_(1.0 - lr * config.weight_decay)
        master.addcdiv_(exp_avg, denominator, value=-lr / (1.0 - config.beta1**self.num_updates))

    @torch.no_grad()
    def copy_to_parameters(self) -> float:
        """Round the masters into the module parameters, in place. Returns the share of elements that changed."""
        counts = []
        for name, parameter in self._parameters.items():
            rounded = self.masters[name].to(parameter.dtype)
            counts.append(torch.count_nonzero(rounded != parameter))
            parameter.copy_(rounded)
        # one wait for a GPU, not one per parameter
        return int(torch.stack(counts).sum()) / sum(parameter.numel() for parameter in self._parameters.values())

    def masters_sha256(self) -> str:
        """SHA-256 over name, dtype, shape and bytes of every master in order of name."""
        return hash_tensors(self.masters)

    def state(self) -> dict[str, Tensor]:
        """Masters and moments, float32, named ``<kind>/<parameter>``. RuntimeError in the middle of an update."""
        if self._has_gradient:
            raise RuntimeError("gradients are accumulated but not applied: a checkpoint is taken between updates")
        kinds = zip(_STATE, (self.masters, self._exp_avg, self._exp_avg_sq), strict=True)
        return {f"{kind}/{name}": tensor for kind, tensors in kinds for name, tensor in tensors.items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor], *, num_updates: int) -> None:
        """Restore ``state()`` bit for bit, module parameters included. ValueError where it doesn't fit."""
        self.discard()
        ours = self.state()
        if odd := sorted(ours.keys() ^ state.keys()):
            raise ValueError(f"optimizer state differs from the model's in {len(odd)} names, first {odd[0]!r}")
        for name, mine in ours.items():
            theirs = state[name]
            if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
                raise ValueError(
                    f"optimizer state {name!r}: got {theirs.dtype} {tuple(theirs.shape)}, "
                    f"need {mine.dtype} {tuple(mine.shape)}"
                )
        for name, mine in ours.items():
            mine.copy_(state[name])
        self.num_updates = num_updates
        self.copy_to_parameters()
