"""``rlalign-verify attribute --previous-model``: which checkpoints it takes beside the model, and which it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.faults import PLAIN, engine_dump, save_models
from support.models import tiny_model

from rlalign.cli.verify import main
from rlalign.modeling import load_policy
from rlalign.verifier.dumps import DumpSequence, write_dump


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model and older (one step behind) are checkpoints below it."""
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def plain(folder: Path) -> list[DumpSequence]:
    return engine_dump(load_policy(folder / "model"), PLAIN)


def test_a_previous_model_of_another_kind_or_without_all_weights_is_refused(folder, plain, tmp_path, capsys):
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    whole = tiny_model("qwen3")
    state = {name: value for name, value in whole.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    whole.save_pretrained(tmp_path / "torn", state_dict=state)
    shutil.copytree(folder / "older", tmp_path / "reward")
    config = tmp_path / "reward" / "config.json"
    config.write_text(config.read_text().replace("ForCausalLM", "ForSequenceClassification"))
    file = tmp_path / "dump.jsonl"
    write_dump(file, plain)
    options = ["--dump", str(file), "--model", str(folder / "model"), "--no-decode"]
    for name, message in (
        ("llama", "llama is of type llama, "),
        ("reward", "reward is a Qwen3ForSequenceClassification, "),
        ("torn", "torn: the checkpoint lacks weights of Qwen3ForCausalLM: model.layers.1.mlp.up_proj.weight"),
    ):
        assert main(["attribute", *options, "--previous-model", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


def test_previous_models_of_other_savers_and_older_layouts_are_taken(folder, plain, tmp_path):
    """FSDP's own class name; RoPE scaling under its older name, where the model has none."""
    fsdp, scaled, out = tmp_path / "fsdp", tmp_path / "scaled", tmp_path / "out.json"
    shutil.copytree(folder / "older", fsdp)
    config = (fsdp / "config.json").read_text()
    (fsdp / "config.json").write_text(config.replace("Qwen3ForCausalLM", "FSDPQwen3ForCausalLM"))
    fields = json.loads((folder / "model" / "config.json").read_text())
    fields["rope_theta"] = fields.pop("rope_parameters")["rope_theta"]
    for name, scaling in (("plain", None), ("scaled", {"rope_type": "linear", "factor": 4.0})):
        shutil.copytree(folder / "model", tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(fields | {"rope_scaling": scaling}))
    file = tmp_path / "dump.jsonl"
    for model, previous, cause in ((tmp_path / "plain", scaled, "config.rope_scaling"), (folder / "model", fsdp, None)):
        write_dump(file, engine_dump(load_policy(scaled), PLAIN) if cause else plain)
        options = ["--dump", str(file), "--model", str(model), "--no-decode"]
        code = main(["attribute", *options, "--previous-model", str(previous), "--json", str(out)])
        assert code == (1 if cause else 0)
        assert [step["name"] for step in json.loads(out.read_text())["causes"]] == ([cause] if cause else [])
