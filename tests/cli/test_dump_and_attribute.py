"""What ``dump`` and ``attribute`` have in common: they take a file the same way, and say so in the same words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.faults import COOL, PLAIN, engine_dump, logits_of, relabel, save_models

from rlalign.cli.verify import main
from rlalign.modeling import Policy, load_policy
from rlalign.verifier.dumps import DumpSequence, write_dump


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return load_policy(folder / "model")


@pytest.fixture(scope="module")
def cool(policy: Policy) -> list[DumpSequence]:
    return engine_dump(policy, COOL)


def test_a_sequence_that_the_model_cannot_take_is_named_and_the_rest_compared(folder, policy, tmp_path, capsys):
    plain, path = engine_dump(policy, PLAIN), tmp_path / "dump.jsonl"
    ids = np.where(np.arange(len(plain[1].token_ids)) == len(plain[1].token_ids) - 1, 9999, plain[1].token_ids)
    aliens = [
        replace(plain[1], id="alien", token_ids=ids),
        replace(plain[1], id="bare", prompt_token_ids=np.zeros(0, np.int64)),
        replace(plain[1], id="long", prompt_token_ids=np.full(5000, 3)),
    ]
    shifted = replace(plain[0], logprobs=plain[0].logprobs - np.float32(0.125))
    for first, code in ((plain[0], 2), (shifted, 1)):
        write_dump(path, [first, *aliens, plain[2]])
        options = ["--model", str(folder / "model"), "--json", str(tmp_path / "out.json")]
        assert main(["dump", str(path), *options]) == code
        failed = json.loads((tmp_path / "out.json").read_text())["failed"]
        capsys.readouterr()
        assert main(["attribute", "--dump", str(path), *options, "--no-decode"]) == code
        found, shown = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out
        assert found["failed"] == failed and [one["id"] for one in failed] == ["alien", "bare", "long"]
        assert (found["exit_code"], found["sequences"]) == (code, 2)
        assert "sequence alien was not compared: " in shown and "outside the vocabulary" in shown
    write_dump(path, aliens)
    assert main(["attribute", "--dump", str(path), *options, "--no-decode"]) == 2
    assert json.loads((tmp_path / "out.json").read_text())["verdict"].startswith("nothing was compared")


@pytest.mark.parametrize(
    ("row", "flags", "raw"),
    [
        # vLLM's and its OpenAI server's log-probs are raw unless someone says otherwise
        ("vllm", [], True),
        ("vllm", ["--processed"], False),
        ("ours", [], False),
        ("ours", ["--raw"], True),
    ],
)
def test_dump_and_attribute_take_the_same_distribution(row, flags, raw, folder, policy, cool, tmp_path):
    sequences = relabel(cool, lambda s: logits_of(policy, s) if raw else logits_of(policy, s) / 0.7)
    lines = []
    for s in sequences:
        ids, values = s.token_ids.tolist(), s.logprobs.tolist()
        entries = [{str(i): {"logprob": v}} for i, v in zip(ids, values, strict=True)]
        lines.append(
            {"id": s.id, "prompt_token_ids": s.prompt_token_ids.tolist(), "token_ids": ids, "logprobs": values,
             "sampling": {"temperature": 0.7}}
            if row == "ours"
            else {"prompt_token_ids": s.prompt_token_ids.tolist(), "sampling_params": {"temperature": 0.7},
                  "outputs": [{"token_ids": ids, "logprobs": entries}]}
        )  # fmt: skip
    file, out = tmp_path / "dump.jsonl", tmp_path / "out.json"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--model", str(folder / "model"), "--max-abs", "1e-4", "--json", str(out), *flags]
    assert main(["dump", str(file), *options]) == 0
    assert main(["attribute", "--dump", str(file), *options, "--no-decode"]) == 0
    assert json.loads(out.read_text())["base"]["max_abs"] < 1e-4


def test_dump_and_attribute_say_which_penalties_they_leave_out(folder, cool, tmp_path, capsys):
    lines = [
        {"id": s.id, "prompt_token_ids": s.prompt_token_ids.tolist(), "token_ids": s.token_ids.tolist(),
         "logprobs": s.logprobs.tolist(), "processed": True,
         "sampling": {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": penalty}}
        for s, penalty in zip(cool, (1.0, 1.3, 1.3, None), strict=True)
    ]  # fmt: skip
    file, out = tmp_path / "dump.jsonl", tmp_path / "out.json"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for command in (["dump", str(file)], ["attribute", "--no-decode", "--dump", str(file)]):
        main([*command, "--model", str(folder / "model"), "--json", str(out)])
        [note] = json.loads(out.read_text())["notes"]
        assert note.endswith("repetition_penalty=1.3 in 2 sequences")
        assert f"note: {note}" in capsys.readouterr().out
