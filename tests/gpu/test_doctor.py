"""The doctor on a GPU: every operator's bits hold at a model's shapes, every schedule of the tables among them."""

from __future__ import annotations

import json

import pytest

from rlalign.cli.doctor import main


@pytest.mark.timeout(600)  # a first run compiles every schedule
def test_all_bits_hold_on_this_gpu(capsys):
    code = main(["--json"])
    result = json.loads(capsys.readouterr().out)
    broken = [
        claim["found"] for one in result["operators"] for claim in one["claims"] if claim["holds"] is False
    ]  # fmt: skip
    assert broken == []
    assert (code, result["backend"], result["dtype"]) == (0, "triton", "bfloat16")
    assert all(one["holds"] for one in result["operators"])
    compared = {one["operator"] for one in result["operators"] for c in one["claims"] if c["claim"] == "schedules"}
    assert {"linear", "attention_packed", "linear_logprob", "rms_norm", "rotary", "swiglu"} <= compared
    assert set(result["fingerprints"]) == {"reference", "native", "triton"}
    assert "linear 6144 x 2048" in result["schedules"]
