"""The conformance sweep, run where it need not run: what it lets pass, and what it refuses by name."""

from __future__ import annotations

import sys

import pytest
import torch
from rlalign_kernels import CONFORMANCE, attention_paged, linear, linear_sample, rms_norm, sweep

SETTINGS = {"backend": "reference", "dtype": torch.float32, "device": torch.device("cpu")}
SHAPES = [("linear", (48, 64)), ("rms_norm", (64,)), ("linear_logprob", (300, 32)), ("attention", (16, 24, 2))]
module = sys.modules[sweep.__module__]


def test_what_is_invariant_passes_and_is_recorded():
    sweep(SHAPES, **SETTINGS)
    report = CONFORMANCE.report()
    for operator, shape in [*SHAPES, ("elementwise", ())]:
        key = ",".join(map(str, ("sweep", operator, *shape, "reference", "float32", torch.get_num_threads())))
        assert report[key] is True


def _crowd(function):
    """The same, but a row's result depends on how many there are."""

    def wrong(x, *args, **kwargs):
        out = function(x, *args, **kwargs)
        return out * (1 + len(x) * 2**-20)

    return wrong


def _wrong_sample(*args, **kwargs):
    drawn = linear_sample(*args, **kwargs)
    return type(drawn)(drawn.token, drawn.logprob + 2**-10, None)


@pytest.mark.parametrize(
    ("name", "wrong", "operator", "shape"),
    [
        ("linear", _crowd(linear), "linear", (40, 64)),
        ("rms_norm", _crowd(rms_norm), "rms_norm", (48,)),
        ("attention_paged", _crowd(attention_paged), "attention", (16, 16, 1)),
        ("linear_sample", _wrong_sample, "linear_logprob", (200, 32)),
    ],
)
def test_what_is_not_is_named(name, wrong, operator, shape, monkeypatch):
    monkeypatch.setattr(module, name, wrong)
    monkeypatch.setattr(CONFORMANCE, "_verdicts", dict(CONFORMANCE._verdicts))
    with pytest.raises(RuntimeError, match=rf"^{operator}\({shape[0]},.*backend='reference', float32: a row's bits"):
        sweep([(operator, shape)], **SETTINGS)


def test_an_unknown_operator_is_an_error():
    with pytest.raises(ValueError, match="'conv' is unknown"):
        sweep([("conv", (1,))], **SETTINGS)
