"""The kernel benchmarks' cases on a CPU: in Triton's interpreter, small, and never timed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rlalign.cli import bench_linear, bench_logprob, bench_norm
from rlalign.cli.bench_kernels import Case, left_out, main, make_records, make_table, output_path

interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or importlib.util.find_spec("triton") is None,
    reason="needs Triton's interpreter: triton installed, and no GPU",
)
# Of the output layer, what needs no package beyond ours.
WITHOUT_PACKAGES = ("torch", "rlalign")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes of a moment; float16, which the interpreter takes."""
    for module in (bench_linear, bench_logprob, bench_norm):
        monkeypatch.setattr(module, "_DEVICE", "cpu")
        monkeypatch.setattr(module, "_DTYPE", torch.float16)
    monkeypatch.setattr(bench_linear, "_SHAPES", ((32, 64),))
    monkeypatch.setattr(bench_linear, "_ROWS", {"forward": (1, 5), "between": (7,), "leaves": (5,)})
    monkeypatch.setattr(bench_norm, "_ROWS", 3)
    for name, value in {"_HIDDEN": 16, "_VOCAB": 140, "_SCORED_ROWS": (3,), "_DRAWN_ROWS": (2,)}.items():
        monkeypatch.setattr(bench_logprob, name, value)
    bench_logprob._weight.cache_clear()


def made(module: ModuleType, only: str = "") -> dict[str, Case]:
    cases = [make() for make in module.make_cases(only)]
    assert len({case.name for case in cases}) == len(cases)
    assert all(case.baseline in case.calls and bool(case.flops) != bool(case.num_bytes) for case in cases)
    return {case.name: case for case in cases}


def close(a: object, b: object) -> None:
    if isinstance(a, torch.Tensor):
        torch.testing.assert_close(a.float(), b.float(), atol=2e-2, rtol=2e-2)
        return
    for one, other in zip(a, b, strict=True):
        close(one, other)


@interpreted
@pytest.mark.usefixtures("small")
def test_every_linear_is_the_same_product():
    cases = made(bench_linear)
    assert {case.table for case in cases.values()} == {"forward", "between", "leaves"}
    for case in cases.values():
        first, *others = (call() for call in case.calls.values())
        for other in others:
            close(first, other)
    ((_, calls),) = bench_linear.make_host_cases("")
    close(*(call() for call in calls.values()))


@interpreted
@pytest.mark.usefixtures("small")
def test_every_score_is_the_same_and_so_are_gradients():
    cases = made(bench_logprob, "forward")
    assert set(cases) == {"forward, 3 rows", "forward and backward, 3 rows", "forward and backward, 3 rows, Zipf's law"}
    for case in cases.values():
        close(*(case.calls[impl]() for impl in WITHOUT_PACKAGES))
        assert {"cut cross entropy"} < set(case.calls) <= set(case.computes)
        assert case.name == "forward, 3 rows" or {"cut cross entropy, exact", "liger"} < set(case.calls)


@interpreted
@pytest.mark.usefixtures("small")
def test_draws_run():
    (case,) = made(bench_logprob, "sample").values()
    assert case.calls["rlalign"]().token.shape == (2,)
    assert case.calls["torch"]().shape == (2, 1)


@interpreted
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "only",
    [
        "rms_norm 1024",
        "residual 1024",
        "of 16 heads",
        "backward 1024",
        "backward 6144",
        "rotary backward",
        "layer_norm 4096",
        "rotary 8",
        "halves",
    ],
)
def test_norms_rotary_and_activations_are_pytorchs(only):
    for case in made(bench_norm, only).values():
        close(case.calls["torch"](), case.calls["rlalign"]())


@interpreted
@pytest.mark.usefixtures("small")
def test_the_copy_moves_as_much_as_the_operator():
    case = made(bench_norm, "rms_norm 2048")["rms_norm 2048"]
    assert case.num_bytes == 2 * 3 * 2048 * 2
    assert case.calls["device copy"]().numel() * 2 * 2 == case.num_bytes


def test_a_record_says_what_was_computed_and_what_it_took():
    case = Case(
        "c", "a", {}, flops=1e9, table="score", memory=True, computes={"a": "sums"}, refused={"z": "ImportError: no z"}
    )
    records = make_records(case, {"a": [2.0, 4.0, 3.0], "b": [6.0]}, {"a": 12.5})
    assert records[0] == {
        "case": "c", "impl": "a", "ms": 3.0, "ms_rounds": [2.0, 4.0, 3.0], "baseline": "a", "tflops": 1e9 / 3.0 / 1e9,
        "extra_mib": 12.5, "table": "score", "computes": "sums", "ratio": 1.0,
    }  # fmt: skip
    assert records[1]["ratio"] == 2.0 and not {"extra_mib", "computes"} & set(records[1])
    assert make_table("t", records).row_count == 2


def test_what_is_left_out_is_said_once_with_its_reason():
    absent = "ModuleNotFoundError: No module named 'liger_kernel'"
    refused = {"one": {"liger": absent}, "two": {"liger": absent, "flex": "ValueError: ragged"}}
    assert left_out(refused) == [f"left out: liger in one, two: {absent}", "left out: flex in two: ValueError: ragged"]


def test_results_have_a_place_each(tmp_path: Path):
    assert output_path(None, "norm", "NVIDIA H200").parts[-4:] == ("benchmarks", "results", "nvidia-h200", "norm.json")
    assert output_path(tmp_path, "norm", "NVIDIA H200") == tmp_path / "norm.json"
    assert output_path(tmp_path / "n.json", "norm", "NVIDIA H200") == tmp_path / "n.json"


def test_several_kernels_do_not_go_to_one_file(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["linear", "norm", "--output", "a.json"]) != 0
    assert "names one file" in "".join(capsys.readouterr())
