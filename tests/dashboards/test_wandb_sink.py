"""The offline file is read back by wandb itself: ``wandb leet inspect`` prints every record of it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlalign.config import TrackingConfig
from rlalign.dashboards import NullSink, PictureData, WandbSink, make_sink
from rlalign.dashboards.alerts import Alert
from rlalign.dashboards.pictures import Trace
from rlalign.dashboards.sink import WORST_COLUMNS
from rlalign.dashboards.snapshot import LayerRow

WORST = dict(zip(WORST_COLUMNS, ("differs", "1/2/3", 4, 5, "a ⟦b⟧", -1.0, -1.5, -0.5, 9, 6, 7, 8, "stop"), strict=True))


def pictures(*, equal: bool = False) -> PictureData:
    rollout = -np.random.default_rng(0).exponential(size=200).astype(np.float32)
    train = rollout.copy()
    if not equal:
        train[::4] -= np.float32(1e-3)
        train[3] = np.nan
    delta = train - rollout
    trace = Trace("1/2/3", np.arange(4), rollout[:4], train[:4], ("a", "b", "c", "d"))
    place = np.arange(200) % 20
    return PictureData(rollout, train, delta, ~np.isfinite(delta), [] if equal else [WORST], place, trace)


def records(folder: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-P", "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [json.loads(line) for line in done.stdout.splitlines()]


def history(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row["history"]["item"] for row in rows if row["type"] == "history"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """(wandb's folder, its records) of a short offline run; the user's environment tries to interfere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "online")
        patch.delenv("WANDB_API_KEY", raising=False)
        before = dict(os.environ)
        sink = make_sink(TrackingConfig(name="n"), tmp_path_factory.mktemp("run"), {"trainer": {"lr": 0.5}})
        assert isinstance(sink, WandbSink)
        sink.log(0, {"align/mismatch_count": 3.0, "reward/mean": 0.25, "entropy": 1.5})
        sink.pictures(0, pictures())
        sink.log(1, {"align/mismatch_count": 1.0, "align/logp_abs_diff/max": float("inf")})
        sink.pictures(1, pictures(equal=True))
        for step, ulp in ((0, 0.0), (1, 3.0)):
            sink.layers(step, LayerRow(("model.layers.0", "model.norm"), (0.0, ulp)))
        sink.alert(Alert("halt", "rlalign: it has stopped", "step 1: they differ", "ERROR"))
        sink.close()
        sink.close()
        # WANDB_SERVICE is wandb's own note of its process
        assert {**dict(os.environ), "WANDB_SERVICE": ""} == {**before, "WANDB_SERVICE": ""}
    return sink.folder, records(sink.folder)


def test_metrics_come_back(run: tuple[Path, list[dict[str, Any]]]) -> None:
    rows = history(run[1])
    assert [row["step"] for row in rows] == [0, 0, 1, 1, 0, 1]
    assert (rows[0]["align/mismatch_count"], rows[0]["reward/mean"], rows[0]["entropy"]) == (3.0, 0.25, 1.5)
    assert rows[2]["align/logp_abs_diff/max"] == "Infinity"


def test_config_project_and_clean_end_come_back(run: tuple[Path, list[dict[str, Any]]]) -> None:
    started = next(row["run"] for row in run[1] if row["type"] == "run")
    assert started["project"] == "rlalign"
    assert started["display_name"] == "n"
    assert started["config"]["update"]["trainer"] == {"lr": 0.5}
    assert run[1][-1]["exit"]["exit_code"] == 0
    assert run[0].name.startswith("offline-run-")


def test_alerts_come_back(run: tuple[Path, list[dict[str, Any]]]) -> None:
    (alert,) = [row["alert"] for row in run[1] if row["type"] == "alert"]
    assert (alert["title"], alert["text"]) == ("rlalign: it has stopped", "step 1: they differ")
    assert alert["level"] == "ERROR"


def test_step_is_the_axis_and_the_worst_is_kept(run: tuple[Path, list[dict[str, Any]]]) -> None:
    metrics = [row["metric"] for row in run[1] if row["type"] == "metric"]
    assert {m["step_metric"] for m in metrics if m.get("name") != "step"} == {"step"}
    assert "where/*" in {m.get("glob_name") for m in metrics}
    summaries = [row["summary"]["update"] for row in run[1] if row["type"] == "summary"]
    kept = {name: value for update in summaries for name, value in update.items()}
    assert kept["align/mismatch_count"] == {"max": 3, "last": 1}
    assert kept["entropy"] == 1.5


@pytest.mark.parametrize(
    "name", ["abs_diff_histogram", "prob_scatter", "worst_tokens", "position_heat_map", "layer_heat_map", "trace"]
)
def test_media_come_back_with_their_files(run: tuple[Path, list[dict[str, Any]]], name: str) -> None:
    folder, rows = run
    shown = [row for row in history(rows) if f"where/{name}.path" in row]
    assert [row["step"] for row in shown] == [0, 1]
    listed = {file["path"] for row in rows if row["type"] == "files" for file in row["files"]["files"]}
    for row in shown:
        path = row[f"where/{name}.path"]
        content = (folder / "files" / path).read_bytes()
        assert hashlib.sha256(content).hexdigest() == row[f"where/{name}.sha256"]
        assert path in listed
        if name != "worst_tokens":
            assert content.startswith(b"\x89PNG")


def test_worst_token_table_has_its_row_and_keeps_its_columns(run: tuple[Path, list[dict[str, Any]]]) -> None:
    paths = [row["where/worst_tokens.path"] for row in history(run[1]) if "where/worst_tokens.path" in row]
    first, second = (json.loads((run[0] / "files" / path).read_text()) for path in paths)
    assert first["columns"] == second["columns"] == list(WORST_COLUMNS)
    assert first["data"] == [list(WORST.values())]
    assert second["data"] == []


def test_everything_lies_in_the_runs_folder(run: tuple[Path, list[dict[str, Any]]]) -> None:
    artifacts = [row["artifact"] for row in run[1] if row["type"] == "artifact"]
    local = [entry["local_path"] for a in artifacts for entry in a["manifest"]["contents"]]
    assert local
    assert all(Path(path).is_relative_to(run[0].parent) for path in local)


def test_disabled_does_not_import_wandb(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from rlalign.config import TrackingConfig
        from rlalign.dashboards import make_sink
        sink = make_sink(TrackingConfig(mode="disabled"), Path(sys.argv[1]) / "run", {})
        sink.log(0, {"a": 1.0})
        sink.close()
        assert "wandb" not in sys.modules
    """
    subprocess.run([sys.executable, "-P", "-c", textwrap.dedent(code), str(tmp_path)], check=True, timeout=60)
    assert list(tmp_path.iterdir()) == []
    assert isinstance(make_sink(TrackingConfig(mode="disabled"), tmp_path, {}), NullSink)


def test_online_without_a_key_fails_at_once_and_asks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
    with pytest.raises(ValueError, match=r"tracking\.mode=online: wandb could not start: .*API key") as caught:
        make_sink(TrackingConfig(mode="online"), tmp_path, {})
    assert "\n" not in str(caught.value)
    assert "WANDB_SILENT" not in os.environ


def test_a_folder_that_cannot_be_made_is_a_hard_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"tracking\.mode=offline: wandb could not start"):
        make_sink(TrackingConfig(), tmp_path / "file", {})


def test_a_failure_warns_once_and_switches_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = WandbSink(TrackingConfig(), tmp_path, {})
    calls: list[object] = []

    def broken(values: object) -> None:
        calls.append(values)
        raise ConnectionResetError("lost")

    monkeypatch.setattr(sink._run, "log", broken)
    with caplog.at_level(logging.WARNING, logger="rlalign"):
        sink.log(0, {"a": 1.0})
        sink.log(1, {"a": 1.0})
        sink.pictures(1, pictures())
        sink.close()
    assert len(calls) == 1
    assert [record.getMessage() for record in caplog.records if record.name.startswith("rlalign")] == [
        "wandb failed and is switched off for the rest of the run: ConnectionResetError: lost"
    ]
    assert "WANDB_SILENT" not in os.environ


def test_a_picture_holds_nobody_up_and_everything_keeps_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink, drawn = WandbSink(TrackingConfig(), tmp_path, {}), threading.Event()
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(sink._run, "log", calls.append)
    monkeypatch.setattr("rlalign.dashboards.sink._media", lambda *_: {"drawn": drawn.wait(60)})
    sink.log(1, {"a": 1.0})
    sink.pictures(1, PictureData(*[np.zeros(0, np.float32)] * 3, np.zeros(0, np.bool_), []))
    metrics = {"a": 2.0}
    sink.log(2, metrics)
    metrics["a"] = 3.0  # the caller may go on with it
    drawn.set()
    sink.close()
    assert calls == [{"step": 1, "a": 1.0}, {"step": 1, "drawn": True}, {"step": 2, "a": 2.0}]
    sink.log(3, metrics)  # after the end: nothing, and no wait
    assert len(calls) == 3


def test_a_wandb_that_hangs_is_switched_off_when_no_more_calls_have_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlalign.dashboards.sink._WAITING_CALLS", 2)
    sink, release = WandbSink(TrackingConfig(), tmp_path, {}, close_seconds=0.5), threading.Event()
    monkeypatch.setattr(sink._run, "log", lambda _: release.wait(120))
    with caplog.at_level(logging.WARNING, logger="rlalign"):
        for step in range(9):
            sink.log(step, {})
        release.set()
        sink.close()
    assert caplog.text.count("wandb failed and is switched off for the rest of the run: no answer within 0.5 s") == 1


def test_a_call_that_ends_its_thread_is_a_failure_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = WandbSink(TrackingConfig(), tmp_path, {})
    monkeypatch.setattr(sink._run, "log", lambda _: sys.exit("gone"))
    with caplog.at_level(logging.WARNING, logger="rlalign"):
        sink.log(1, {})
        sink.log(2, {})
        sink.close()
    assert caplog.text.count("wandb failed and is switched off for the rest of the run: SystemExit: gone") == 1


def test_close_is_bounded_in_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = WandbSink(TrackingConfig(), tmp_path, {}, close_seconds=0.5)
    release, real = threading.Event(), sink._run
    assert real is not None
    finish = real.finish
    monkeypatch.setattr(real, "finish", lambda **_: release.wait(60))
    # the stuck service would hold up wandb's own exit hook as well
    monkeypatch.setattr("rlalign.dashboards.sink._teardown", lambda: finish())
    with caplog.at_level(logging.WARNING, logger="rlalign"):
        sink.close()
    release.set()
    assert "wandb did not finish: no answer within 1 s" in caplog.text


KILLED = """
    import os, subprocess, sys, time
    from pathlib import Path
    from rlalign.config import TrackingConfig
    from rlalign.dashboards import make_sink

    sink = make_sink(TrackingConfig(), Path(sys.argv[1]), {})
    sink.log(0, {"a": 1.0})
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, rest = entry.read_text().rsplit(")", 1)
        except OSError:
            continue
        if rest.split()[1] == str(os.getpid()) and "wandb-core" in name:
            assert b"--no-observability" in (entry.parent / "cmdline").read_bytes()
            os.kill(int(entry.parent.name), 9)
    time.sleep(0.5)
    for step in range(1, 6):
        sink.log(step, {"a": 1.0})
        time.sleep(0.1)
    sink.close()
    print("trained to the end")
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds wandb's process through /proc")
def test_training_outlives_wandbs_own_process(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", textwrap.dedent(KILLED), str(tmp_path)]
    # without this the child would share the process of the tests above
    alone = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=alone)
    assert (done.returncode, done.stdout) == (0, "trained to the end\n")
    assert done.stderr.count("switched off") == 1
    assert "Traceback" not in done.stderr
