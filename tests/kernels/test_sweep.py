"""The start-up sweep, run where it need not run: what it lets pass, and what it refuses by name."""

from __future__ import annotations

import pytest
import torch
from rlalign_kernels import CONFORMANCE, claims, linear, rms_norm, sweep
from rlalign_kernels.claims import AttentionShape, Shapes

SHAPES = Shapes(
    linear=((48, 64),), head=(300, 32), attention=(AttentionShape(2, 1, 16, 24),), norm=(64,), intermediate=48
)
SETTINGS = {
    "backend": "reference", "dtype": torch.float32, "device": torch.device("cpu"), "rows": (2, 17), "lengths": (1, 20),
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_verdicts(monkeypatch):
    others = {key: value for key, value in CONFORMANCE._verdicts.items() if key[0] != "sweep"}
    monkeypatch.setattr(CONFORMANCE, "_verdicts", others)


def test_what_is_invariant_passes_and_is_recorded():
    sweep(SHAPES, **SETTINGS)
    found = {key: value for key, value in CONFORMANCE.report().items() if key.startswith("sweep,")}
    assert set(found.values()) == {True}
    operators = {key.split(",")[1] for key in found}
    assert {"linear", "rms_norm", "attention_packed", "attention_paged", "linear_logprob", "linear_sample"} <= operators


def _crowded(function):
    """The same, but a row's result depends on how many there are."""

    def wrong(x, *args, **kwargs):
        return function(x, *args, **kwargs) * (1 + len(x) * 2**-20)

    return wrong


@pytest.mark.parametrize(
    ("place", "name", "function", "message"),
    [
        (
            claims.linear,
            "linear",
            linear,
            r"^linear 48 x 64 with backend='reference', float32 on cpu: rows: row 0 alone",
        ),
        (claims.elementwise, "rms_norm", rms_norm, r"^rms_norm 64 with backend='reference'"),
    ],
)
def test_what_is_not_is_named(place, name, function, message, monkeypatch):
    monkeypatch.setattr(place, name, _crowded(function))
    with pytest.raises(RuntimeError, match=message):
        sweep(SHAPES, **SETTINGS)


def test_an_operator_that_can_not_run_is_named():
    with pytest.raises(RuntimeError, match=r"^linear 48 x 64 with backend='reference', float64"):
        sweep(SHAPES, **{**SETTINGS, "dtype": torch.float64})
