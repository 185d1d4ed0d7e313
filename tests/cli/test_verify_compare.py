"""``compare`` as a user runs it, in process: dumps against dumps, without a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.dumps import Change, error_line, one_ulp, run, with_logprob

from rlalign.cli.verify import main
from rlalign.verifier.dumps import MISSING, DumpSequence, write_dump


@pytest.fixture
def plain() -> list[DumpSequence]:
    random = np.random.default_rng(0)
    return [
        DumpSequence(f"r{i}", random.integers(0, 97, 3 + i), random.integers(0, 97, 6),
                     -random.random(6, np.float32), source=f"r{i}")
        for i in range(4)
    ]  # fmt: skip


def compare(tmp_path: Path, a: Path, b: Path, *more: str) -> dict[str, Any]:
    return run(["compare", str(a), str(b)], tmp_path, *more)


def test_compare_by_id_and_by_order(plain: list[DumpSequence], tmp_path: Path) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.parquet"
    write_dump(a, plain)
    write_dump(b, plain[::-1])
    assert compare(tmp_path, a, b)["exit_code"] == 0
    by_order = compare(tmp_path, a, b, "--by-order")
    assert (by_order["exit_code"], by_order["num_unmatched"]) == (1, 4)
    write_dump(b, [replace(s, id=f"other{s.id}") for s in plain])
    nothing = compare(tmp_path, a, b)
    assert (nothing["exit_code"], nothing["num_unmatched"]) == (2, 8)
    assert nothing["verdict"] == "nothing was compared: no sequence is on both sides"
    assert compare(tmp_path, a, b, "--by-order")["exit_code"] == 0


@pytest.mark.parametrize("swapped", [False, True])
def test_zeros_of_one_side_are_noted(plain: list[DumpSequence], tmp_path: Path, swapped: bool) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_dump(a, [replace(s, logprobs=s.logprobs - np.float32(1)) for s in plain])
    write_dump(b, [replace(s, logprobs=np.where(np.arange(6) < 2, np.float32(0), s.logprobs - 1)) for s in plain])
    whose, others = ("rollout", "train") if swapped else ("train", "rollout")
    [note] = compare(tmp_path, *((b, a) if swapped else (a, b)))["notes"]
    assert note.startswith(f"8 of 24 log-probs of {whose} are exactly 0 where {others}'s are below -0.1")
    assert compare(tmp_path, b, b)["notes"] == []


@pytest.mark.parametrize(("change", "place"), [(one_ulp, ("r2", 3)), (with_logprob(MISSING), ("r2", 3))])
def test_compare_names_the_token(
    plain: list[DumpSequence], tmp_path: Path, change: Change, place: tuple[str, int]
) -> None:
    a, b = tmp_path / "a.parquet", tmp_path / "b.jsonl"
    write_dump(a, plain)
    write_dump(b, change(plain))
    result = compare(tmp_path, a, b)
    (token,) = result["worst_tokens"]
    assert (result["exit_code"], token["id"], token["position"]) == (1, *place)


def test_compare_names_what_does_not_match(
    plain: list[DumpSequence], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_dump(a, plain)
    short = replace(plain[1], token_ids=plain[1].token_ids[:4], logprobs=plain[1].logprobs[:4])
    write_dump(b, [short, replace(plain[2], token_ids=plain[2].token_ids[::-1].copy()), plain[3]])
    result = compare(tmp_path, a, b, "--max-abs", "100")
    assert result["exit_code"] == 1
    reasons = {one["id"]: one["reason"] for one in result["unmatched"]}
    assert reasons.keys() == {"r0", "r1", "r2"}
    assert reasons["r0"] == f"only in {a} ({a}:1)"
    assert reasons["r1"] == "different lengths (6 and 4 tokens)"
    assert reasons["r2"].startswith("different token ids from position 0 on")
    assert "sequence r1 doesn't match: different lengths" in capsys.readouterr().out
    assert (result["num_tokens"], result["num_missing"]) == (18, 8)


def test_sequences_without_ids_are_shown_by_their_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt_token_ids": [1], "token_ids": [2, 3], "logprobs": [-1.0, -2.0]}
    other = [row, row | {"logprobs": [-1.0, -2.5]}, row | {"prompt_token_ids": [4]}]
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path, rows in ((a, [row] * 3), (b, other)):
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    result = compare(tmp_path, a, b)
    assert [one["id"] for one in result["unmatched"]] == ["2"]
    shown = capsys.readouterr().out
    assert f"sequence {a}:3 doesn't match: different prompts" in shown
    assert f"worst: sequence {a}:2 position 1, token 3: Δ -0.5" in shown


def test_one_of_a_kind_is_no_plural_and_a_large_distance_no_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"id": "a", "prompt_token_ids": [1], "token_ids": [2], "logprobs": [-1.0]}
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    a.write_text(json.dumps(row) + "\n" + json.dumps(row | {"id": "b"}) + "\n")
    b.write_text(json.dumps(row | {"logprobs": [-2.0]}) + "\n")
    result = compare(tmp_path, a, b)
    shown = capsys.readouterr().out
    assert "the sides differ on 1 token of 1 sequence: " in shown
    assert "; 1 sequence doesn't match; " in shown
    assert "Worst 1 of 1 differing token " in shown
    assert "> 1e6" in shown
    assert result["worst_tokens"][0]["ulp"] == 2**23


def test_the_page_shows_facts_for_people(plain: list[DumpSequence], tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    worse = [replace(plain[0], logprobs=plain[0].logprobs - np.float32(0.5)), *plain[1:]]
    write_dump(tmp_path / "a.jsonl", plain)
    write_dump(tmp_path / "b.jsonl", worse)
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "p.html")]
    assert main(["compare", *files[:2], "--html", files[2]]) == 1
    page = (tmp_path / "p.html").read_text()
    assert '<td class="short">formats</td><td class="short">rlalign, rlalign</td>' in page
    assert '<td class="short">seconds</td><td class="short">compare ' in page
    # no dump says how large a batch was
    assert '<td class="number">-1</td>' not in page


def test_compare_two_columns_of_one_file(tmp_path: Path) -> None:
    row = {"token_ids": [1, 2, 3], "loss_mask": [False, True, True], "inference_logprobs": [0.0, -1.0, -2.0],
           "trainer_logprobs": [0.0, -1.0, -2.5], "step": 1}  # fmt: skip
    path = tmp_path / "rank_0.jsonl"
    path.write_text(json.dumps(row) + "\n")
    result = compare(tmp_path, path, path, "--logprobs-b", "trainer_logprobs")
    assert (result["exit_code"], result["metrics"]["align/logp_diff/mean"]) == (1, -0.25)
    assert result["formats"] == ["prime-rl", "prime-rl"]


def test_compare_errors_name_file_line_and_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    row = {"id": "a", "prompt_token_ids": [1], "token_ids": [2], "logprobs": [-1.0]}
    good.write_text(json.dumps(row) + "\n")
    bad.write_text(json.dumps(row) + "\n" + json.dumps({**row, "id": "b", "logprobs": ["x"]}) + "\n")
    assert main(["compare", str(good), str(bad)]) == 2
    assert f"{bad}, line 2: field 'logprobs[0]' must be a log-prob" in error_line(capsys)
    bad.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    assert main(["compare", str(good), str(bad)]) == 2
    assert f"{bad}:2: a second sequence of the id 'a'" in error_line(capsys)


def test_large_text_is_read_by_another_process(
    plain: list[DumpSequence], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlalign.verifier.dumps import ahead

    monkeypatch.setattr(ahead, "_WORTH_BYTES", 1)
    path = tmp_path / "a.jsonl"
    write_dump(path, plain)
    assert [s.id for s in ahead.read_ahead(path, format="rlalign")] == ["r0", "r1", "r2", "r3"]
    path.write_text(path.read_text() + "{\n")
    with pytest.raises(ValueError, match="line 5: not valid JSON"):
        list(ahead.read_ahead(path, format="rlalign"))


def test_compare_needs_no_torch(plain: list[DumpSequence], tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_dump(path, plain)
    code = (
        "import sys\nfrom rlalign.cli.verify import main\n"
        f"code = main(['compare', {str(path)!r}, {str(path)!r}])\n"
        "print(sorted({'torch', 'transformers', 'ray', 'wandb'} & set(sys.modules)))\nsys.exit(code)"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(root), str(root / "kernels")))}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment, timeout=60
    )
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[]"), done.stderr
