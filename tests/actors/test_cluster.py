"""Which Ray a run uses: a running one that it joins and leaves as it was, or a private one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from support.runs import summary

from rlalign.actors.cluster import cluster
from rlalign.config import ClusterConfig

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "recipes", "tests")),
    "RAY_AUTH_MODE": "token",  # what a Ray started by ray.init takes by default; who joins it has to say so
}
RUN = """
import sys, pathlib, grpo
from support.runs import tiny_run
grpo.train(tiny_run(pathlib.Path(sys.argv[1]), cluster={"address": sys.argv[2]}))
"""


def free_cpus() -> float:
    return ray.available_resources()["CPU"]


def test_a_run_joins_a_ray_and_leaves_it_as_it_was(shared_ray, plain_run, tmp_path):
    """The tests' own Ray is somebody else's to a run in another process."""
    alive = ray.remote(num_cpus=0)(lambda: "alive")
    before, taken = free_cpus(), []
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path), ray.get_runtime_context().gcs_address], env=ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while process.poll() is None:
        taken.append(before - free_cpus())
        time.sleep(0.3)
    assert process.returncode == 0, process.communicate()[0]
    assert max(taken) == pytest.approx(0.1), "its two actors were in the Ray that was joined"
    deadline = time.monotonic() + 20
    while free_cpus() < before - 1e-6:
        assert time.monotonic() < deadline, "its actors are still there"
        time.sleep(0.1)
    assert ray.get(alive.remote()) == "alive"
    for name in ("final_weights_sha256", "tokens", "mismatch_count", "reward_last"):
        assert summary(tmp_path)[name] == summary(plain_run)[name], name


def test_without_an_address_the_ray_is_private_whatever_the_environment_says(monkeypatch):
    """Ray follows RAY_ADDRESS where no address is given; "local" is its word for a new one."""
    asked = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: asked.append(options.get("address")))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with cluster(ClusterConfig()):
        pass
    assert asked == ["local"]
