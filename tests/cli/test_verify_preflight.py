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
    (["none.yaml"], "no such file: none.yaml"),
    (["--rollout", "{rollout}", "--train", "{train}", "--json", "no/such/a.json"], "--json: no such folder"),
])  # fmt: skip
def test_unusable_arguments_exit_2_in_one_line(
    files: tuple[str, str], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["preflight", *(text.format(rollout=files[0], train=files[1]) for text in arguments)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said
