"""The operators' shapes of a Hugging Face causal LM, from its config alone: no weight is read or made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rlalign_kernels.claims import AttentionShape, Shapes
from torch import nn


def model_shapes(path: Path) -> Shapes:
    """Of the model in folder ``path``, or of a config.json. Raises FileNotFoundError, ValueError for another thing."""
    # transformers takes seconds to import
    from transformers import AutoConfig, AutoModelForCausalLM

    from rlalign.modeling.fused import fused_shapes

    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"--model {path}: no config.json there")
    config = AutoConfig.from_pretrained(file, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"--model {path}: {type(model).__name__} has no output layer")
    modules = list(model.modules())
    linear = {tuple(m.weight.shape) for m in modules if isinstance(m, nn.Linear) and m is not head}
    linear |= fused_shapes(model)  # what an engine computes; a trainer, which wants gradients, computes the others
    norm = {size for m in modules if type(m).__name__.endswith("Norm") and (size := _row_length(m))}
    text = config.get_text_config()
    return Shapes(
        tuple(sorted(linear)),
        tuple(head.weight.shape),
        (_attention(text),),
        tuple(sorted(norm, reverse=True)) or (head.weight.shape[1],),
        _field(text, "intermediate_size", 4 * text.hidden_size),
    )


def _attention(config: Any) -> AttentionShape:
    heads = config.num_attention_heads
    head_dim = _field(config, "head_dim", config.hidden_size // heads)
    value_dim = _field(config, "v_head_dim", head_dim)
    return AttentionShape(heads, _field(config, "num_key_value_heads", heads), head_dim, value_dim)


def _row_length(norm: nn.Module) -> int | None:
    """Channels that it normalises; None if it does not say. OLMo's has no weight, and PyTorch's may have none."""
    if (weight := getattr(norm, "weight", None)) is not None:
        return weight.shape[-1]
    return (getattr(norm, "normalized_shape", None) or (None,))[-1]


def _field(config: Any, name: str, default: int) -> int:
    """Absent in some configs, null in others."""
    return getattr(config, name, None) or default
