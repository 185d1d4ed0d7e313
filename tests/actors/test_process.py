"""Where a run computes, decided once for all its actors."""

from __future__ import annotations

import gc

import pytest
import torch
from support.runs import tiny_run

from rlalign.actors import Controller
from rlalign.actors.process import device_of, policy_settings, settled


@pytest.mark.parametrize(("has_gpu", "found"), [(False, "cpu"), (True, "cuda")])
def test_auto_takes_a_gpu_where_there_is_one(has_gpu, found, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    config = tiny_run(tmp_path, cluster={"device": "auto"})
    assert device_of(config) == policy_settings(config)["device"] == found
    controller = Controller(config)
    assert controller.device == controller.config.cluster.device == found
    assert device_of(tiny_run(tmp_path, cluster={"device": "cpu"})) == "cpu"


def test_a_gpu_that_is_not_there_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"cluster\.device=cuda"):
        device_of(tiny_run(tmp_path, cluster={"device": "cuda"}))


def test_what_stands_before_a_loop_is_not_walked_within_it_and_is_after_it():
    with pytest.raises(KeyError), settled():
        assert gc.get_freeze_count() > 10_000
        raise KeyError
    assert gc.get_freeze_count() == 0
