"""A small Qwen3 made on the spot, for runs that need neither a download nor a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rlalign.config import ModelConfig
from rlalign.modeling.loading import save_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_tiny_model(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, path: Path | str, *, seed: int
) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3 for ``tokenizer``'s vocabulary, saved with it under ``path``.

    The same config and seed give the same weights; torch's global generator is left as it was.
    """
    qwen = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=True,
        rope_theta=10_000.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=config.dtype,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(qwen)
    model = model.to(getattr(torch, config.dtype))
    save_checkpoint(model, tokenizer, path)
    return model
