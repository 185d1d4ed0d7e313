"""register_attention(): attn_implementation="rlalign" against transformers' own eager attention, and its bits."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from support.models import tiny_model
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GptOssConfig,
    Llama4TextConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    StaticCache,
)
from transformers.masking_utils import create_causal_mask, sliding_window_causal_mask_function

from rlalign.modeling import align, register_attention

CLOSE = {"rtol": 0, "atol": 3e-5}
LENGTH = 20


@pytest.fixture(autouse=True)
def registered():
    register_attention()
    yield
    register_attention()


def pair(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same model on eager attention and on ours."""
    eager = tiny_model(family)
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("rlalign")
    return eager, ours


def tokens(rows: int = 3, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def padding(side: str, ids: torch.Tensor) -> torch.Tensor | None:
    mask = torch.ones_like(ids)
    if side == "left":
        mask[0, :7] = 0
        mask[2, :1] = 0
    if side == "right":
        mask[0, -7:] = 0
        mask[2, -1:] = 0
    return None if side == "none" else mask


def attention(backend: str | None = None, module: Any = None, **inputs: Any) -> torch.Tensor:
    """Our function as transformers calls it: q [B, Hq, T, D] … → [B, T, Hq, D]."""
    register_attention(backend)
    module = module or torch.nn.Identity()
    mask = inputs.pop("attention_mask", None)
    out, weights = AttentionInterface()["rlalign"](
        module, inputs.pop("query"), inputs.pop("key"), inputs.pop("value"), mask, **inputs
    )
    assert weights is None
    return out


def qkv(rows: int, queries: int, keys: int | None = None, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys = queries if keys is None else keys
    shapes = {"query": (rows, 4, queries, 16), "key": (rows, 2, keys, 16), "value": (rows, 2, keys, 16)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_logits_are_those_of_eager_attention(family: str, side: str) -> None:
    eager, ours = pair(family)
    ids = tokens()
    mask = padding(side, ids)
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    expected, found = (model(ids, attention_mask=mask).logits for model in (eager, ours))
    torch.testing.assert_close(found[real], expected[real], **CLOSE)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("side", ["left", "none"])
def test_generates_what_eager_attention_generates(family: str, cache: str | None, side: str) -> None:
    ids = tokens()
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    settings |= {"return_dict_in_generate": True, "cache_implementation": cache, "attention_mask": padding(side, ids)}
    expected, found = (model.generate(ids, **settings) for model in pair(family))
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "a mask that hides nothing"])
def test_position_ids_tell_sequences_apart(family: str, use_cache: bool, masked: bool) -> None:
    eager, ours = pair(family)
    ids, lengths = tokens(1), [5, 9, 6]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    mask = torch.ones_like(ids) if masked else None
    found = ours(ids, attention_mask=mask, position_ids=positions, use_cache=use_cache).logits
    expected = torch.cat([eager(part).logits for part in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(found, expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_position_ids_that_disagree_with_a_padded_row_are_refused(side: str) -> None:
    _, ours = pair("llama")
    ids, mask = tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[1, :3] = 0
    mask = mask if side == "left" else mask.flip(1)
    fits = (mask.cumsum(1) - 1).clamp_min(0)
    ours(ids, attention_mask=mask, position_ids=fits)
    restarts = fits.clone()
    restarts[1, 4:] = torch.arange(4)
    with pytest.raises(ValueError, match="do not ascend by one"):
        ours(ids, attention_mask=mask, position_ids=restarts)


@torch.no_grad()
def test_cumulative_lengths_tell_sequences_apart(family: str) -> None:
    eager, ours = pair(family)
    ids, lengths = tokens(1), [5, 9, 6]
    cu = torch.tensor([0, 5, 14, 20], dtype=torch.int32)
    packed = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 9, "max_length_k": 9, "use_cache": False}
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    expected = torch.cat([eager(part).logits for part in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(ours(ids, position_ids=positions, **packed).logits, expected, **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_are_those_of_eager_attention(family: str, side: str) -> None:
    eager, ours = pair(family)
    ids = tokens()
    mask = padding(side, ids)
    cotangent = torch.randn(*ids.shape, 97, generator=torch.Generator().manual_seed(5)) * mask[..., None]
    for model in (eager, ours):
        (model(ids, attention_mask=mask, use_cache=False).logits * cotangent).sum().backward()
    for (name, theirs), (_, mine) in zip(eager.named_parameters(), ours.named_parameters(), strict=True):
        error = (mine.grad - theirs.grad).norm() / theirs.grad.norm().clamp_min(1e-12)
        assert error < 1e-4, f"{name}: relative error {error:.2e}"


def test_checkpointing_keeps_the_gradients() -> None:
    grads = []
    for checkpointing in (False, True):
        _, model = pair("gemma2")
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = tokens()
        model(ids, attention_mask=padding("left", ids), use_cache=False).logits.sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def masked(model: PreTrainedModel, mask: torch.Tensor) -> torch.Tensor:
    """What transformers hands to our attention for this mask."""
    return create_causal_mask(
        config=model.config, inputs_embeds=torch.empty(*mask.shape, 0), attention_mask=mask, past_key_values=None
    )


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_has_the_bits_of_its_sequence_alone(side: str, window: int | None) -> None:
    _, model = pair("llama")
    ids = tokens(3, 150)
    mask = padding(side, ids)
    inputs = {name: x.requires_grad_() for name, x in qkv(3, 150).items()}
    together = attention(**inputs, attention_mask=masked(model, mask), sliding_window=window)
    cotangent = torch.randn(together.shape, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad(together, list(inputs.values()), cotangent)
    for row in range(3):
        real = mask[row].bool()
        alone = {name: x[row : row + 1, :, real].detach().requires_grad_() for name, x in inputs.items()}
        out = attention(**alone, sliding_window=window)
        assert torch.equal(out[0], together[row][real])
        own = torch.autograd.grad(out, list(alone.values()), cotangent[row : row + 1, real])
        for mine, theirs in zip(own, grads, strict=True):
            torch.testing.assert_close(mine[0], theirs[row][:, real], rtol=1e-5, atol=1e-5)
            assert not theirs[row][:, ~real].any()
        assert not together[row][~real].any(), "a row of padding is 0"


def test_what_is_in_the_padding_reaches_nothing() -> None:
    _, model = pair("llama")
    mask = padding("left", tokens())
    clean, poisoned = qkv(3, LENGTH), qkv(3, LENGTH)
    for x in poisoned.values():
        x[0, :, :7] = torch.nan
    found, expected = (attention(**x, attention_mask=masked(model, mask)) for x in (poisoned, clean))
    assert torch.equal(found, expected)


def test_decoding_has_the_bits_of_prefill() -> None:
    inputs = qkv(2, 200)
    whole = attention(**inputs)
    for kv_length in (1, 64, 65, 200):
        step = {name: x[:, :, :kv_length] for name, x in inputs.items()}
        step["query"] = step["query"][:, :, -1:]
        assert torch.equal(attention(**step)[:, 0], whole[:, kv_length - 1])


@torch.no_grad()
def test_chunked_prefill_into_a_static_cache_with_padding() -> None:
    eager, ours = pair("gemma2")
    ids = tokens()
    mask = padding("left", ids)
    expected = eager(ids, attention_mask=mask).logits[:, -4:]
    cache = StaticCache(config=ours.config, max_cache_len=40)
    for at in (slice(0, 11), slice(11, 16), slice(16, 20)):
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, at]
        step = {"attention_mask": mask[:, : at.stop], "position_ids": positions, "past_key_values": cache}
        found = ours(ids[:, at], **step).logits
    torch.testing.assert_close(found, expected, **CLOSE)


@torch.no_grad()
def test_a_window_that_only_the_mask_knows() -> None:
    """Qwen2-MoE hands the window to its mask, not to its attention."""
    config = Qwen2MoeConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        shared_expert_intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, num_experts=2,
        num_experts_per_tok=1, use_sliding_window=True, sliding_window=5, max_window_layers=0, pad_token_id=None,
    )  # fmt: skip
    eager = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("rlalign")
    torch.testing.assert_close(ours(tokens()).logits, eager(tokens()).logits, **CLOSE)


@torch.no_grad()
def test_an_encoder_sees_both_ways() -> None:
    config = BertConfig(vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    eager = BertModel._from_config(config, attn_implementation="eager").eval()
    ours = copy.deepcopy(eager)
    ours.set_attn_implementation("rlalign")
    ids = tokens()
    for side in ("left", "right", "none"):
        mask = padding(side, ids)
        expected, found = (model(ids, attention_mask=mask).last_hidden_state for model in (eager, ours))
        torch.testing.assert_close(found, expected, **CLOSE)


def gpt_oss() -> GptOssConfig:
    return GptOssConfig(
        vocab_size=97, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1, sliding_window=3, pad_token_id=None,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip


def test_sinks_and_gradients_through_triton() -> None:
    """The Triton backend itself, on a GPU or in its interpreter: sinks, windows, padding, backward."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        eager = AutoModelForCausalLM.from_config(gpt_oss(), attn_implementation="eager").eval().to(device)
        for name, parameter in eager.named_parameters():
            if name.endswith("sinks"):
                parameter.data.normal_()
    ours = copy.deepcopy(eager)
    register_attention("triton")
    ours.set_attn_implementation("rlalign")
    ids = tokens(2, 8).to(device)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cotangent = torch.randn(2, 8, 97, generator=torch.Generator().manual_seed(4)).to(device)[mask.bool()]
    expected, found = (model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()] for model in (eager, ours))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    for logits in (expected, found):
        (logits * cotangent).sum().backward()
    for (name, theirs), (_, mine) in zip(eager.named_parameters(), ours.named_parameters(), strict=True):
        if theirs.grad is None:
            continue
        error = (mine.grad - theirs.grad).norm() / theirs.grad.norm().clamp_min(1e-6)
        assert error < 1e-3, f"{name}: relative error {error:.2e}"


def test_registering_needs_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("rlalign_kernels.attention.triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it is an error now
    assert attention(**qkv(1, 3)).isfinite().all()
    with pytest.raises(ImportError, match="triton"):
        attention("triton", **qkv(1, 3))


def test_backends_are_named_and_never_substituted() -> None:
    with pytest.raises(ValueError, match="backend='fast'"):
        register_attention("fast")
    native, reference = (attention(backend, **qkv(1, 70)) for backend in ("native", "reference"))
    torch.testing.assert_close(native, reference, **CLOSE)
    assert not torch.equal(native, reference)
    with pytest.raises(ValueError, match="device=meta"):
        attention(**{name: x.to("meta") for name, x in qkv(1, 3).items()})
    with pytest.raises(NotImplementedError, match="sinks"):
        attention("reference", **qkv(1, 3), s_aux=torch.zeros(4))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dropout": 0.1}, "dropout=0.1"),
        ({"output_attentions": True}, "output_attentions"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"cache": object()}, "cache"),
        ({"first_layer": 0}, "first_layer"),
        ({"alibi_slope": 0.0}, "alibi_slope"),
        ({"attention_context": object()}, r"align\(\)"),
        ({"cu_seq_lens_q": torch.tensor([0, 6])}, "belong together"),
        ({"attention_mask": torch.ones(1, 1, 6, 6)}, "two dimensions"),
        ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1]])}, "row 0 has a hole"),
        ({"is_causal": False, "sliding_window": 3}, "causal windows"),
        ({"softcap": -1.0}, "softcap=-1.0"),
    ],
)
def test_what_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=message):
        attention(**qkv(1, 6), **given)


def test_packed_rows_are_refused_beside_padding_or_other_rows() -> None:
    cu = {"cu_seq_lens_q": torch.tensor([0, 6]), "cu_seq_lens_k": torch.tensor([0, 6])}
    with pytest.raises(ValueError, match="batch of 2"):
        attention(**qkv(2, 3), **cu)
    with pytest.raises(ValueError, match="both say"):
        attention(**qkv(1, 6), **cu, attention_mask=torch.ones(1, 6))


def test_a_hole_is_refused_by_its_row() -> None:
    _, model = pair("llama")
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[1, 4] = 0
    with pytest.raises(ValueError, match="row 1 has a hole"):
        model(ids, attention_mask=mask)
    mask = padding("right", ids)
    cache = model(ids, attention_mask=mask).past_key_values
    with pytest.raises(ValueError, match="row 0 has a hole"):  # a token behind the padding
        model(ids[:, :1], attention_mask=torch.nn.functional.pad(mask, (0, 1), value=1), past_key_values=cache)


def test_masks_that_are_not_plain_attention_are_refused() -> None:
    config = Llama4TextConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, intermediate_size_mlp=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, attention_chunk_size=8, num_local_experts=2,
        num_experts_per_tok=1, pad_token_id=None,
    )  # fmt: skip
    chunked = AutoModelForCausalLM.from_config(config, attn_implementation="rlalign")
    with pytest.raises(NotImplementedError, match="chunked_overlay"):
        chunked(tokens())
    _, model = pair("llama")
    arguments = {"config": model.config, "inputs_embeds": torch.empty(1, 5, 0), "attention_mask": None}
    with pytest.raises(NotImplementedError, match="of the model's own"):
        create_causal_mask(**arguments, past_key_values=None, and_mask_function=lambda b, h, q, k: q != k)


def test_a_copied_mask_still_says_what_it_is() -> None:
    """As happens between layers on several devices: an attribute would be lost."""
    _, model = pair("llama")
    mask = AttentionMaskInterface()["rlalign"](
        2,
        20,
        20,
        mask_function=sliding_window_causal_mask_function(4),
        attention_mask=padding("left", tokens())[:2].bool(),
        local_size=4,
    )
    inputs = qkv(2, 20)
    assert torch.equal(attention(**inputs, attention_mask=mask.clone()), attention(**inputs, attention_mask=mask))
    full = masked(model, padding("left", tokens())[:2])
    assert not torch.equal(attention(**inputs, attention_mask=mask), attention(**inputs, attention_mask=full))


def test_a_compiled_forward_runs_it_outside_of_its_graph() -> None:
    _, model = pair("llama")
    ids = tokens()
    with torch.no_grad():
        expected = model(ids, attention_mask=padding("left", ids)).logits
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(ids, attention_mask=padding("left", ids)).logits, expected, **CLOSE)
    torch._dynamo.reset()


def test_an_aligned_model_is_not_touched() -> None:
    model = align(pair("llama")[1], backend="reference")
    assert model.config._attn_implementation not in AttentionMaskInterface()
    with pytest.raises(ValueError, match="attention_context"):
        model(tokens())
