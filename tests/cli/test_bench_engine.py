"""The benchmark's arithmetic and its workloads. Nothing is timed here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.engines import tiny_policy

from rlalign.cli import bench_engine
from rlalign.cli.bench_engine import IMPLEMENTATIONS, Case, batching_gain, make_cases, make_records, make_workloads


def nothing() -> None:
    pass


def test_records_are_medians_and_ratios_to_native() -> None:
    case = Case("c", 600, {"native": nothing, "invariant": nothing})
    times = {("c", "native"): [200.0, 100.0, 900.0], ("c", "invariant"): [250.0, 300.0, 310.0]}
    native, invariant = make_records([case], times)
    assert (native["ms"], native["tokens_per_s"], native["ratio"]) == (200.0, 3000.0, 1.0)
    assert (invariant["ms"], invariant["tokens_per_s"], invariant["ratio"]) == (300.0, 2000.0, 1.5)
    assert (invariant["impl"], invariant["baseline"]) == ("invariant", "native")


def test_batching_gain_is_a_ratio_of_tokens_per_second() -> None:
    rates = {"native": (10.0, 80.0), "invariant": (5.0, 60.0)}
    records = [
        {"case": case, "impl": impl, "tokens_per_s": pair[index]}
        for impl, pair in rates.items()
        for index, case in enumerate(("rollout, 1 request", "rollout, 32 requests"))
    ]
    assert batching_gain(records) == {"native": 8.0, "invariant": 12.0}


def test_implementations_take_turns_and_warm_up_first() -> None:
    calls: list[str] = []
    case = Case("c", 1, {"native": lambda: calls.append("n"), "invariant": lambda: calls.append("i")})
    times = bench_engine.measure([case], rounds=2, device=torch.device("cpu"))
    assert "".join(calls) == "ni" + "ni" + "in"
    assert {key: len(values) for key, values in times.items()} == {("c", "native"): 2, ("c", "invariant"): 2}


def test_workloads_are_reproducible_and_of_one_32_and_many_lengths() -> None:
    workloads = make_workloads(50, response=20)
    assert workloads == make_workloads(50, response=20)
    one, many, mixed = workloads.values()
    assert (one.num_generated, many.num_generated) == (20, 32 * 20)
    assert len(set(mixed.lengths)) > 10
    assert all(0 <= token < 50 for workload in workloads.values() for prompt in workload.prompts for token in prompt)


def test_every_case_runs_on_both_implementations_and_leaves_the_weights() -> None:
    policies = {"native": tiny_policy(backend="native"), "invariant": tiny_policy(backend="reference")}
    before = {impl: policy.weights_hash() for impl, policy in policies.items()}
    for case in make_cases(policies, response=2):
        assert case.calls.keys() == {"native", "invariant"}
        for call in case.calls.values():
            call()
    assert {impl: policy.weights_hash() for impl, policy in policies.items()} == before


def test_a_response_that_the_limit_would_cut_is_refused() -> None:
    policies = {impl: tiny_policy() for impl in IMPLEMENTATIONS}
    with pytest.raises(ValueError, match=r"exceeds the limit of 256: use a smaller --response"):
        make_cases(policies, response=300)


def test_bad_arguments_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert bench_engine.main(["--rounds", "0"]) == 2
    assert "--rounds=0: at least 1" in capsys.readouterr().err
    assert bench_engine.main(["--model", str(tmp_path / "none"), "--output", str(tmp_path / "x.json")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_the_machines_name_fits_a_folder() -> None:
    name = bench_engine.machine_name(torch.device("cpu"))
    assert name and json.dumps(name) == f'"{name}"' and "/" not in name and " " not in name
