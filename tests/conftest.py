"""The same small, quiet world for every test: threads fixed, no network, no tracker, GPU tests only with a GPU."""

from __future__ import annotations

import os
import sys

# before anything loads torch, wandb or a hub client; two test processes beside each other have a core each
THREADS = int(os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ |= {
    "MKL_NUM_THREADS": str(THREADS),
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # a test waits for its actors: they need not give way to other tests
}

from collections.abc import Iterator  # noqa: E402
from functools import cache  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING  # noqa: E402

import pytest  # noqa: E402

if TYPE_CHECKING:
    from support.actors import ActorPool


@cache
def prepare() -> None:
    import torch
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(THREADS)
    if not torch.cuda.is_available():
        # Triton's kernels run on CPU tensors then; read when they are imported
        os.environ.setdefault("TRITON_INTERPRET", "1")
    transformers_logging.disable_progress_bar()


# here, for a folder's conftest may be loaded before any hook is called, and import Triton; but not where this process
# runs no test itself: those that it is about to start import the same, which takes seconds
if "PYTEST_XDIST_WORKER" in os.environ or not any(a.startswith(("-n", "--numprocesses")) for a in sys.argv[1:]):
    prepare()


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("numprocesses", None):
        prepare()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    # long ones first; and so that one of several processes has them all, or each would start a Ray
    items.sort(key=lambda item: "shared_ray" not in item.fixturenames)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """Kernels on CPU tensors, in half the time."""
    from support.interpreter import builtins_looked_up_once

    with builtins_looked_up_once():
        yield


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[ActorPool]:
    """One Ray and few actor processes for all tests: starting them takes seconds, for every run anew."""
    from support.actors import ActorPool

    from rlalign.actors import controller
    from rlalign.actors.cluster import cluster
    from rlalign.config import ClusterConfig

    with cluster(ClusterConfig()), pytest.MonkeyPatch.context() as patch:
        pool = ActorPool()
        patch.setattr(controller, "start_actor", pool.start)
        patch.setattr(controller, "stop_actor", pool.stop)
        yield pool


@pytest.fixture(scope="session")
def plain_run(shared_ray: ActorPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the run that others are compared with: uninterrupted, with one rollout actor."""
    import grpo
    from support.runs import tiny_run

    folder = tmp_path_factory.mktemp("runs") / "plain"
    grpo.train(tiny_run(folder, tracking={"mode": "offline", "media_every": 1}))
    return folder
