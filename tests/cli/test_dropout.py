"""Published configs that name a dropout: whoever trains is told, whoever only scores or samples needs not know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.models import tiny_model
from transformers import AutoModelForCausalLM, Qwen3_5Config

from rlalign.cli.verify import main
from rlalign.modeling import load_policy

# a module of its own in Phi, a function in Starcoder2
FIELDS = {"phi": "resid_pdrop", "starcoder2": "residual_dropout"}


@pytest.fixture(params=FIELDS)
def dropping(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A checkpoint, and the field of its config that is 0.1."""
    folder, field = tmp_path / "model", FIELDS[request.param]
    tiny_model(request.param).save_pretrained(folder)
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {field: 0.1}))
    return folder, field


def test_load_policy_refuses_it_or_switches_it_off(dropping: tuple[Path, str]) -> None:
    folder, field = dropping
    with pytest.raises(ValueError, match=r"dropout p=0\.1 in|residual_dropout=0\.1") as refusal:
        load_policy(folder)
    assert "without_dropout=True" in str(refusal.value)
    policy = load_policy(folder, without_dropout=True)
    assert getattr(policy.model.config, field) == 0
    assert not any(m.p for m in policy.model.modules() if isinstance(m, torch.nn.Dropout))


def test_commands_that_score_take_it_as_zero(
    dropping: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, field = dropping
    model, dump = ["--model", str(folder)], tmp_path / "dump.jsonl"
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt_token_ids": [1, 2, 3]}\n{"prompt_token_ids": [4, 5]}\n')
    sampled = ["run", *model, "--prompts", str(prompts), "--max-tokens", "4", "--ignore-eos", "--dump", str(dump)]
    assert main(sampled) == 0
    assert main(["dump", str(dump), *model]) == 0
    assert main(["attribute", "--dump", str(dump), *model, "--no-decode"]) == 0
    bisect = ["bisect", *model, "--dump", str(dump), "--a", "invariant", "--b"]
    assert main([*bisect, "invariant"]) == 0
    assert main([*bisect, f"config.{field}=0.5"]) == 2
    assert "scoring has no dropout" in capsys.readouterr().err


def test_a_composite_config_hands_its_dropout_on(tmp_path: Path) -> None:
    """Its text part is what a decoder has."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8,
             "num_key_value_heads": 2, "intermediate_size": 64, "attention_dropout": 0.1}  # fmt: skip
    config = Qwen3_5Config(text_config=sizes | {"layer_types": ["full_attention"]})
    model = AutoModelForCausalLM.from_config(config.get_text_config())
    model.save_pretrained(tmp_path)
    config.architectures = [type(model).__name__]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"attention_dropout=0\.1"):
        load_policy(tmp_path, numerics="native")
    assert load_policy(tmp_path, numerics="native", without_dropout=True).model.config.attention_dropout == 0
