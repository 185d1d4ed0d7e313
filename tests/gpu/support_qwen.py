"""Models of Qwen3's shapes with random weights, and requests for them."""

from __future__ import annotations

import math
import random

import torch
from support.engines import MIXED_SAMPLING
from transformers import AutoModelForCausalLM, Qwen3Config

from rlalign.config import SamplingParams
from rlalign.modeling import Policy, align

DEVICE = torch.device("cuda")
SIZES = {
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072},
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144},
}


def random_qwen(size: str, num_layers: int, seed: int = 0, backend: str | None = None) -> Policy:
    """Qwen3 of that size, aligned on the GPU. Its final norm is enlarged, so that some tokens are far likelier."""
    config = Qwen3Config(
        vocab_size=151936, num_hidden_layers=num_layers, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
        max_position_embeddings=40960, tie_word_embeddings=True, rope_theta=1e6, rms_norm_eps=1e-6, eos_token_id=None,
        bos_token_id=None, **SIZES[size],
    )  # fmt: skip
    torch.manual_seed(seed)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        model.model.norm.weight.mul_(8)
    return Policy(align(model.to(DEVICE), backend=backend))


def workload(count: int, longest: int, vocab_size: int) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of lengths even in their logarithm, a few long responses, every way of sampling in turn."""
    rng = random.Random(0)
    prompts, params = [], []
    for index in range(count):
        num_response = rng.choices((rng.randint(1, 32), min(200, longest // 2)), (15, 1))[0]
        num_prompt = min(int(math.exp(rng.uniform(0, math.log(longest)))), longest - num_response)
        prompts.append([rng.randrange(vocab_size) for _ in range(num_prompt)])
        settings = MIXED_SAMPLING[index % len(MIXED_SAMPLING)]
        params.append(SamplingParams(**settings, max_tokens=num_response, seed=rng.randrange(2**64)))
    return prompts, params
