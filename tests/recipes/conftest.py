"""The run that others are compared with."""

from __future__ import annotations

from pathlib import Path

import grpo
import pytest
from support.runs import tiny_run


@pytest.fixture(scope="session")
def plain_run(shared_ray, tmp_path_factory) -> Path:
    """Folder of an uninterrupted run with one rollout actor."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    grpo.train(tiny_run(folder, tracking={"mode": "offline", "media_every": 1}))
    return folder
