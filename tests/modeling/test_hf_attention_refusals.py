"""attn_implementation="rlalign": what can't be honoured is refused by name, never approximated or substituted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.hf_attention import CLOSE, attention, masked, padding, pair, qkv, tokens
from transformers import AttentionMaskInterface, AutoModelForCausalLM, BloomConfig, Llama4TextConfig
from transformers.masking_utils import create_causal_mask

from rlalign.modeling import align, register_attention

pytestmark = pytest.mark.usefixtures("registered")


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
def test_a_model_with_an_attention_of_its_own_is_refused() -> None:
    """Its scores [2 rows, 4 heads] would take the offsets for a mask of them."""
    sizes = {"vocab_size": 128, "hidden_size": 32, "n_layer": 1, "n_head": 4}
    model = AutoModelForCausalLM.from_config(BloomConfig(**sizes), attn_implementation="rlalign")
    with pytest.raises(NotImplementedError, match="Bloom has an attention of its own"):
        model(tokens(2, 6))


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("length", [4, 8])
def test_a_mask_of_other_lengths_than_the_layers_is_refused(length: int, copied: bool) -> None:
    """As of a sliding cache that keeps more keys than transformers says: a kernel would read another row's."""
    _, model = pair("llama")
    mask = masked(model, padding("right", tokens(3, 12))[:2, :length])
    with pytest.raises(ValueError, match=rf"mask is of {2 * length} queries.* a layer has 12 and 12"):
        attention(**qkv(2, 6), attention_mask=mask.clone() if copied else mask)


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


def test_an_aligned_model_is_not_touched() -> None:
    model = align(pair("llama")[1], backend="reference")
    assert model.config._attn_implementation not in AttentionMaskInterface()
    with pytest.raises(ValueError, match="attention_context"):
        model(tokens())
