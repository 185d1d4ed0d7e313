"""register_attention(): attn_implementation="rlalign" against transformers' own eager attention, and its bits."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator

import pytest
import torch
from support.hf_attention import CLOSE, LENGTH, attention, masked, padding, pair, qkv, tokens
from transformers import (
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GptOssConfig,
    Qwen2MoeConfig,
    StaticCache,
)
from transformers.masking_utils import sliding_window_causal_mask_function

from rlalign.modeling import register_attention

pytestmark = pytest.mark.usefixtures("registered")


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


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody writes holds NaN."""
    strict, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(strict)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.usefixtures("poisoned")
def test_padding_that_meets_the_next_rows_is_written_too() -> None:
    """The Triton backend counts on its bounds: right padding, then left, and a row of nothing else; with sinks."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mask = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], device=device)
    real = mask.bool()
    generator = torch.Generator().manual_seed(3)
    shapes = {"query": (4, 4, 4, 16), "key": (4, 1, 4, 16), "value": (4, 1, 4, 16), "s_aux": (4,)}
    inputs = {name: torch.randn(shape, generator=generator).to(device) for name, shape in shapes.items()}
    weights = torch.randn(4, 4, 4, 16, generator=generator).to(device)
    for tensor in inputs.values():
        tensor.requires_grad_()
    out = attention("triton", **inputs, attention_mask=mask)
    assert not out[~real].any()
    found = torch.autograd.grad((out * weights).sum(), list(inputs.values()))
    expected = torch.zeros(4, device=device)
    for row in (0, 1, 3):
        alone = {name: inputs[name][row : row + 1, :, real[row]] for name in ("query", "key", "value")}
        own = attention("triton", **alone, s_aux=inputs["s_aux"])
        torch.testing.assert_close(out[row, real[row]], own[0], **CLOSE)
        expected += torch.autograd.grad((own * weights[row : row + 1, real[row]]).sum(), inputs["s_aux"])[0]
    torch.testing.assert_close(found[3], expected, **CLOSE)
    for grad in found[:3]:
        assert grad.isfinite().all() and not grad.transpose(1, 2)[~real].any()


def test_registering_needs_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("rlalign_kernels.attention.triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it is an error now
    assert attention(**qkv(1, 3)).isfinite().all()
    with pytest.raises(ImportError, match="triton"):
        attention("triton", **qkv(1, 3))


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
        given = {"attention_mask": padding("left", ids), "use_cache": False}  # tracing a cache takes seconds
        expected = model(ids, **given).logits
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(ids, **given).logits, expected, **CLOSE)
    torch._dynamo.reset()
