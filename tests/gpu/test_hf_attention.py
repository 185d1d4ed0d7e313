"""attn_implementation="rlalign" on the Triton kernels, against eager attention; bits; and where the host waits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.models import tiny_model
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from rlalign.modeling import register_attention

FAMILIES = ("llama", "qwen3", "mistral", "gemma2")
CLOSE = {torch.float32: {"rtol": 0, "atol": 2e-4}, torch.bfloat16: {"rtol": 0, "atol": 0.25}}
LENGTHS = (300, 129, 1, 257)
LONGEST = max(LENGTHS)


@pytest.fixture(autouse=True)
def registered():
    register_attention()


def pair(family: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedModel]:
    eager = tiny_model(family, dtype).to("cuda")
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("rlalign")
    return eager, ours


def tokens(rows: int = 4, length: int = 40) -> torch.Tensor:
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(0)).cuda()


def padding(side: str, lengths: tuple[int, ...], width: int) -> torch.Tensor:
    """Int [B, width], 1 where a token is."""
    at = torch.arange(width, device="cuda")
    n = torch.tensor(lengths, device="cuda")[:, None]
    return (at >= width - n).long() if side == "left" else (at < n).long()


def qkv(rows: int, queries: int, keys: int | None = None, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    keys = queries if keys is None else keys
    shapes = {"query": (rows, 8, queries, 128), "key": (rows, 2, keys, 128), "value": (rows, 2, keys, 128)}
    return {name: torch.randn(shape, generator=generator).to("cuda", dtype) for name, shape in shapes.items()}


def attention(mask: torch.Tensor | None = None, **inputs: Any) -> torch.Tensor:
    q, k, v = (inputs.pop(name) for name in ("query", "key", "value"))
    return AttentionInterface()["rlalign"](torch.nn.Identity(), q, k, v, mask, **inputs)[0]


def offsets(**given: Any) -> torch.Tensor:
    return AttentionMaskInterface()["rlalign"](device="cuda", **given)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_eager_attention(family, side, dtype):
    mask = padding(side, (40, 33, 1, 12), 40)
    expected, found = (model(tokens(), attention_mask=mask).logits.float() for model in pair(family, dtype))
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE[dtype])


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_generates_what_eager_attention_generates(family, padded, cache):
    mask = padding("left", (40, 33, 1, 12), 40) if padded else None
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    settings |= {"return_dict_in_generate": True, "cache_implementation": cache, "disable_compile": True}
    expected, found = (model.generate(tokens(), attention_mask=mask, **settings) for model in pair(family))
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), **CLOSE[torch.float32])


def test_generates_compiled_what_it_generates_eagerly():
    """With a static cache transformers compiles the forward by itself."""
    _, ours = pair("llama")
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    mask = padding("left", (40, 33, 1, 12), 40)
    found, expected = (
        ours.generate(tokens(), attention_mask=mask, disable_compile=off, **settings) for off in (False, True)
    )
    torch._dynamo.reset()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_eager_attention(family):
    mask = padding("left", (40, 33, 1, 12), 40)
    cotangent = torch.randn(4, 40, 97, generator=torch.Generator().manual_seed(5)).cuda() * mask[..., None]
    models = pair(family)
    for model in models:
        (model(tokens(), attention_mask=mask, use_cache=False).logits * cotangent).sum().backward()
    for (name, theirs), (_, mine) in zip(*(model.named_parameters() for model in models), strict=True):
        error = (mine.grad - theirs.grad).norm() / theirs.grad.norm().clamp_min(1e-12)
        assert error < 1e-3, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_has_the_bits_of_its_sequence_alone(side, window):
    mask = padding(side, LENGTHS, LONGEST).bool()
    inputs = qkv(len(LENGTHS), LONGEST)
    for x in inputs.values():
        x.transpose(1, 2)[~mask] = torch.nan  # and what is in the padding reaches nothing
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    given = {"batch_size": len(LENGTHS), "q_length": LONGEST, "kv_length": LONGEST}
    together = attention(offsets(**given, attention_mask=mask), **inputs, sliding_window=window)
    cotangent = torch.randn(together.shape, generator=torch.Generator().manual_seed(2)).to(together)
    grads = torch.autograd.grad(together, list(inputs.values()), cotangent)
    for row, real in enumerate(mask):
        alone = {name: x[row : row + 1, :, real].detach().requires_grad_() for name, x in inputs.items()}
        out = attention(**alone, sliding_window=window)
        assert torch.equal(out[0], together[row][real])
        own = torch.autograd.grad(out, list(alone.values()), cotangent[row : row + 1, real])
        for mine, theirs in zip(own, grads, strict=True):
            assert torch.equal(mine[0], theirs[row][:, real])
            assert not theirs[row][:, ~real].any()
        assert not together[row][~real].any()


def test_packed_and_decoded_rows_have_the_bits_of_prefill():
    inputs = qkv(1, 1100)
    whole = attention(**inputs)
    cu = torch.tensor([0, 300, 1100], dtype=torch.int32, device="cuda")
    both = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 800, "max_length_k": 800}
    packed = attention(**inputs, **both)
    assert torch.equal(packed[:, :300], whole[:, :300])
    second = attention(**{name: x[:, :, 300:] for name, x in inputs.items()})
    assert torch.equal(packed[:, 300:], second)
    for length in (1, 127, 128, 129, 1024, 1025, 1100):
        step = {name: x[:, :, :length] for name, x in inputs.items()} | {"query": inputs["query"][:, :, [length - 1]]}
        assert torch.equal(attention(**step)[:, 0], whole[:, length - 1])


def test_sinks_have_gradients():
    inputs = qkv(2, 60, dtype=torch.float32)
    sinks = torch.randn(8, generator=torch.Generator().manual_seed(3)).cuda().requires_grad_()
    out = attention(**inputs, s_aux=sinks)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).cuda()
    (found,) = torch.autograd.grad(out, sinks, cotangent)
    q, k, v = (x.double() for x in inputs.values())
    k, v = (x.repeat_interleave(4, dim=1) for x in (k, v))
    logit = sinks.detach().double().requires_grad_()
    scores = (q @ k.transpose(2, 3) * 128**-0.5).masked_fill(torch.ones(60, 60).triu(1).bool().cuda(), -torch.inf)
    scores = torch.cat([scores, logit[None, :, None, None].expand(2, -1, 60, 1)], dim=-1)
    truth = (scores.softmax(-1)[..., :-1] @ v).transpose(1, 2)
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=1e-5)
    (expected,) = torch.autograd.grad(truth, logit, cotangent.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_the_host_waits_for_a_mask_only():
    mask = padding("left", (40, 33, 1, 12), 40).bool()
    given = {"batch_size": 4, "q_length": 40}
    made = offsets(**given, kv_length=40, attention_mask=mask)  # the one wait: are there holes?
    inputs, step = qkv(4, 40), qkv(4, 1, 41)
    attention(made, **inputs), attention(**step)  # compiles
    in_cache = torch.tensor(0, device="cuda")
    static = qkv(4, 40, 64)
    try:
        torch.cuda.set_sync_debug_mode("error")
        attention(made, **inputs)
        attention(offsets(**given, kv_length=40), **inputs)
        attention(**step)
        attention(offsets(**given, kv_length=64, q_offset=in_cache), **static)
        with pytest.raises(RuntimeError, match="synchroniz"):
            offsets(**given, kv_length=40, attention_mask=mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_hole_is_refused_by_its_row():
    _, ours = pair("llama")
    mask = torch.ones(4, 40, dtype=torch.long, device="cuda")
    mask[2, 7] = 0
    with pytest.raises(ValueError, match="row 2 has a hole"):
        ours(tokens(), attention_mask=mask)
