"""``rlalign-verify preflight`` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.pages import parse

from rlalign.cli.verify import main

VLLM = "model: m\ndtype: bfloat16\ntemperature: 0.7\nodd: 1\n"
TRL = "model_name_or_path: m\nbf16: true\nuse_vllm: true\n"


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "rollout.yaml").write_text(f"{VLLM}max_num_seqs: 4\n")
    (tmp_path / "train.yaml").write_text(TRL)
    return str(tmp_path / "rollout.yaml"), str(tmp_path / "train.yaml")


def test_findings_exit_1_and_say_what_to_set(
    files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert main(["preflight", "--rollout", files[0], "--train", files[1], "--json", str(out)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "processed_logprobs, or temperature 1" in shown
    assert f"not judged in {files[0]} (vLLM): odd, max_num_seqs" in shown
    result = json.loads(out.read_text())
    assert result["exit_code"] == 1
    assert result["findings"][0]["keys"] == ["temperature", "TRL's own"]
    assert {one["severity"] for one in result["findings"]} == {"wrong", "differs", "note"}


def test_a_trainers_own_sampling_is_said_to_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "server.yaml").write_text("model: m\nmax_model_len: 64\nlogprobs_mode: processed_logprobs\n")
    (tmp_path / "trl.yaml").write_text(f"{TRL}temperature: 0.7\nrepetition_penalty: 1.1\n")
    files = ["--rollout", str(tmp_path / "server.yaml"), "--train", str(tmp_path / "trl.yaml")]
    assert main(["preflight", *files, "--json", str(tmp_path / "out.json")]) == 1
    assert "not looked at, but for the sampling parameters, which go with each request" in capsys.readouterr().out
    wrong = [one for one in json.loads((tmp_path / "out.json").read_text())["findings"] if one["severity"] == "wrong"]
    assert [(one["setting"], one["rollout"]) for one in wrong] == [("penalties", "repetition_penalty=1.1")]


def test_a_misspelt_key_is_told_what_it_may_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "vllm.yaml"
    path.write_text("model: m\nmax-model-len: 64\nkv-cache-dtpye: fp8\ntemprature: 0.7\nenforce_eager_2: 1\n"
                    "enforce_eager: true\nodd: 1\n")  # fmt: skip
    (tmp_path / "trl.yaml").write_text(f"{TRL}generation_kwargs: {{min_pp: 0.1, seed: 1}}\n")
    main(["preflight", "--rollout", str(path), "--train", str(tmp_path / "trl.yaml")])
    shown = " ".join(capsys.readouterr().out.split())
    # a name that the file has too was not meant
    assert (
        "kv-cache-dtpye (did you mean kv_cache_dtype?), temprature (did you mean temperature?), enforce_eager_2, odd"
        in shown
    )
    assert "generation_kwargs.min_pp (did you mean min_p?), generation_kwargs.seed" in shown


def test_nothing_found_exits_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("numerics: invariant\n")
    assert main(["preflight", str(tmp_path / "config.yaml")]) == 0
    assert capsys.readouterr().out.strip() == "nothing found that would make log-probs differ"


def test_the_page_lists_every_finding(files: tuple[str, str], tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="HTML reports need plotly, the extra 'report'")
    path = tmp_path / "page.html"
    assert main(["preflight", "--rollout", files[0], "--train", files[1], "--html", str(path)]) == 1
    page = parse(path)
    assert page.titles == ["findings", "not judged"]
    assert {"wrong", "temperature", "odd"} <= set(page.cells)


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "needs one FILE that describes both sides, or --rollout FILE and --train FILE"),
    (["--rollout", "{rollout}"], "needs one FILE"),
    (["{rollout}"], "only an engine's settings"),
    (["{train}", "--train", "{train}"], "takes one FILE"),
    (["--rollout", "{rollout}", "--train", "{rollout}"], "--train needs a trainer's"),
    (["--rollout", "{rollout}", "--train", "{train}", "--train-format", "verl"],
     "of its 3 settings verl has 0, trl 3: read it as trl"),
    (["none.yaml"], "no such file: none.yaml"),
    (["--rollout", "{rollout}", "--train", "{train}", "--json", "no/such/a.json"], "--json: no such folder"),
])  # fmt: skip
def test_unusable_arguments_exit_2_in_one_line(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["preflight", *(text.format(rollout=files[0], train=files[1]) for text in arguments)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said
