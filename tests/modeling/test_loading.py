"""Loading: every unusable folder is named in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.models import tiny_model

from rlalign.config import ModelConfig
from rlalign.modeling import load_policy, load_tokenizer, make_tiny_model
from rlalign.tasks.sort import make_sort_tokenizer


def test_load_names_the_parameter_that_is_not_finite(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        load_policy(tmp_path)


def test_load_says_which_folder_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_policy(tmp_path)


def test_load_says_which_weights_cannot_be_read(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"{tmp_path.name}: weights can't be read"):
        load_policy(tmp_path)


def test_load_names_a_weight_that_the_checkpoint_lacks(tmp_path: Path) -> None:
    """transformers would make it up, and every log-prob with it."""
    model = tiny_model("llama")
    state = {name: value for name, value in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks weights of LlamaForCausalLM: model\.layers\.1\.mlp\.up_proj\.weight$"):
        load_policy(tmp_path)


def test_tokenizer_is_not_made_up(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no tokenizer"):
        load_tokenizer(tmp_path)


def test_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    make_sort_tokenizer(max_value=500).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"largest id is 505, but the model's vocabulary has 97"):
        load_tokenizer(tmp_path)


def test_ids_beyond_the_vocabulary_can_be_allowed_but_are_no_special_tokens(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    tokenizer = make_sort_tokenizer(max_value=9)
    tokenizer.add_tokens([f"<x{i}>" for i in range(97 - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"largest id is 97, but the model's vocabulary has 97"):
        load_tokenizer(tmp_path)
    found = load_tokenizer(tmp_path, extra_ids=True)
    assert (found.pad_token_id, found.eos_token_id) == (None, tokenizer.eos_token_id)
    assert found.decode([97]) == "[PAD]"


def test_tiny_model_is_made_alike_every_time(tmp_path: Path) -> None:
    tokenizer = make_sort_tokenizer(max_value=9)
    state = torch.random.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_tiny_model(ModelConfig(num_layers=1), tokenizer, tmp_path / name, seed=seed)
    assert torch.equal(torch.random.get_rng_state(), state)
    a, b, c = (load_policy(tmp_path / name) for name in "abc")
    assert a.weights_hash() == b.weights_hash() != c.weights_hash()
    assert load_tokenizer(tmp_path / "a").get_vocab() == tokenizer.get_vocab()
