"""The doctor: what holds, what does not and is named, exit codes, JSON. Operators are planted where bits must break."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rlalign_kernels import claims, tuned
from rlalign_kernels.claims import AttentionShape, Setting, Shapes
from rlalign_kernels.gemm.schedules import Tile

from rlalign.cli.doctor import main
from rlalign.cli.model_shapes import model_shapes

TINY = Shapes(((48, 32), (32, 48)), (130, 32), (AttentionShape(2, 1, 16, 16),), (32,), 50)
OPERATORS = ["linear", "attention_packed", "attention_paged", "linear_logprob", "linear_sample", "rms_norm"]
OPERATORS += ["layer_norm", "rotary", "silu", "swiglu", "gelu", "geglu"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "SMALL", TINY)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RLALIGN_TRACEBACK", raising=False)


def plant(
    monkeypatch: pytest.MonkeyPatch, module: str, wrong: Callable[..., Any], *, table: str = "_IMPLEMENTATIONS"
) -> None:
    """Put ``wrong(real, *args)`` in place of an operator's reference."""
    by_backend = getattr(importlib.import_module(f"rlalign_kernels.{module}"), table).by_backend
    real = by_backend["reference"]
    monkeypatch.setitem(by_backend, "reference", lambda *args: wrong(real, *args))


def examined(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code = main(["--json", *arguments])
    result = json.loads(capsys.readouterr().out)
    assert result["exit_code"] == code
    return result


def broken(result: dict[str, Any]) -> dict[str, set[str]]:
    """By operator, the claims that do not hold."""
    found = {
        one["operator"]: {claim["claim"] for claim in one["claims"] if claim["holds"] is False}
        for one in result["operators"]
        if one["holds"] is False
    }
    assert all(found.values())
    return found


def test_the_reference_holds_and_the_table_has_a_line_per_operator(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "holds" in line]
    assert [line.split()[1] for line in lines if line.startswith("│")] == OPERATORS
    assert "All 12 operators keep their bits here with backend reference" in out
    assert "fingerprint, reference" in out and "product 48 x 32" in out


def test_json_has_it_all(capsys: pytest.CaptureFixture[str]) -> None:
    result = examined(capsys, "--only", "linear", "--dtype", "bfloat16")
    assert (result["exit_code"], result["holds"]) == (0, True)
    assert (result["backend"], result["device"], result["dtype"]) == ("reference", "cpu", "bfloat16")
    assert set(result["fingerprints"]) == {"reference", "native"}
    assert len(result["fingerprints"]["reference"]["sha256"]) == 64
    assert result["fingerprints"]["reference"]["sources"] == result["fingerprints"]["native"]["sources"]
    assert {"python", "torch", "transformers"} <= set(result["versions"])
    assert {"cpu", "threads"} <= set(result["machine"])
    assert result["shapes"]["linear"] == [[48, 32], [32, 48]]
    assert any(key.startswith("gemm,48,32") for key in result["schedules"])
    assert [one["operator"] for one in result["operators"]] == ["linear", "linear_logprob", "linear_sample"]
    first = result["operators"][0]["claims"][0]
    assert set(first) == {
        "operator", "shape", "claim", "holds", "num_cases", "num_differing", "found", "seconds"
    }  # fmt: skip
    assert first["num_cases"] > 10


def test_bits_that_depend_on_the_batch_are_found_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(monkeypatch, "linear", lambda real, x, *rest: real(x, *rest) * (1 + 2**-23 * (x.shape[0] > 16)))
    result = examined(capsys)
    assert result["exit_code"] == 1
    assert broken(result) == {"linear": {"rows"}}
    rows = next(claim for claim in result["operators"][0]["claims"] if claim["claim"] == "rows")
    assert 0 < rows["num_differing"] < rows["num_cases"]
    assert "alone and in 17 rows" in rows["found"]
    assert main(["--only", "linear"]) == 1
    out = capsys.readouterr().out
    assert "linear" in out.splitlines()[-1] and "linear_sample" not in out.splitlines()[-1]


def test_neighbours_that_leak_are_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plant(monkeypatch, "norm", lambda real, x, *rest: tuple(y + 0 * x.sum() for y in real(x, *rest)))
    assert broken(examined(capsys, "--only", "rms_norm")) == {"rms_norm": {"neighbours"}}


def test_gradients_that_do_not_repeat_are_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def noisy(real: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad:
            x.register_hook(lambda grad: grad + torch.rand_like(grad))
        return real(x)

    plant(monkeypatch, "activation", noisy, table="_SILU")
    assert broken(examined(capsys, "--only", "silu")) == {"silu": {"backward"}}


def test_elements_that_depend_on_their_place_are_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tail(real: Callable[..., Any], x: torch.Tensor, how: str) -> torch.Tensor:
        out = real(x, how)
        return out * (1 + 2**-22) if x.numel() % 8 else out

    plant(monkeypatch, "activation", tail, table="_GELU")
    assert "elements" in broken(examined(capsys, "--only", "gelu"))["gelu"]


def test_pages_that_change_bits_are_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def paged(real: Callable[..., Any], q: torch.Tensor, k: torch.Tensor, *rest: Any) -> Any:
        out, lse = real(q, k, *rest)
        return (out * (1 + 2**-20) if k.shape[1] == 64 else out), lse

    plant(monkeypatch, "attention.paged", paged)
    result = examined(capsys, "--only", "attention")
    assert broken(result) == {"attention_paged": {"pages", "decode"}}
    assert "pages of 64" in result["operators"][1]["claims"][0]["found"]


def test_chunks_and_lone_sequences_that_change_bits_are_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def packed(real: Callable[..., Any], q: torch.Tensor, *rest: Any) -> Any:
        out, lse = real(q, *rest)
        return (out * (1 + 2**-20) if q.shape[0] < 30 else out), lse

    plant(monkeypatch, "attention.packed", packed)
    assert {"rows", "chunks"} <= broken(examined(capsys, "--only", "attention_packed"))["attention_packed"]


def test_an_operator_that_can_not_run_is_named_with_its_error_and_the_others_are_looked_at(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("this machine offers no invariant schedule\nmore")

    plant(monkeypatch, "linear", fails)
    result = examined(capsys, "--only", "l")
    assert list(broken(result)) == ["linear"]
    found = result["operators"][0]["claims"][0]["found"]
    assert found == "RuntimeError: this machine offers no invariant schedule"
    assert len(result["operators"]) > 4


def test_native_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    table = importlib.import_module("rlalign_kernels.norm")._IMPLEMENTATIONS.by_backend
    real = table["native"]
    monkeypatch.setitem(table, "native", lambda x, *rest: tuple(y + 2**-9 * len(x) for y in real(x, *rest)))
    result = examined(capsys, "--backend", "native", "--only", "norm")
    assert broken(result)["rms_norm"] == {"rows"}
    assert result["schedules"] == {}
    assert "backend native: rms_norm" in result["verdict"]


def test_nothing_that_could_be_checked_exits_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(*_: Any) -> Any:
        raise NotImplementedError("rms_norm: not there")

    plant(monkeypatch, "norm", absent)
    result = examined(capsys, "--only", "rms_norm")
    assert (result["exit_code"], result["operators"][0]["holds"]) == (2, None)
    assert result["verdict"].startswith("Nothing could be checked")


@pytest.mark.parametrize(("arguments", "said"), [
    (["--backend", "triton"], "--backend triton: torch sees no CUDA device"),
    (["--only", "conv"], "--only 'conv' is in no operator's name"),
    (["--model", "/no/such/place"], "--model /no/such/place: no config.json there"),
    (["--dtype", "float16"], "--dtype float16 is not supported with backend reference"),
    (["--threads", "0"], "--threads 0: at least 1"),
    (["--tuned", "t.json"], "--tuned t.json: backend reference takes no table; only triton does"),
    (["--backend", "fast"], "argument --backend: invalid choice: 'fast'"),
])  # fmt: skip
def test_unusable_input_is_one_line_and_exits_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {said}")
    assert captured.err.count("\n") == 1


def test_an_internal_error_exits_3(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken_sweep(*_: Any) -> Any:
        raise KeyError("x")

    monkeypatch.setattr(claims, "all_subjects", broken_sweep)
    assert main([]) == 3
    assert capsys.readouterr().err.startswith("internal error: KeyError")


def test_a_models_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import Qwen3Config

    Qwen3Config(
        vocab_size=70, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, architectures=["Qwen3ForCausalLM"],
    ).save_pretrained(tmp_path)  # fmt: skip
    expected = Shapes(
        ((32, 32), (32, 48), (32, 64), (48, 32), (64, 32), (96, 32), (128, 32)), (70, 32),
        (AttentionShape(4, 2, 16, 16),), (32, 16), 48,
    )  # fmt: skip
    assert model_shapes(tmp_path) == model_shapes(tmp_path / "config.json") == expected
    result = examined(capsys, "--model", str(tmp_path), "--only", "linear")
    assert (result["exit_code"], result["model"]) == (0, str(tmp_path))
    assert result["shapes"]["head"] == [70, 32]


def test_both_norms_are_looked_at_in_every_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import OlmoConfig, PhiConfig

    common = {"vocab_size": 70, "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 1}
    made = {"olmo": OlmoConfig(**common, num_attention_heads=3),  # no norm of it has a weight
            "phi": PhiConfig(**common, num_attention_heads=3, qk_layernorm=True)}  # fmt: skip
    for (name, config), sizes in zip(made.items(), ({"48"}, {"48", "16"}), strict=True):
        config.architectures = [f"{name.title()}ForCausalLM"]
        config.save_pretrained(tmp_path / name)
        result = examined(capsys, "--model", str(tmp_path / name), "--only", "norm")
        assert result["exit_code"] == 0
        for operator in result["operators"]:
            assert {claim["shape"] for claim in operator["claims"]} == sizes
        assert [operator["operator"] for operator in result["operators"]] == ["rms_norm", "layer_norm"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_a_wider_layer_that_takes_other_schedules_has_them_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = importlib.import_module("rlalign_kernels.claims.linear")
    widths = (256, 1024, 4096, 6144, 2048, 12288, 16384)
    shapes = replace(TINY, linear=tuple((width, 64) for width in widths))
    where = Setting("triton", torch.device("cpu"), torch.bfloat16, (2, 9), (5,))

    def compared(setting: Setting) -> list[str]:
        found = linear.subjects(shapes, setting)
        return [one.shape for one in found if "schedules" in {claim.name for claim in one.claims()}]

    assert compared(where) == ["256 x 64", "4096 x 64", "12288 x 64"]
    assert compared(replace(where, dtype=torch.float32)) == ["256 x 64"]
    assert compared(replace(where, schedules=False)) == compared(replace(where, backend="native")) == []
    mine = Tile(16, 64, 64, 4, 3, swap=True)
    monkeypatch.setattr(tuned, "linear_tiles", lambda layer, dtype: [mine] if layer.width == 6144 else [])
    assert compared(where) == ["256 x 64", "4096 x 64", "6144 x 64", "12288 x 64"]
