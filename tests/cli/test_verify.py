"""The command as a user runs it, in process; one test goes through the script itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pages import parse

from rlalign import modeling
from rlalign.cli.verify import main
from rlalign.config import ModelConfig
from rlalign.tasks.sort import make_sort_tokenizer

TINY = ModelConfig(hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=32,
                   max_position_embeddings=64)  # fmt: skip
SHORT = ("--max-tokens", "8", "--ignore-eos")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    modeling.make_tiny_model(TINY, make_sort_tokenizer(max_value=9), path, seed=0)
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"sort {i} 7 3 ->\n\n" for i in range(6)))
    return path


def verify(model: Path, prompts: Path, *more: str) -> int:
    return main(["run", "--model", str(model), "--prompts", str(prompts), *SHORT, *more])


def result_of(model: Path, prompts: Path, tmp_path: Path, *more: str) -> dict[str, Any]:
    out = tmp_path / "out.json"
    code = verify(model, prompts, "--json", str(out), *more)
    result = json.loads(out.read_text())
    assert result["exit_code"] == code
    return result


def one_error_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.fixture
def broken_train(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flips one bit of a weight of the policy that is loaded second: the trainer's."""
    loaded: list[str] = []
    load = modeling.load_policy

    def load_and_break(*args: Any, **kwargs: Any) -> modeling.Policy:
        policy = load(*args, **kwargs)
        loaded.append("policy")
        if len(loaded) == 2:
            weight = policy.named_weights()["model.layers.1.mlp.down_proj.weight"]
            weight.view(torch.int32)[3, 5] ^= 1 << 20
        return policy

    monkeypatch.setattr(modeling, "load_policy", load_and_break)
    return loaded


def test_equal_exits_0(model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = result_of(model, prompts, tmp_path, "--n", "2")
    assert (result["exit_code"], result["equal"], result["num_samples"], result["num_tokens"]) == (0, True, 12, 96)
    assert result["metrics"]["align/mismatch_count"] == 0
    assert result["weights_sha256"]["rollout"] == result["weights_sha256"]["train"]
    assert result["fingerprint_difference"] == []
    assert result["settings"]["max_tokens"] == 8
    assert "agree bit for bit on 96 tokens of 12 samples" in capsys.readouterr().out


@pytest.mark.parametrize("more", [
    ("--temperature", "0"),
    ("--temperature", "0.6", "--top-k", "5", "--top-p", "0.8", "--min-p", "0.05"),
    ("--dtype", "bfloat16"),
    ("--engine", "page_size=3", "--engine", "prefill_chunk=2", "--engine", "max_num_seqs=2"),
    ("--micro-batch-tokens", "1"),
])  # fmt: skip
def test_equal_under_any_sampling_dtype_and_schedule(model: Path, prompts: Path, more: tuple[str, ...]) -> None:
    assert verify(model, prompts, *more) == 0


def test_one_flipped_bit_exits_1_and_names_the_token(
    model: Path, prompts: Path, tmp_path: Path, broken_train: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    result = result_of(model, prompts, tmp_path, "--worst", "3")
    assert len(broken_train) == 2
    assert result["exit_code"] == 1
    assert result["weights_sha256"]["rollout"] != result["weights_sha256"]["train"]
    worst = result["worst_tokens"]
    assert len(worst) == 3
    assert max(abs(token["delta"]) for token in worst) == abs(worst[0]["delta"]) > 0
    assert result["metrics"]["align/logp_abs_diff/max"] == abs(worst[0]["delta"])
    out = capsys.readouterr().out
    assert "Worst 3 of" in out
    assert f"prompt {worst[0]['key'].split('/')[1]} sample 0 position {worst[0]['position']}" in out


def test_thresholds_accept_a_difference_and_the_verdict_says_so(
    model: Path, prompts: Path, tmp_path: Path, broken_train: list[str]
) -> None:
    result = result_of(model, prompts, tmp_path, "--max-abs", "100")
    assert (result["exit_code"], result["equal"], result["exceeded"]) == (0, False, [])
    assert result["verdict"].startswith("within the thresholds: rollout and trainer differ on ")
    broken_train.clear()
    result = result_of(model, prompts, tmp_path, "--max-abs", "100", "--mean-abs", "0")
    assert (result["exit_code"], len(result["exceeded"])) == (1, 1)
    assert result["verdict"].endswith(f"; beyond the thresholds: {result['exceeded'][0]}")


def test_nonfinite_rescoring_exits_1(
    model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlalign.cli import rescoring

    rescore = rescoring.rescore

    def poisoned(*args: Any, **kwargs: Any) -> list[Any]:
        arrays = rescore(*args, **kwargs)
        arrays[2][3] = float("nan")
        return arrays

    monkeypatch.setattr(rescoring, "rescore", poisoned)
    result = result_of(model, prompts, tmp_path)
    assert (result["exit_code"], result["metrics"]["align/nonfinite_count"]) == (1, 1)
    assert result["metrics"]["align/logp_abs_diff/max"] == "Infinity"
    assert (result["worst_tokens"][0]["kind"], result["worst_tokens"][0]["delta"]) == ("nonfinite", "NaN")


def test_a_missing_logprob_exits_1(model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlalign.cli import rescoring

    rescore = rescoring.rescore
    monkeypatch.setattr(rescoring, "rescore", lambda *a, **k: [array[:-1] for array in rescore(*a, **k)])
    assert verify(model, prompts) == 1


def test_sides_can_differ_and_the_fingerprint_says_how(model: Path, prompts: Path, tmp_path: Path) -> None:
    result = result_of(model, prompts, tmp_path, "--train", "native")
    assert (result["rollout"], result["train"]) == ("invariant", "native")
    assert "backend: reference != native" in result["fingerprint_difference"]


def test_token_ids_need_no_tokenizer(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    ids, text = tmp_path / "ids.jsonl", tmp_path / "text.txt"
    ids.write_text('{"prompt_token_ids": [3, 5, 6, 4]}\n')
    text.write_text("sort 1 2 ->\n")
    assert verify(bare, ids) == 0
    capsys.readouterr()
    assert verify(bare, text) == 2
    assert "has no tokenizer" in one_error_line(capsys)


def test_a_wrong_tokenizer_is_an_error_even_for_token_ids(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, ids = tmp_path / "wrong", tmp_path / "ids.jsonl"
    shutil.copytree(model, wrong)
    make_sort_tokenizer(max_value=500).save_pretrained(wrong)
    ids.write_text('{"prompt_token_ids": [3, 5, 6, 4]}\n')
    assert verify(wrong, ids) == 2
    assert "wrong tokenizer" in one_error_line(capsys)


@pytest.mark.parametrize("row", [
    {"prompt": "sort 1 2 ->"},
    {"prompt": [{"role": "user", "content": "sort 1 2"}], "reward_model": {"ground_truth": "1 2"}},
    {"question": "sort 1 2", "answer": "#### 3"},
])  # fmt: skip
def test_every_kind_of_row(model: Path, tmp_path: Path, row: dict[str, Any]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert verify(model, path) == 0


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_the_engine_s_samples_as_a_dump(model: Path, prompts: Path, tmp_path: Path, suffix: str) -> None:
    dump = tmp_path / f"samples{suffix}"
    assert verify(model, prompts, "--n", "2", "--temperature", "0.7", "--top-k", "5", "--dump", str(dump)) == 0
    assert main(["dump", str(dump), "--model", str(model)]) == 0
    assert main(["dump", str(dump), "--model", str(model), "--raw"]) == 1
    assert verify(model, prompts, "--dump", "samples.txt") == 2


def test_limit_changes_no_sample(model: Path, prompts: Path, tmp_path: Path, broken_train: list[str]) -> None:
    some = result_of(model, prompts, tmp_path, "--limit", "2", "--worst", "999")
    broken_train.clear()
    every = result_of(model, prompts, tmp_path, "--worst", "999")
    assert some["num_samples"] == 2
    by_place = {(token["key"], token["position"]): token for token in every["worst_tokens"]}
    seen = ("token_id", "rollout", "train")
    for token in some["worst_tokens"]:
        assert [by_place[token["key"], token["position"]][name] for name in seen] == [token[name] for name in seen]


@pytest.mark.parametrize(("content", "message"), [
    ("", "the file is empty"),
    ('{"prompt": "sort 1 ->"}\n{"prompt": \n', "line 2: not valid JSON"),
    ('{"prompt_token_ids": [1, -3]}\n', "line 1: field 'prompt_token_ids' must be"),
    ('{"prompt_token_ids": [1, true]}\n', "line 1: field 'prompt_token_ids' must be"),
    ('{"text": "x"}\n', "line 1: no prompt: a row has one of the fields prompt, prompt_token_ids, question; "
                       "this one has ['text']"),
    ('{"prompt": null}\n', "line 1: no prompt"),
])  # fmt: skip
def test_unusable_prompts_exit_2(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    assert verify(model, path) == 2
    assert message in one_error_line(capsys)


@pytest.mark.parametrize(("more", "message"), [
    (("--temperature", "-1"), "temperature=-1.0: Input should be greater than or equal to 0"),
    (("--top-p", "0"), "top_p=0.0"),
    (("--engine", "page_size"), "is not of the form KEY=VALUE"),
    (("--engine", "pagesize=3"), "pagesize: no such setting; there are page_size, num_pages, "),
    (("--engine", "page_size=0"), "page_size='0': Input should be greater than or equal to 1"),
    (("--limit", "0"), "argument --limit: 0 is less than 1"),
    (("--limit", "x"), "argument --limit: invalid positive value: 'x'"),
    (("--numerics", "exact"), "argument --numerics: invalid choice: 'exact'"),
    (("--nonsense",), "unrecognized arguments: --nonsense"),
    (("--json", "no/such/folder/out.json"), "--json: no such folder"),
    (("--model", "nowhere"), "model folder nowhere does not exist"),
])  # fmt: skip
def test_unusable_arguments_exit_2_in_one_line(
    model: Path, prompts: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert verify(model, prompts, *more) == 2
    assert message in one_error_line(capsys)


def test_a_checkpoint_that_cannot_be_read_exits_2(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "model.safetensors").write_text("nonsense")
    assert verify(broken, prompts) == 2
    assert "weights can't be read" in one_error_line(capsys)


def test_a_prompt_that_does_not_fit_is_named_and_the_rest_compared(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("sort 1 2 ->\n" + "1 " * 100 + "\nsort 3 1 ->\n")
    result = result_of(model, path, tmp_path)
    # the rest agrees, but "equal" would claim something about a prompt that was never compared
    assert (result["exit_code"], result["equal"], result["num_tokens"]) == (2, True, 16)
    assert [failure["line"] for failure in result["failed"]] == [2]
    assert "line 2: not compared: the prompt has 100 tokens" in capsys.readouterr().out


def test_a_prompt_that_does_not_fit_is_named_once_for_all_its_samples(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("sort 1 2 ->\n" + "1 " * 100 + "\n")
    result = result_of(model, path, tmp_path, "--n", "3")
    assert [failure["line"] for failure in result["failed"]] == [2]
    shown = capsys.readouterr().out
    assert shown.count("line 2: not compared") == 1
    assert "1 prompt could not be served" in shown


def test_a_parquet_row_may_lack_what_another_has(model: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"prompt_token_ids": [3, 5, 6], "prompt": None, "question": None},
        {"prompt_token_ids": None, "prompt": "sort 1 2 ->", "question": None},
        {"prompt_token_ids": None, "prompt": None, "question": "sort 1 2 ->"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert result_of(model, tmp_path / "a.parquet", tmp_path)["num_samples"] == 3


@pytest.mark.parametrize("names", [("--json", "--html"), ("--json", "--dump"), ("--dump", "--prompts")])
def test_an_output_that_would_replace_another_file_of_the_command_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], names: tuple[str, str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "sort 1 ->"}\n')
    output = tmp_path / "other.jsonl" if "--prompts" not in names else path
    more = [part for name in names if name != "--prompts" for part in (name, str(output))]
    assert verify(model, path, *more) == 2
    assert f"{names[0]}: {output} is also what {names[1][2:]!r} names" in one_error_line(capsys)
    assert path.read_text() == '{"prompt": "sort 1 ->"}\n'


@pytest.mark.parametrize(("words", "right"), [
    (["attribute", "d.jsonl", "--model", "m"], "attribute takes a dump by name: rlalign-verify attribute --dump FILE"),
    (["bisect", "--model", "m", "d.jsonl"], "bisect takes a dump by name: rlalign-verify bisect --dump FILE"),
    (["dump", "--dump", "d.jsonl", "--model", "m"], "dump takes dumps without --dump: rlalign-verify dump FILE"),
    (["dump", "--dump=d.jsonl", "--model", "m"], "dump takes dumps without --dump: rlalign-verify dump FILE"),
    (["compare", "--dump", "d.jsonl"], "compare takes dumps without --dump: rlalign-verify compare A B"),
    (["attribute", "--model", "m"], None),
    (["bisect", "--model", "m", "--prompts", "p", "--dump", "d.jsonl"], None),
    (["bisect", "--model", "m", "--prompts", "p", "q"], None),
    (["dump", "d.jsonl"], None),
    ([], None),
])  # fmt: skip
def test_a_dump_named_as_another_command_takes_it_is_told_the_right_form(
    capsys: pytest.CaptureFixture[str], words: list[str], right: str | None
) -> None:
    assert main(words) == 2
    said = one_error_line(capsys)
    assert right in said if right is not None else "takes" not in said


def test_nothing_compared_exits_2(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt_token_ids": [999999]}\n')
    assert verify(model, path) == 2
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2, "why, and the verdict: no table of nan"
    assert shown[0].startswith("line 1: not compared: prompt token id 999999")
    assert shown[1].startswith("nothing was compared")


def test_an_internal_error_exits_3_without_a_traceback(
    model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlalign.cli import rescoring

    monkeypatch.setattr(rescoring, "rescore", lambda *a, **k: {}["nothing"])
    assert verify(model, prompts) == 3
    said = capsys.readouterr().err
    assert said.startswith("internal error: KeyError: 'nothing'")
    assert "Traceback" not in said
    assert verify(model, prompts, "--traceback") == 3
    assert "Traceback" in capsys.readouterr().err


def test_the_script_is_the_same_command(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(root), str(root / "kernels")))}
    command = [sys.executable, "-P", str(root / "scripts" / "verify_logprobs.py")]
    shown = subprocess.run([*command, "run", "--help"], capture_output=True, text=True, env=environment, timeout=60)
    assert shown.returncode == 0
    assert "--temperature" in shown.stdout
    missing = [*command, "run", "--model", str(tmp_path), "--prompts", str(tmp_path / "none.txt")]
    done = subprocess.run(missing, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: no such file: {tmp_path / 'none.txt'}\n"


def test_html_shows_the_pictures_of_what_differs(
    model: Path, prompts: Path, tmp_path: Path, broken_train: list[str]
) -> None:
    pytest.importorskip("plotly", reason="HTML reports need plotly, the extra 'report'")
    assert verify(model, prompts, "--html", str(tmp_path / "page.html")) == 1
    page = parse(tmp_path / "page.html")
    assert page.sections == ["Agreement", "Where", "Policy"]
    assert {"|Δ| of every token", "where in the response", "along the worst sequence", "worst tokens"} <= {*page.titles}
    assert "rollout and trainer differ on" in page.text
    assert len(broken_train) == 2


def test_html_that_cannot_be_written_is_an_error_before_any_work(
    model: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(model, prompts, "--html", "no/such/folder/page.html") == 2
    assert "--html: no such folder" in one_error_line(capsys)
