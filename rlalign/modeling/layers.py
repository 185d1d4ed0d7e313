"""Module forwards on our operators.

A module is aligned by changing its class to a subclass made here: parameters, names, hooks, ``isinstance`` checks and
``state_dict`` stay as they were. ``rlalign_backend`` on the instance names the backend.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from rlalign_kernels import geglu, gelu, layer_norm, linear, rms_norm, rotary_cos_sin, silu, swiglu
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

if TYPE_CHECKING:
    from rlalign.modeling.fused import FusedProjection


class AlignedModule:
    """Base of every aligned class; subclasses define ``forward`` and attributes set by ``become``."""

    rlalign_backend: str


class AlignedLinear(AlignedModule):
    rlalign_fused: tuple[FusedProjection, int] | None = None
    """What computes it together with others where no gradient is wanted, and which of them it is (fused.py)."""

    def forward(self, input: Tensor) -> Tensor:  # nn.Linear's name: callers may pass it by keyword
        if self.rlalign_fused is not None and not torch.is_grad_enabled():
            fused, index = self.rlalign_fused
            if (out := fused.part(index, self.weight, self.bias, input)) is not None:
                return out
        return linear(input, self.weight, self.bias, backend=self.rlalign_backend)


class AlignedRMSNorm(AlignedModule):
    rlalign_eps: float
    rlalign_weight_offset: float
    rlalign_cast_before_weight: bool

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(
            hidden_states,
            self.weight,
            eps=self.rlalign_eps,
            weight_offset=self.rlalign_weight_offset,
            cast_before_weight=self.rlalign_cast_before_weight,
            backend=self.rlalign_backend,
        )


class AlignedLayerNorm(AlignedModule):
    rlalign_eps: float

    def forward(self, input: Tensor) -> Tensor:  # nn.LayerNorm's name
        # OLMo's has neither of them
        weight, bias = getattr(self, "weight", None), getattr(self, "bias", None)
        return layer_norm(input, weight, bias, eps=self.rlalign_eps, backend=self.rlalign_backend)


class AlignedRotary(AlignedModule):
    rlalign_cast: bool
    """Whether cos and sin are rounded to the hidden states' dtype (Llama) or stay float32 (OLMo-2)."""
    rlalign_longest: int | None
    """Positions that the frequencies are right for; None for all."""

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        if self.inv_freq.dtype != torch.float32:
            raise ValueError(
                f"inv_freq.dtype={self.inv_freq.dtype}: rotary frequencies must stay float32; load the model with "
                "dtype=… rather than casting it afterwards"
            )
        return rotary_cos_sin(
            position_ids,
            self.inv_freq,
            attention_scaling=self.attention_scaling,
            dtype=x.dtype if self.rlalign_cast else torch.float32,
            backend=self.rlalign_backend,
        )


class AlignedSiLU(AlignedModule):
    def forward(self, input: Tensor) -> Tensor:
        return silu(input, backend=self.rlalign_backend)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """The bits of ``self(gate) * up`` in one operator."""
        return swiglu(gate, up, backend=self.rlalign_backend)


class AlignedGELU(AlignedModule):
    rlalign_approximate: str

    def forward(self, input: Tensor) -> Tensor:
        return gelu(input, approximate=self.rlalign_approximate, backend=self.rlalign_backend)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """The bits of ``self(gate) * up`` in one operator."""
        return geglu(gate, up, approximate=self.rlalign_approximate, backend=self.rlalign_backend)


class AlignedGatedMLP(AlignedModule):
    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        if not _unheard(self.act_fn):
            return super().forward(*args, **kwargs)  # activation and product apart: the same bits
        (x,) = (*args, *kwargs.values())
        return self.down_proj(self.act_fn.gated(self.gate_proj(x), self.up_proj(x)))


def _unheard(activation: nn.Module) -> bool:
    """Whether it is one of ours that nobody has hooked or replaced."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    heard = any(getattr(activation, name) for name in hooks) or _has_any_global_hook()
    return isinstance(activation, AlignedSiLU | AlignedGELU) and "forward" not in vars(activation) and not heard


@cache
def _aligned_class(mixin: type[AlignedModule], original: type[nn.Module]) -> type[nn.Module]:
    return type(f"Aligned{original.__name__}", (mixin, original), {"__module__": __name__})


def become(module: nn.Module, mixin: type[AlignedModule], backend: str, **attributes: object) -> None:
    """Turn ``module`` into its aligned self, in place."""
    module.__class__ = _aligned_class(mixin, type(module))
    module.rlalign_backend = backend
    for name, value in attributes.items():
        setattr(module, f"rlalign_{name}", value)
