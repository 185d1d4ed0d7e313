"""The value model of PPO: its own aligned backbone, a float32 head, its own optimizer. Never synced to rollout."""

from __future__ import annotations

import torch
from rlalign_kernels import linear
from torch import Tensor, nn

from rlalign.modeling import Policy
from rlalign.trainer.optimizer import trainable_parameters
from rlalign.trainer.packing import PackedBatch
from rlalign.trainer.step import response_hidden


class Critic:
    """Value of the state before each response token.

    ``backbone`` is a Policy of its own (usually a second load of the policy's checkpoint); its output embedding is
    not used and, unless tied, not trained. The head starts at 0, so every first value is exactly 0.
    """

    def __init__(self, backbone: Policy) -> None:
        self.backbone = backbone
        hidden_size = backbone.head.weight.shape[1]
        self.head_weight = nn.Parameter(torch.zeros(1, hidden_size, dtype=torch.float32, device=backbone.device))
        self.head_bias = nn.Parameter(torch.zeros(1, dtype=torch.float32, device=backbone.device))
        used = {id(parameter) for parameter in backbone.model.base_model.parameters()}
        for parameter in backbone.model.parameters():
            parameter.requires_grad_(id(parameter) in used)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """What the critic's optimizer trains, by name; tied weights once."""
        backbone = trainable_parameters(self.backbone.model)
        return {
            **{f"backbone.{name}": p for name, p in backbone.items()},
            "head.weight": self.head_weight,
            "head.bias": self.head_bias,
        }

    def values(self, batch: PackedBatch) -> Tensor:
        """Values float32 [N] of a micro-batch's response tokens; grad flows unless torch.no_grad."""
        hidden = response_hidden(self.backbone, batch).float()
        return linear(hidden, self.head_weight, self.head_bias, backend=self.backbone.backend).squeeze(-1)
