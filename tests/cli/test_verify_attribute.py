"""``rlalign-verify attribute`` on a tiny model: each fault is planted by another way of computing, then named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.faults import COOL, PLAIN, PROMPTS, Remembering, engine_dump, logits_of, relabel, save_models

from rlalign.cli import verify_attribute
from rlalign.cli.policies import Policies
from rlalign.cli.scoring import PolicyScorer
from rlalign.cli.verify import main
from rlalign.modeling import PagedContext, Policy, load_policy
from rlalign.tasks.sort import make_sort_tokenizer
from rlalign.verifier.attribute import attribute
from rlalign.verifier.attribution import Attribution
from rlalign.verifier.config_causes import config_changes
from rlalign.verifier.dumps import DumpSequence, write_dump
from rlalign.verifier.score import OPERATORS, ScoreSettings

VLLM = Path(__file__).resolve().parents[3] / "shared/data/vllm_dump"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model and older (one step behind) are checkpoints below it."""
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Remembering:
    return Remembering(PolicyScorer(Policies([folder / "model", folder / "older"], "float32", kept=9)))


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return load_policy(folder / "model")


@pytest.fixture(scope="module")
def plain(policy: Policy) -> list[DumpSequence]:
    return engine_dump(policy, PLAIN)


@pytest.fixture(scope="module")
def cool(policy: Policy) -> list[DumpSequence]:
    return engine_dump(policy, COOL)


def run(dump: Sequence[DumpSequence], scorer: Remembering, **options: Any) -> Attribution:
    given = {"decode": False, "num_previous": 1} | options
    return attribute(dump, scorer, **given)


def names(found: Attribution) -> list[str]:
    """Causes, less the last: that this file's own arithmetic is PyTorch's, which attribution sees too."""
    steps = [step.cause for step in found.steps]
    if len(steps) > 1 and steps[-1].kind == "numerics" and found.steps[-1].before.mean_abs < 1e-5:
        steps.pop()
    return [cause.name for cause in steps]


def test_the_engines_own_dump_is_equal(plain, cool, scorer):
    for dump in (plain, cool):
        found = run(dump, scorer)
        assert found.equal
        assert found.steps == ()


def test_temperature_not_applied(policy, cool, scorer):
    temperature_only = [replace(s, sampling=replace(COOL, top_p=1.0)) for s in cool]
    found = run(relabel(temperature_only, lambda s: logits_of(policy, s)), scorer)
    assert names(found) == ["temperature"]
    assert found.rest.max_abs < 1e-5
    found = run(relabel(cool, lambda s: logits_of(policy, s)), scorer)
    assert names(found) == ["raw"]


def test_top_p_not_renormalised(policy, cool, scorer):
    found = run(relabel(cool, lambda s: logits_of(policy, s) / 0.7), scorer)
    assert names(found) == ["top_p"]
    assert found.rest.max_abs < 1e-5
    assert "renormalised" in found.steps[0].cause.what


def test_stale_weights_by_one_step(folder, scorer):
    found = run(engine_dump(load_policy(folder / "older"), PLAIN), scorer)
    assert names(found) == ["stale_weights[1]"]
    assert found.rest.mismatches == 0
    assert found.base.mean_abs < 0.1


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"late": 1}, "response_positions[+1]"),
        ({"late": -1}, "response_positions[-1]"),
        ({"pads": 3}, "padding.left"),
    ],
)
def test_positions_and_padding(policy, plain, scorer, options, name):
    if "pads" in options:  # one row of the batch, as long as the longest prompt
        longest = max(len(prompt) for prompt in PROMPTS)
        padded = relabel(plain, lambda s: logits_of(policy, s, pads=longest - len(s.prompt_token_ids)))
        found = run([*plain[:3], padded[3]], scorer)
        assert found.steps[0].sequences == (3,)
    else:
        found = run(relabel(plain, lambda s: logits_of(policy, s, **options)), scorer)
    assert names(found) == [name]
    assert found.rest.max_abs < 1e-5


def test_all_positions_off_by_one_differ_by_rounding_alone(policy, plain, scorer):
    """Rotary attention sees distances: shifting all of them is no more than another rounding."""
    found = run(relabel(plain, lambda s: logits_of(policy, s, shift=1)), scorer)
    assert found.base.mean_abs < 1e-5
    assert found.explained


@pytest.mark.parametrize("shift", [1, -1])
def test_a_shifted_token_index(plain, scorer, shift):
    found = run([replace(s, logprobs=np.roll(s.logprobs, -shift)) for s in plain], scorer)
    assert names(found) == [f"shifted_index[{shift:+d}]"]
    assert found.rest.mismatches == 0


def test_a_swapped_pair(plain, scorer):
    swapped = [replace(plain[1], logprobs=plain[2].logprobs), replace(plain[2], logprobs=plain[1].logprobs)]
    found = run([plain[0], *swapped, plain[3]], scorer)
    assert names(found) == ["swapped_sequences"]
    assert found.steps[0].sequences == (1, 2)


def test_a_response_under_another_prompt(policy, plain, scorer):
    def under_next(sequence: DumpSequence) -> torch.Tensor:
        other = plain[(int(sequence.id) + 1) % len(plain)]
        return logits_of(policy, replace(sequence, prompt_token_ids=other.prompt_token_ids))

    assert names(run(relabel(plain, under_next), scorer)) == ["prompt.next"]


def test_bfloat16_logits(policy, plain, scorer):
    found = run(relabel(plain, lambda s: logits_of(policy, s).bfloat16()), scorer)
    assert names(found) == ["logits.bfloat16"]
    assert found.rest.max_abs < 1e-5 < found.base.mean_abs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_softmax_too_in_16_bits(policy, plain, scorer, dtype):
    def in_16_bits(sequence: DumpSequence) -> np.ndarray:
        values = torch.log_softmax(logits_of(policy, sequence).to(dtype), -1)
        return values.gather(1, torch.from_numpy(sequence.token_ids).unsqueeze(1)).squeeze(1).float().numpy()

    found = run([replace(s, logprobs=in_16_bits(s)) for s in plain], scorer)
    assert names(found)[0] == f"logits.{str(dtype).removeprefix('torch.')}_softmax"
    assert found.rest.mean_abs < 0.01 * found.base.mean_abs


def test_float16_logits(policy, plain, scorer):
    found = run(relabel(plain, lambda s: logits_of(policy, s).half()), scorer)
    assert names(found) == ["logits.float16"]
    assert found.rest.max_abs < 1e-5 < found.base.mean_abs


def other_config(folder: Path, name: str, value: float) -> list[DumpSequence]:
    with Policies([folder / "model"], "float32").using(ScoreSettings(config=((name, value),))) as policy:
        return engine_dump(policy, PLAIN)


@pytest.mark.parametrize(("name", "value"), [("rope_parameters.rope_theta", 1e6), ("rms_norm_eps", 1e-5)])
def test_another_rope_base_or_norm_epsilon(folder, scorer, name, value):
    config = json.loads((folder / "model" / "config.json").read_text())
    found = run(other_config(folder, name, value), scorer, config_changes=config_changes(config, []))
    assert names(found) == [f"config.{name}={value}"]
    assert found.rest.mismatches == 0


def test_one_layers_norm_epsilon_is_left_to_bisect(folder, plain, scorer):
    policy = load_policy(folder / "model")
    policy.model.model.layers[1].input_layernorm.rlalign_eps = 1e-2
    found = run(relabel(plain, lambda s: logits_of(policy, s)), scorer)
    assert not found.explained
    assert "unexplained" in found.verdict


class OneWrongBlock:
    """A policy whose second sequence reads the first one's first block from the fifth decoding step on."""

    def __init__(self, policy: Policy) -> None:
        self._policy, self._step = policy, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def hidden(self, token_ids: torch.Tensor, position_ids: torch.Tensor, context: PagedContext) -> torch.Tensor:
        if self._step >= 5:
            context.block_tables[1, 0] = context.block_tables[0, 0]
        self._step += 1
        return self._policy.hidden(token_ids, position_ids, context)


def test_a_wrong_kv_block_is_placed(policy, plain, scorer, monkeypatch):
    def using(_self: Policies, _settings: ScoreSettings) -> Any:
        from contextlib import nullcontext

        return nullcontext(OneWrongBlock(policy))

    with monkeypatch.context() as patch:
        patch.setattr(Policies, "using", using)
        broken = PolicyScorer(scorer.policies)(plain, ScoreSettings(phase="decode"))
    found = run([replace(s, logprobs=values) for s, values in zip(plain, broken, strict=True)], scorer)
    assert found.steps == ()
    assert [(f.name, f.where[0]) for f in found.findings] == [("from_position", (1, 5))]
    assert "KV block" in found.verdict


def test_other_operators(folder, plain, scorer):
    """A dump of PyTorch's operators, decoded: rounding, and none of the causes that change a log-prob's meaning."""
    native = load_policy(folder / "model", numerics="native")
    found = run(engine_dump(native, PLAIN), scorer)
    assert all(step.cause.kind == "numerics" for step in found.steps)
    assert found.explained
    assert found.base.mean_abs < 1e-5


@pytest.fixture
def dump_file(tmp_path: Path) -> Iterator[Callable[[Sequence[DumpSequence]], Path]]:
    def write(dump: Sequence[DumpSequence]) -> Path:
        write_dump(tmp_path / "dump.jsonl", dump)
        return tmp_path / "dump.jsonl"

    yield write


def test_the_command_names_the_cause_and_what_removes_it(folder, policy, cool, dump_file, tmp_path, capsys):
    values = relabel(cool, lambda s: logits_of(policy, s) / 0.7)
    spoiled = values[0].logprobs.copy()
    spoiled[2] = -np.inf
    file, out = dump_file([replace(values[0], logprobs=spoiled), *values[1:]]), tmp_path / "out.json"
    options = ["--dump", str(file), "--model", str(folder / "model"), "--previous-model", str(folder / "older")]
    assert main(["attribute", *options, "--no-decode", "--json", str(out)]) == 1
    found = json.loads(out.read_text())
    assert (found["exit_code"], found["explained"]) == (1, False)
    assert found["causes"][0]["name"] == "top_p"
    assert found["causes"][0]["after"]["mean_abs"] < 1e-6
    assert found["broken"][0]["name"] == "-inf"
    assert found["broken"][0]["where"] == [{"place": 0, "id": "0", "source": f"{file}:1", "position": 2}]
    shown = capsys.readouterr().out
    assert "top_p: the log-probs are not renormalised over the top-p set" in shown
    assert "processed_logprobs" in shown


def test_a_log_gets_a_line_of_progress_now_and_then(folder, plain, dump_file, monkeypatch, capsys):
    options = ["--dump", str(dump_file(plain)), "--model", str(folder / "model"), "--no-decode"]
    wrong = [*options, "--processed", "--temperature", "0.5"]
    assert main(["attribute", *wrong]) == 1
    assert "scoring" not in capsys.readouterr().err  # it didn't take so long
    monkeypatch.setattr(verify_attribute, "_SECONDS", 0.0)
    assert main(["attribute", *wrong]) == 1
    assert {"scoring: as the dump says", "scoring: operators.native"} <= {*capsys.readouterr().err.splitlines()}
    wrong.remove("--no-decode")
    assert main(["attribute", *wrong]) == 1
    assert "scoring: decode (a forward per response token; --no-decode leaves it out)" in capsys.readouterr().err


def test_an_equal_dump_exits_0_and_an_unusable_one_2(folder, plain, dump_file, tmp_path, capsys):
    options = ["--model", str(folder / "model"), "--no-decode"]
    assert main(["attribute", "--dump", str(dump_file(plain)), *options]) == 0
    assert "nothing to attribute" in capsys.readouterr().out
    for more in (["--dump", str(tmp_path / "nowhere")], ["--dump", str(tmp_path / "dump.jsonl"), "--top-p", "0"]):
        assert main(["attribute", *more, *options]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_tokenizer_of_more_ids_than_the_model_has_is_no_obstacle(folder, plain, dump_file, tmp_path):
    """An added padding token, as many checkpoints have; the dump has ids already."""
    shutil.copytree(folder / "model", tmp_path / "padded")
    tokenizer = make_sort_tokenizer(max_value=9)
    tokenizer.add_tokens([f"<x{i}>" for i in range(97 - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "padded")
    options = ["--dump", str(dump_file(plain)), "--model", str(tmp_path / "padded"), "--no-decode"]
    assert main(["attribute", *options]) == 0


def test_thresholds_decide_the_exit_code(folder, plain, dump_file, tmp_path):
    """All log-probs off by 1/8, which no cause explains: |Δ| is 1/8 everywhere, k3 = e^(1/8) - 9/8."""
    file = dump_file([replace(plain[0], logprobs=plain[0].logprobs - np.float32(0.125))])
    out = tmp_path / "out.json"
    options = ["attribute", "--dump", str(file), "--model", str(folder / "model"), "--no-decode", "--json", str(out)]
    for more, code in (
        (["--max-abs", "0.2"], 0),
        (["--max-abs", "0.2", "--k3", "0.009", "--mean-abs", "0.126", "--mismatch-frac", "1"], 0),
        (["--k3", "0.008"], 1),
        (["--mean-abs", "0.1"], 1),
        (["--mismatch-frac", "0.5"], 1),
        (["--max-abs", "0"], 1),
    ):
        assert main([*options, *more]) == code, more
        found = json.loads(out.read_text())
        assert found["exit_code"] == code and bool(found["exceeded"]) == bool(code)
    assert main([*options, "--k3", "-1"]) == 2


def test_operators_are_switched_back(scorer, plain):
    fresh = PolicyScorer(scorer.policies)
    before = fresh(plain, ScoreSettings())
    fresh(plain, ScoreSettings(native=["linear", "attention", "head"]))
    after = PolicyScorer(scorer.policies)(plain, ScoreSettings())
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    with scorer.policies.using(ScoreSettings(native=OPERATORS)) as native:
        assert native.backend == "native"


@pytest.mark.skipif(not VLLM.is_dir(), reason="needs the vLLM dump of the shared data")
def test_vllms_difference_is_bfloat16_rounding():
    from itertools import islice

    from rlalign.verifier.dumps import read_dump

    dump = list(islice(read_dump(VLLM / "vllm_native_t1.jsonl"), 1))
    scorer = PolicyScorer(Policies([VLLM / "qwen3-tiny"], "bfloat16", kept=3))
    found = run(dump, scorer, dtype="bfloat16", num_previous=0)
    assert found.base.mean_abs == pytest.approx(0.036, abs=0.01)
    assert found.steps == ()
    assert found.explained
    # vLLM is no further from a float32 forward than our own bfloat16 forward is
    assert found.rounding.engine_error == pytest.approx(found.rounding.own_error, rel=0.35)
