"""tune.py on a CPU: kernels run in Triton's interpreter, their times are made up; the table is the real one."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rlalign_kernels import tuned

from rlalign.cli import tune as tune_module
from rlalign.cli.bench_kernels import Case
from rlalign.cli.tune import default_path, main, make_parser
from rlalign.cli.tune_problems import Bucket, buckets
from rlalign.cli.tune_search import search

interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or importlib.util.find_spec("triton") is None,
    reason="needs Triton's interpreter: triton installed, and no GPU",
)
ARGUMENTS = ["--shapes", "32x32", "--head", "140x32", "--dtype", "float32", "--rows", "1,20", "--rounds", "3"]


def clock(ms: Callable[[str], float]) -> Callable[[Case, int], dict[str, list[float]]]:
    """A measure that runs linears once, and reads every time off the candidate's name."""

    def measure(case: Case, rounds: int) -> dict[str, list[float]]:
        for call in case.calls.values() if case.name.startswith("linear ") else ():
            call()
        return {name: [ms(name)] * rounds for name in case.calls}

    return measure


def tune(path: Path, ms: Callable[[str], float], *more: str) -> tuple[int, dict[str, Any]]:
    args = make_parser().parse_args([*ARGUMENTS, *more])
    code = tune_module.tune(args, torch.device("cpu"), clock(ms), path, {"gpu": "none"})
    return code, json.loads(path.read_text())


@interpreted
def test_the_fastest_schedule_goes_into_a_table_that_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, content = tune(tmp_path / "t.json", lambda name: 0.5 if "num_warps=8" in name else 1.0)
    assert code == 0
    assert [(e["first_row"], e["last_row"], e["tile"]["num_warps"]) for e in content["linear"]] == []
    assert [(e["sample"], e["first_row"], e["last_row"]) for e in content["head"]] == [
        (False, 2, 20), (True, 2, 20)
    ]  # fmt: skip
    table = tuned.read(tmp_path / "t.json", (9, 0))
    assert {entry.tile.num_warps for entry in table.head} == {8}
    assert [m["schedule"] is None for m in content["measured"]] == [True, True, True, False, True, False]
    assert content["measured"][3]["ratio"] == pytest.approx(0.5)
    assert set(content["measured"][3]["ms"]) == {"11", "20"}
    assert content["machine"] == {"gpu": "none"}
    printed = capsys.readouterr().out
    assert f"RLALIGN_TUNED={tmp_path / 't.json'}" in printed.replace("\n", "")
    assert "num_warps 8" in printed and "the default stays" in printed


@interpreted
def test_linears_schedules_and_a_default_that_stays(tmp_path: Path) -> None:
    more = ("--operators", "linear", "--rows", "4,20")
    code, content = tune(tmp_path / "t.json", lambda name: 0.7 if "block_n=64" in name else 1.0, *more)
    assert code == 0
    assert [(e["width"], e["first_row"], e["last_row"], e["kind"]) for e in content["linear"]] == [
        (32, 1, 4, "Tile"), (32, 5, 20, "Tile")
    ]  # fmt: skip
    assert all(entry["tile"]["block_n"] == 64 for entry in content["linear"])
    _, content = tune(tmp_path / "t.json", lambda name: 0.99 if "block_n=64" in name else 1.0, *more)
    assert content["linear"] == []  # a hundredth is not worth an entry


@interpreted
def test_a_candidate_with_other_bits_is_refused_and_the_next_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlalign_kernels.gemm import triton_backend

    real = triton_backend.forward

    def forward(*args: Any, schedule: Any = None, **keywords: Any) -> torch.Tensor:
        out = real(*args, schedule=schedule, **keywords)
        return out * (1 + 2**-20) if (schedule.block_m, schedule.block_n) == (16, 64) else out

    monkeypatch.setattr(triton_backend, "forward", forward)
    times = {"block_m=16, block_n=64": 0.5, "block_m=32, block_n=32": 0.8}
    code, content = tune(
        tmp_path / "t.json", lambda name: next((ms for part, ms in times.items() if part in name), 1.0),
        "--operators", "linear", "--rows", "20",
    )  # fmt: skip
    assert code == 1
    (entry,) = content["linear"]
    assert (entry["tile"]["block_m"], entry["tile"]["block_n"]) == (32, 32)
    assert "block_n=64" in content["measured"][0]["refused"][0]
    assert "refused, its bits differ: Tile(" in capsys.readouterr().out


def test_a_search_takes_what_is_faster_at_every_measured_row_count() -> None:
    class Fake:
        name = "fake"

        def default(self, num_rows: int) -> str:
            return "d"

        def candidates(self, num_rows: int) -> list[str]:
            return ["d", "a", "b", "absent"]

        def call(self, tile: str, num_rows: int) -> Callable[[], tuple[str, int]]:
            return lambda: (tile, num_rows)

        def differs(self, tile: str, num_rows: int) -> None:
            proven.append((tile, num_rows))

    def measure(case: Case, rounds: int) -> dict[str, list[float]]:
        times = {"d": lambda n: 1.0, "a": lambda n: 0.2 if n == 8 else 1.1, "b": lambda n: 0.9}
        found = {name: call() for name, call in case.calls.items()}
        return {name: [times[tile](n)] for name, (tile, n) in found.items() if tile in times}

    proven: list[tuple[str, int]] = []
    found = search(Fake(), Bucket(3, 8), measure, 3)
    assert (found.tile, found.num_candidates) == ("b", 3)
    assert found.ratio == pytest.approx(0.9)
    assert (found.ms, found.default_ms) == ({6: 0.9, 8: 0.9}, {6: 1.0, 8: 1.0})
    assert proven == [("b", 3), ("b", 6), ("b", 8)]


def test_buckets_cover_every_row_count_once() -> None:
    assert buckets([1, 16, 20]) == [Bucket(1, 1), Bucket(2, 16), Bucket(17, 20)]
    assert (Bucket(1, 1).measured, Bucket(17, 20).measured) == ((1,), (19, 20))
    with pytest.raises(ValueError, match="--rows 16,16"):
        buckets([16, 16])


def test_without_a_gpu_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--shapes", "64x64"]) == 2
    assert capsys.readouterr().err == "error: tune.py measures GPU kernels, and torch finds no GPU here\n"
    assert main(["--shapes", "64"]) == 2
    assert "argument --shapes: '64' is not of the form NxK" in capsys.readouterr().err


def test_nothing_to_tune_is_refused(tmp_path: Path) -> None:
    args = make_parser().parse_args([])
    with pytest.raises(ValueError, match="nothing to tune"):
        tune_module.tune(args, torch.device("cpu"), clock(lambda _: 1.0), tmp_path / "t.json", {})


def test_the_default_path_names_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_path("NVIDIA H200") == tmp_path / "rlalign" / "schedules" / "nvidia-h200.json"


def test_a_default_that_can_not_run_is_an_error() -> None:
    class Fake:
        name = "fake"
        default = staticmethod(lambda n: "d")
        candidates = staticmethod(lambda n: [])
        call = staticmethod(lambda tile, n: lambda: None)

    def measure(case: Case, rounds: int) -> dict[str, list[float]]:
        replace(case).refused["default"] = "out of memory"
        return {}

    with pytest.raises(RuntimeError, match="the default schedule can't run here: out of memory"):
        search(Fake(), Bucket(1, 1), measure, 1)


def test_actors_take_the_table_that_the_run_was_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from rlalign.actors.process import environment

    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    assert tuned.VARIABLE not in environment(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(tuned.VARIABLE, "t.json")
    assert environment(1)[tuned.VARIABLE] == str(tmp_path / "t.json")


def test_a_models_layers_are_tuned_as_an_engine_fuses_them(tmp_path: Path) -> None:
    from transformers import Phi3Config, Qwen3Config

    common = {"vocab_size": 70, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    Qwen3Config(**common, **heads, head_dim=16).save_pretrained(tmp_path / "qwen3")
    Phi3Config(**common, **heads).save_pretrained(tmp_path / "phi3")

    def tuned_layers(name: str) -> set[str]:
        args = make_parser().parse_args(["--model", str(tmp_path / name), "--operators", "linear"])
        return {problem.name for _, problem in tune_module._problems(args, torch.device("cpu"))}

    apart = {"linear 64 x 32", "linear 32 x 32", "linear 32 x 64", "linear 48 x 32", "linear 32 x 48"}
    assert tuned_layers("qwen3") == apart | {"linear 128 x 32", "linear 96 x 32"}
    assert tuned_layers("phi3") == {"linear 64 x 32", "linear 32 x 32", "linear 96 x 32", "linear 32 x 48"}
