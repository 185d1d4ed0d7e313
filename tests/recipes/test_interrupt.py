"""Ctrl-C on the real command: a checkpoint, exit 130, nothing left running, and a run that goes on exactly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpo
import pytest
from support.runs import summary, tiny_run

from rlalign.config import Config, config_to_dict
from rlalign.run import resumed_config

ROOT = Path(__file__).resolve().parents[2]


def overrides(config: Config) -> list[str]:
    """What differs from the defaults, as a command line says it."""
    default = config_to_dict(Config())
    return [
        f"{section}.{name}={value}"
        for section, fields in config_to_dict(config).items()
        if isinstance(fields, dict)
        for name, value in fields.items()
        if value != default[section][name]
    ]


def running_in_session(leader: int) -> list[str]:
    """Command lines of the processes of a session that are still there."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) == leader:
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except (ProcessLookupError, FileNotFoundError, PermissionError):
            continue
    return found


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for leftovers in /proc")
def test_ctrl_c_writes_a_checkpoint_and_leaves_nothing_running(shared_ray, tmp_path):
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "recipes" / "grpo.py"), *overrides(tiny_run(stopped, run={"steps": 10_000}))],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        metrics = stopped / "metrics.jsonl"
        deadline = time.monotonic() + 240
        while not metrics.is_file() or metrics.read_text().count("\n") < 4:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)  # to the whole group, as a terminal does
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert f"run.resume={stopped}" in output and "Traceback" not in output
    assert running_in_session(process.pid) == []
    found = summary(stopped)
    assert found["status"] == "interrupted" and found["steps"] >= 2

    steps = found["steps"] + 1
    grpo.train(resumed_config(stopped, [f"run.steps={steps}"]))
    grpo.train(tiny_run(whole, run={"steps": steps}))
    assert summary(stopped)["final_weights_sha256"] == summary(whole)["final_weights_sha256"]
