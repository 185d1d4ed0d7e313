"""Which Ray a run uses: a running one that it joins and leaves as it was, or a private one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpo
import pytest
import ray
from support.runs import summary, tiny_run

from rlalign.actors.cluster import cluster
from rlalign.config import ClusterConfig

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "recipes", "tests")),
    "RAY_AUTH_MODE": "token",  # what a Ray started by ray.init takes by default; who joins it has to say so
}
# stands for somebody else's cluster: answers every line with what a task says and the CPUs that nobody has taken
HEAD = """
import sys, ray
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
task = ray.remote(num_cpus=0)(lambda: "alive")
print(ray.get_runtime_context().gcs_address, flush=True)
for line in sys.stdin:
    print(ray.get(task.remote()), ray.available_resources()["CPU"], flush=True)
"""
RUN = """
import sys, pathlib, grpo
from support.runs import tiny_run
grpo.train(tiny_run(pathlib.Path(sys.argv[1]), cluster={"address": sys.argv[2]}, run={"steps": 2}))
"""


class Head:
    """A Ray in a process of its own."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HEAD], env={**ENVIRONMENT, "RAY_enable_worker_prestart": "0"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.address = self.process.stdout.readline().strip()
        assert self.address, self.process.communicate()[1]

    def ask(self) -> tuple[str, float]:
        """What a task of its own says, and the CPUs that are free."""
        self.process.stdin.write("?\n")
        self.process.stdin.flush()
        answer, free = self.process.stdout.readline().split()
        return answer, float(free)


@pytest.fixture
def head() -> Iterator[Head]:
    running = Head()
    yield running
    running.process.communicate(timeout=60)  # closes its input, which ends it


def test_a_run_joins_a_ray_and_leaves_it_as_it_was(shared_ray, head, tmp_path):
    joined, local = tmp_path / "joined", tmp_path / "local"
    assert head.ask() == ("alive", 2.0)
    taken = []
    process = subprocess.Popen([sys.executable, "-c", RUN, str(joined), head.address], env=ENVIRONMENT,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip
    while process.poll() is None:
        taken.append(2.0 - head.ask()[1])
        time.sleep(0.3)
    assert process.returncode == 0, process.communicate()[0]
    assert max(taken) == pytest.approx(0.1), "its two actors were in the Ray that was joined"
    deadline = time.monotonic() + 20
    while head.ask() != ("alive", 2.0):
        assert time.monotonic() < deadline, "its actors are still there"
        time.sleep(0.1)
    grpo.train(tiny_run(local, run={"steps": 2}))
    for name in ("final_weights_sha256", "tokens", "mismatch_count", "reward_last"):
        assert summary(joined)[name] == summary(local)[name], name


def test_without_an_address_the_ray_is_private_whatever_the_environment_says(monkeypatch):
    """Ray follows RAY_ADDRESS where no address is given; "local" is its word for a new one."""
    asked = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: asked.append(options.get("address")))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with cluster(ClusterConfig()):
        pass
    assert asked == ["local"]
