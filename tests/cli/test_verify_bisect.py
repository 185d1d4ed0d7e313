"""``rlalign-verify bisect`` on a tiny model: what may not differ doesn't, and every planted fault is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.models import tiny_model

from rlalign import modeling
from rlalign.cli.forwards import make_feed
from rlalign.cli.heads import head_logprobs
from rlalign.cli.recording import Side, recorded_pairs, tokens_of
from rlalign.cli.verify import main
from rlalign.cli.verify_settings import parse_setting
from rlalign.config import ModelConfig
from rlalign.modeling.feeds import Forward
from rlalign.tasks.sort import make_sort_tokenizer
from rlalign.verifier.bisect import Bisection, bisect
from rlalign.verifier.causes import Way, numeric_causes, position_causes
from rlalign.verifier.config_causes import config_causes
from rlalign.verifier.dumps.record import DumpSequence
from rlalign.verifier.score import ScoreSettings

TINY = ModelConfig(hidden_size=32, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=32,
                   max_position_embeddings=96)  # fmt: skip
PLAIN = ScoreSettings()
DECODE = replace(PLAIN, phase="decode")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    modeling.make_tiny_model(TINY, make_sort_tokenizer(max_value=9), path, seed=0)
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"sort {i} 7 3 ->\n" for i in range(8)))
    return path


def run(model: Path, prompts: Path, tmp_path: Path, a: str, b: str, *more: str) -> dict[str, Any]:
    out = tmp_path / "out.json"
    code = main(
        ["bisect", "--model", str(model), "--prompts", str(prompts), "--a", a, "--b", b, "--json", str(out), *more]
    )
    found = json.loads(out.read_text())
    assert found["exit_code"] == code
    return found


@pytest.mark.parametrize("b", ["decode", "alone", "chunk=3", "decode,alone,chunk=2", "attention=reference"])
def test_no_schedule_of_the_invariant_operators_differs(model, prompts, tmp_path, b):
    found = run(model, prompts, tmp_path, "invariant", b)
    assert (found["exit_code"], found["equal"], found["first"], found["not_recorded"]) == (0, True, None, [])
    assert found["depth"][-1]["module"] == "log-prob"


@pytest.mark.parametrize(
    ("b", "module", "operator"),
    [
        ("native=attention", "model.layers.0.self_attn", "attention"),
        ("native=norm", "model.layers.0.input_layernorm", "norm"),
        ("native=head", "log-prob", "head"),
        ("logits=bfloat16", "log-prob", "head"),
        ("position_offset=1", "model.rotary_emb", "rotary tables"),
        ("config.rope_parameters.rope_theta=500000", "model.rotary_emb", "rotary tables"),
        ("config.rms_norm_eps=0.001", "model.layers.0.input_layernorm", "norm"),
        ("bfloat16", "model.embed_tokens", "embedding"),
    ],
)
def test_the_operator_that_differs_is_named(model, prompts, tmp_path, b, module, operator):
    found = run(model, prompts, tmp_path, "invariant", b)
    assert found["exit_code"] == 1
    assert (found["first"]["module"], found["first"]["operator"]) == (module, operator)
    assert found["first"]["max_ulp"] >= 1


def test_thresholds_hold_for_the_log_probs_at_the_end(model, prompts, tmp_path, capsys):
    options = (model, prompts, tmp_path, "invariant", "native")
    for more, code in ((["--max-abs", "1e-3"], 0), (["--max-abs", "1e-12"], 1), (["--k3", "1", "--mean-abs", "1"], 0),
                       (["--max-abs", "0"], 1)):  # fmt: skip
        found = run(*options, *more)
        assert (found["exit_code"], found["equal"], bool(found["exceeded"])) == (code, False, bool(code))
    # outputs that differ before log-probs that don't: only equal bits are asked of every output
    assert 0 < found["logprobs"]["align/logp_abs_diff/max"] < 1e-3
    assert "log-probs at the end: " in capsys.readouterr().out


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gemma3")
    tiny_model("gemma3").save_pretrained(path)
    return path


@pytest.mark.parametrize("b", ["native,decode", "native,alone", "native,chunk=7", "native,decode,alone"])
def test_rows_are_compared_with_their_own_whatever_axis_they_are_on(gemma3, tmp_path, b):
    """Gemma-3 normalises queries [1, heads, T, D]; its 4 heads are as many as the sequences that decode together."""
    dump = tmp_path / "dump.jsonl"
    ids = np.random.default_rng(0).integers(0, 97, (4, 15)).tolist()
    rows = [{"prompt_token_ids": row[: 9 + i], "token_ids": row[9 + i :], "logprobs": [-1] * (6 - i)}
            for i, row in enumerate(ids)]  # fmt: skip
    dump.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.json"
    command = ["bisect", "--model", str(gemma3), "--dump", str(dump), "--a", "native", "--b", b, "--json", str(out)]
    assert main([*command, "--max-abs", "1e-4"]) == 0
    found = json.loads(out.read_text())
    assert {site["module"] for site in found["sites"]} >= {f"model.layers.1.self_attn.{n}_norm" for n in "qk"}
    assert {site["module"]: site["max_abs"] for site in found["sites"] if site["max_abs"] > 1e-4} == {}
    assert found["not_recorded"] == []


@pytest.mark.parametrize(
    ("bound", "last"), [("1", "log-probs at the end: within the thresholds"), ("0", "first difference at")]
)
def test_the_last_line_is_what_the_exit_code_is_about(model, prompts, tmp_path, capsys, bound, last):
    run(model, prompts, tmp_path, "invariant", "native", "--max-abs", bound)
    assert capsys.readouterr().out.splitlines()[-1].startswith(last)


def test_another_checkpoint_is_a_setting(model, prompts, tmp_path):
    other = tmp_path / "other"
    policy = modeling.load_model(model, dtype="float32", device="cpu")
    policy.get_parameter("model.layers.1.mlp.up_proj.weight").data.view(torch.int32)[3, 5] ^= 1 << 22
    modeling.save_checkpoint(policy, None, other)
    found = run(model, prompts, tmp_path, "invariant", f"model={other}")
    assert (found["first"]["layer"], found["first"]["module"]) == (1, "model.layers.1.mlp.up_proj")


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path, capsys):
    """Also where the modules of both have the same names and widths, as Llama's and Mistral's do."""
    for kind in ("llama", "mistral"):
        tiny_model(kind).save_pretrained(tmp_path / kind)
    command = ["bisect", "--model", str(tmp_path / "llama"), "--prompts", str(tokens(tmp_path))]
    assert main([*command, "--b", f"model={tmp_path / 'mistral'}"]) == 2
    error = capsys.readouterr().err
    assert "llama is of type llama" in error
    assert "mistral of type mistral; bisect compares two settings of one architecture" in error


def test_windows_of_memory_change_nothing(model, prompts, tmp_path, monkeypatch):
    from rlalign.cli import recording

    whole = run(model, prompts, tmp_path, "invariant", "native")
    windows = recording._windows
    monkeypatch.setattr(recording, "_windows", lambda plan, tokens, _bytes: windows(plan, tokens, 20_000))
    assert run(model, prompts, tmp_path, "invariant", "native") == whole
    assert len(whole["sites"]) == 1 + 1 + 3 * 16 + 1 + 1


def test_the_heat_map_is_drawn_and_its_data_written(model, prompts, tmp_path, capsys):
    pytest.importorskip("plotly", reason="the page needs plotly")
    png, page = tmp_path / "heat.png", tmp_path / "page.html"
    files = ("--png", str(png), "--html", str(page))
    found = run(model, prompts, tmp_path, "invariant", "native", *files, "--worst", "2")
    assert "first difference at" in page.read_text()
    assert png.read_bytes().startswith(b"\x89PNG")
    heat = found["heat_map"]
    assert heat["stations"] == ["model.embed_tokens", "model.rotary_emb", *(f"model.layers.{i}" for i in range(3)),
                                "model.norm", "log-prob"]  # fmt: skip
    assert np.array(heat["max_abs"]).shape == (7, len(heat["token_id"]))
    assert "first difference at" in capsys.readouterr().out


def two_sides(
    model: Path, settings: ScoreSettings, plant: Callable[[modeling.Policy], None] | None = None, side: type = Side
) -> Bisection:
    """The invariant policy against itself with ``plant`` in it, on the same random tokens."""
    generator = np.random.default_rng(0)
    sequences = [
        DumpSequence(str(i), ids[:20], ids[20:], np.zeros(20, np.float32))
        for i, ids in enumerate(generator.integers(0, 10, (2, 40)))
    ]
    sides = []
    for kind, planted in ((Side, None), (side, plant)):
        policy = modeling.load_policy(model)
        if planted is not None:
            planted(policy)
        feeds = [
            make_feed(s, s.prompt_token_ids, s.token_ids, settings, longest_prompt=20, pad_id=0) for s in sequences
        ]
        sides.append(kind(policy, feeds, settings))
    targets = np.concatenate([np.concatenate([s.prompt_token_ids, s.token_ids])[1:] for s in sequences])
    tokens = tokens_of(sides[0].feeds)
    return bisect(recorded_pairs(*sides, targets, head_logprobs, max_bytes=2**30, max_rows=8192), tokens)


def test_one_layers_norm_epsilon_is_named(model):
    def plant(policy: modeling.Policy) -> None:
        policy.model.model.layers[1].post_attention_layernorm.rlalign_eps = 1e-4

    first = two_sides(model, PLAIN, plant).first
    assert first is not None
    assert (first.site.layer, first.site.module) == (1, "model.layers.1.post_attention_layernorm")


class WrongBlock(Side):
    """From the fifth decoding step on, the second sequence reads the first one's first page."""

    def forwards(self, max_rows: int) -> Iterator[Forward]:
        for step, forward in enumerate(super().forwards(max_rows)):
            if step >= 5:
                forward.context.block_tables[1, 0] = forward.context.block_tables[0, 0]
            yield forward


def test_a_wrong_kv_block_is_named(model):
    found = two_sides(model, DECODE, side=WrongBlock)
    first = found.first
    assert first is not None
    assert (first.site.module, first.site.operator) == ("model.layers.0.self_attn", "attention")
    assert (found.tokens.sequence[first.token], found.tokens.position[first.token]) == (1, 20 + 4)
    # rows before that step, and the other sequence, are untouched to the end
    assert found.sites[-1].tokens_differing == 39 - 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--a", "invariant,native"], "--a 'invariant,native': 'invariant' and 'native' contradict each other"),
        (["--b", "native, native=norm"], "'native' and 'native=norm' contradict each other"),
        (["--b", "bfloat16,dtype=float32"], "'bfloat16' and 'dtype=float32' contradict each other"),
        (["--b", "config.rms_norm_eps=1,config.rms_norm_eps=2"], "contradict each other"),
        (["--a", "nativ"], "--a 'nativ': 'nativ' is unknown; a setting is one of: native, invariant"),
        (["--b", "batch=both"], "--b 'batch=both': batch='both'"),
        (["--b", "config.colour=1"], "config.json has no such field\n"),
        (["--b", "config.rms_norm_epsilon=1"], "has no such field; did you mean config.rms_norm_eps?"),
        (["--b", "config.rope_theta=5"], "has no such field; did you mean config.rope_parameters.rope_theta?"),
        (["--b", "config.rope_thet=5"], "has no such field; did you mean config.rope_parameters.rope_theta?"),
        (["--b", "config.rope_parameters.rope_thata=5"], "did you mean config.rope_parameters.rope_theta?"),
        (["--b", "config.rope.rope_type=5"], "no object 'rope'; did you mean config.rope_parameters.rope_type?"),
        (["--b", "config.intermediate_size=40"], "config.intermediate_size=40: the model can't be loaded with it"),
        (["--json", "/"], "--json: / is a folder"),
        (["--pad-token-id", "0"], "--pad-token-id says how a --dump is read; --prompts has none"),
        (["--png", "/"], "--png: / is a folder"),
        (["--b", "colour=red"], "'colour=red' is unknown"),
        (["--json", "/nowhere/out.json"], "--json: no such folder"),
        (["--model", "/nowhere"], "model folder"),
    ],
)
def test_unusable_input_is_one_line(model, prompts, capsys, options, message):
    assert main(["bisect", "--model", str(model), "--prompts", str(prompts), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_field_of_an_older_config_is_named_where_it_stands(model, tmp_path, capsys):
    older = tmp_path / "older"
    modeling.save_checkpoint(modeling.load_model(model, dtype="float32", device="cpu"), None, older)
    config = json.loads((older / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    (older / "config.json").write_text(json.dumps(config))
    found = run(older, tokens(tmp_path), tmp_path, "invariant", "config.rope_theta=500000")
    assert (found["exit_code"], found["first"]["module"]) == (1, "model.rotary_emb")
    settings = ["--b", "config.rope_parameters.rope_theta=500000"]
    assert main(["bisect", "--model", str(older), "--prompts", str(tokens(tmp_path)), *settings]) == 2
    assert "has no object 'rope_parameters'; did you mean config.rope_theta?" in capsys.readouterr().err


def tokens(tmp_path: Path) -> Path:
    """A prompt that needs no tokenizer."""
    path = tmp_path / "tokens.jsonl"
    path.write_text(json.dumps({"prompt_token_ids": [3, 4, 5]}) + "\n")
    return path


def test_settings_are_read():
    named = parse_setting("--a", "native=linear+norm, bfloat16,config.rms_norm_eps=1e-5, chunk=7")
    assert named.settings == ScoreSettings(
        native=["linear", "norm"], dtype="bfloat16", config=(("rms_norm_eps", 1e-5),), chunk=7
    )
    assert named.settings.describe() == "config=rms_norm_eps:1e-05, dtype=bfloat16, native=linear+norm, chunk=7"
    assert parse_setting("--a", "native").settings.numerics == "native"
    uncounted = ScoreSettings(padding="left_seen", pad_position=1)
    assert parse_setting("--a", "padding=left_seen,pad_position=1").settings == uncounted
    assert ScoreSettings(cached=(3, 0), cached_by=1).describe() == "cached=3+0, cached_by=1"
    constants = parse_setting("--b", "config.a=None,config.b=null,config.c=True,config.d=false,config.e=1").settings
    assert [repr(value) for _, value in constants.config] == ["None", "None", "True", "False", "1"]


def test_causes_are_settings_by_the_names_that_attribute_gives_them():
    arithmetic = [*numeric_causes("float32", decode=True), *numeric_causes("bfloat16", decode=True, native=True)]
    changes = [("final_logit_softcapping", None, ""), ("use_sliding_window", True, ""), ("rope_theta", 1e-06, "")]
    for cause in (*arithmetic, *position_causes(), *config_causes(changes)):
        # a setting's decode is of any operators; bisect has no say in the row that a log-prob is read from
        if cause.name == "decode" or cause.name.startswith("target_shift"):
            continue
        assert parse_setting("--b", f" {cause.name}").settings == cause.change(Way(), 0).settings, cause.name


def test_a_field_of_config_json_without_effect_is_named(model, tmp_path, capsys):
    found = run(model, tokens(tmp_path), tmp_path, "invariant", "config.max_position_embeddings=95")
    assert (found["equal"], found["without_effect"]) == (True, ["config.max_position_embeddings=95"])
    assert "config.max_position_embeddings=95 changes nothing on these tokens" in capsys.readouterr().out
    assert run(model, tokens(tmp_path), tmp_path, "invariant", "config.rms_norm_eps=1e-2")["without_effect"] == []


def test_a_sequence_that_the_model_cannot_take_is_named_and_the_rest_compared(model, tmp_path, capsys):
    """As ``dump`` and ``attribute`` do, with the same words and the same exit code."""
    pytest.importorskip("plotly", reason="the page needs plotly")
    good = {"prompt_token_ids": [3, 4, 5], "token_ids": [6, 7], "logprobs": [-1, -1]}
    aliens = [
        good | {"id": "alien", "token_ids": [6, 9999]},  # the last token is not fed, but its log-prob is wanted
        good | {"id": "bare", "prompt_token_ids": []},
        good | {"id": "long", "prompt_token_ids": [3] * 200},
        {"id": "prompt", "prompt_token_ids": [3, 9999], "token_ids": [], "logprobs": []},
    ]
    file, outputs = tmp_path / "dump.jsonl", [tmp_path / name for name in ("out.json", "out.html", "out.png")]

    def run_on(rows: list[dict[str, Any]], *settings: str) -> tuple[int, dict[str, Any], str]:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        written = [text for path in outputs for text in (f"--{path.suffix[1:]}", str(path))]
        code = main(["bisect", "--model", str(model), "--dump", str(file), *settings, *written])
        return code, json.loads(outputs[0].read_text()), capsys.readouterr().out

    rows = [good | {"id": "first"}, *aliens, good | {"id": "last", "token_ids": [8, 9]}]
    code, found, shown = run_on(rows, "--b", "decode")
    assert (code, found["equal"], found["heat_map"]["sequence"]) == (2, True, [0] * 4 + [5] * 4)
    assert [one["id"] for one in found["failed"]] == ["alien", "bare", "long", "prompt"]
    assert "sequence alien was not compared: " in shown and "log-probs at the end" not in shown
    assert "token id 9999 is outside the vocabulary" in outputs[1].read_text()
    code, found, _ = run_on(rows, "--b", "position_offset=1")
    assert (code, found["exit_code"], len(found["failed"])) == (1, 1, 4)
    # by its id, or by its line, not by its number from 0
    assert "sequence first position 0: " in found["verdict"]
    _, found, _ = run_on([aliens[0], good], "--b", "position_offset=1")
    assert f"sequence {file}:2 position 0: " in found["verdict"]
    code, found, shown = run_on(aliens)
    assert (code, found["equal"], found["sites"]) == (2, False, [])
    assert shown.splitlines()[-1].startswith("nothing was compared") and "nothing was" in outputs[1].read_text()
    # what only one of the two can't take
    code, found, _ = run_on([good | {"id": "first"}], "--b", "config.max_position_embeddings=3")
    assert (code, "max_positions=3" in found["failed"][0]["error"]) == (2, True)


def test_a_padded_batch_is_read_as_dump_reads_it(model, tmp_path, capsys):
    """verl's, without attention masks and with another field's log-probs: the padding id and the field are given."""
    row = {"input_ids": [0, 0, 3, 4, 5, 6], "response_mask": [1, 1], "old_log_probs": [-1.0, -1.0]}
    file = tmp_path / "dump.jsonl"
    file.write_text(json.dumps(row) + "\n")
    command = ["bisect", "--model", str(model), "--dump", str(file), "--b", "invariant", "--format", "verl"]
    assert main([*command, "--logprobs", "old_log_probs"]) == 2
    assert "or the padding id (--pad-token-id)" in capsys.readouterr().err
    out = tmp_path / "out.json"
    assert main([*command, "--logprobs", "old_log_probs", "--pad-token-id", "0", "--json", str(out)]) == 0
    assert json.loads(out.read_text())["heat_map"]["position"] == [0, 1, 2]  # the last is not fed
