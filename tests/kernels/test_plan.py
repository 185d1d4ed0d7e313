"""Plan and fingerprint, conformance verdicts, and invariance under other instruction sets and thread counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import rlalign_kernels
import torch
from rlalign_kernels import (
    CONFORMANCE,
    Fingerprint,
    Plan,
    attention_packed,
    content,
    fingerprint,
    linear,
    plan,
    probe,
    running_operator,
)
from rlalign_kernels.gpu_plan import GpuPlan
from rlalign_kernels.reference import attention, gemm
from rlalign_kernels.reference import elementwise as elementwise_module
from support_kernels import normal, same_bits

_CHILD = Path(__file__).with_name("invariance_child.py")


def test_a_fingerprint_names_what_differs(monkeypatch):
    one = fingerprint("reference", "cpu")
    assert one.sha256 == fingerprint("reference", torch.device("cpu")).sha256
    assert "" not in (one.fields["cpu.model"], one.fields["cpu.blas"])
    assert one.fields["cpu.blas"] != "unknown"
    assert {"torch", "sources", "cpu.threads", "cpu.capability", "cpu.blas", "plan.attention"} <= set(one.fields)
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    other = fingerprint("native", "cpu")
    assert one.sha256 != other.sha256
    assert one.difference(other) == ["backend: reference != native", "cpu.mkl_cbwr:  != COMPATIBLE"]
    assert Fingerprint({"a": "1"}).difference(Fingerprint({})) == ["a: 1 != (absent)"]
    with pytest.raises(ValueError, match="backend='fast'"):
        fingerprint("fast", "cpu")


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("linear", {"float32_block": 32}),
        ("norm", {"most_lanes": 512}),
        ("attention", {"split": 2048}),
        ("attention", {"tile_bytes": 16384}),
        ("vocab", {"block": 256}),
    ],
)
def test_the_gpu_plan_is_in_the_fingerprint_field_by_field(name, changed, monkeypatch):
    one = fingerprint("triton", "cpu")
    other_plan = replace(GpuPlan(), **{name: replace(getattr(GpuPlan(), name), **changed)})
    monkeypatch.setattr(plan, "GpuPlan", lambda: other_plan)
    (difference,) = one.difference(fingerprint("triton", "cpu"))
    ((field, value),) = changed.items()
    assert difference.startswith(f"plan.{name}: ") and f"{field}={value}" in difference
    assert {key for key in one.fields if key.startswith("plan.")} == {
        f"plan.{part}" for part in ("linear", "norm", "attention", "vocab")
    }


def test_a_fingerprint_needs_no_triton():
    code = "import sys; from rlalign_kernels import fingerprint; fingerprint('triton', 'cpu'); print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-P", "-c", code], env=environment, capture_output=True, check=True)
    assert not {name for name in done.stdout.decode().split() if name.split(".")[0] == "triton"}


def test_a_plan_is_frozen():
    with pytest.raises(AttributeError):
        Plan().attention.kv_tile = 128


def test_probe_reports_every_verdict_as_json():
    report = probe(
        [("linear", (48, 64)), ("rms_norm", (80,)), ("linear_logprob", (1500, 64)), ("attention", (32, 16, 2))]
    )
    json.dumps(report)
    threads = torch.get_num_threads()
    names = {f"gemm,{shape},{threads}" for shape in ("48,64", "1024,64", "476,64", "16,80", "16,16")}
    names.add(f"elementwise,exp,{threads}")
    assert names <= set(report)
    with pytest.raises(ValueError, match="'conv' is unknown"):
        probe([("conv", (1,))])


def test_a_narrower_verdict_changes_the_schedule_and_no_bit(monkeypatch):
    x, weight = normal(100, 64, seed=0), normal(48, 64, seed=1)
    whole = linear(x, weight, backend="reference")
    base = gemm.gemm_schedule(48, 64).base
    key = ("gemm", 48, 64, torch.get_num_threads())
    monkeypatch.setitem(CONFORMANCE._verdicts, key, gemm.GemmSchedule(base, (base,), False))
    tiles = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **kwargs: tiles.append(a.shape[0]) or real(a, b, **kwargs))
    assert same_bits(linear(x, weight, backend="reference"), whole)
    assert set(tiles) == {base}


def test_fewer_rows_and_keys_than_a_tile_change_no_bit(monkeypatch):
    lengths, group = torch.tensor([1, 9, 30, 64, 100]), 2
    cu_k = torch.cat((torch.zeros(1), lengths.cumsum(0))).int()
    cu_q = torch.arange(len(lengths) + 1, dtype=torch.int32)
    total = int(cu_k[-1])
    q, k, v = normal(5, 4, 16, seed=4), normal(total, 2, 16, seed=5), normal(total, 2, 16, seed=6)

    def decode():
        shapes.clear()
        return attention_packed(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, scale=0.3, backend="reference")

    shapes: set[tuple[int, int]] = set()
    real = attention.product_batched
    monkeypatch.setattr(attention, "product_batched", lambda a, b, s: shapes.add(tuple(a.shape[1:])) or real(a, b, s))
    short = decode()
    narrow = set(shapes)
    monkeypatch.setattr(attention.Products, "_proven", lambda self, rows, keys: False)
    monkeypatch.setattr(content._CACHE, "_values", OrderedDict())
    assert same_bits(decode(), short)
    products = attention.products(16, 16)
    base = products.base
    assert shapes == {(base, 16), (base, 64)}
    # Where the machine refuses all short forms, both runs are the same one.
    proven = products.schedules(group, 16)
    assert narrow != shapes or not all(schedule.proven for schedule in proven)


def test_a_machine_without_an_invariant_schedule_is_refused(monkeypatch):
    monkeypatch.setattr(gemm, "_position_free", lambda *args: False)
    with pytest.raises(RuntimeError, match=r"linear: .*N=41, K=23"):
        linear(normal(4, 23, seed=2), normal(41, 23, seed=3), backend="reference")


def test_a_vector_function_is_first_called_on_one_thread(monkeypatch):
    sizes = []
    monkeypatch.setitem(
        elementwise_module.FUNCTIONS, "exp", lambda x, **k: sizes.append(x.numel()) or torch.exp(x, **k)
    )
    monkeypatch.delitem(CONFORMANCE._verdicts, ("elementwise", "exp", torch.get_num_threads()), raising=False)
    elementwise_module.elementwise("exp", torch.ones(40_000))
    assert sizes[0] <= 64


def test_the_running_operator_is_known_inside_only(monkeypatch):
    seen = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: seen.append(running_operator()) or real(*a, **k))
    linear(normal(16, 32, seed=4), normal(32, 32, seed=5), backend="reference")
    assert set(seen) == {"linear"}
    assert running_operator() is None


@pytest.mark.parametrize(("cbwr", "threads"), [("", (2, 3)), ("AVX2", (1, 2)), ("COMPATIBLE", (2,))])
def test_invariance_under_other_instruction_sets_and_threads(cbwr, threads):
    """Another instruction set may leave only narrow schedules; the bits must not depend on the batch all the same."""
    most = str(max(threads))
    package = str(Path(rlalign_kernels.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": most, "MKL_NUM_THREADS": most}
    # More threads than cores must not spin at every barrier.
    env["OMP_WAIT_POLICY"] = "passive"
    env.pop("MKL_CBWR", None)
    if cbwr:
        env["MKL_CBWR"] = cbwr
    command = [sys.executable, str(_CHILD), *map(str, threads)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["linear", "attention", "vocab"] * len(threads)
