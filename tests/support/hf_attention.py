"""What the tests of attn_implementation="rlalign" start from: a model twice, ids, masks, and one attention alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import create_causal_mask

from rlalign.modeling import register_attention
from support.models import tiny_model

CLOSE = {"rtol": 0, "atol": 3e-5}
LENGTH = 20


def pair(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same model on eager attention and on ours."""
    eager = tiny_model(family)
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("rlalign")
    return eager, ours


def tokens(rows: int = 3, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(0))


def padding(side: str, ids: torch.Tensor) -> torch.Tensor | None:
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, :7] = 0
        mask[2, :1] = 0
    if side == "right":
        mask[0, -7:] = 0
        mask[2, -1:] = 0
    return None if side == "none" else mask


def attention(backend: str | None = None, **inputs: Any) -> torch.Tensor:
    """Our function as transformers calls it: q [B, Hq, T, D] … → [B, T, Hq, D]."""
    register_attention(backend)
    mask = inputs.pop("attention_mask", None)
    out, weights = AttentionInterface()["rlalign"](
        torch.nn.Identity(), inputs.pop("query"), inputs.pop("key"), inputs.pop("value"), mask, **inputs
    )
    assert weights is None
    return out


def qkv(rows: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    heads = {"query": 4, "key": 2, "value": 2}
    return {name: torch.randn(rows, n, length, 16, generator=generator) for name, n in heads.items()}


def masked(model: PreTrainedModel, mask: torch.Tensor) -> torch.Tensor:
    """What transformers hands to our attention for this mask."""
    return create_causal_mask(
        config=model.config, inputs_embeds=torch.empty(*mask.shape, 0), attention_mask=mask, past_key_values=None
    )
