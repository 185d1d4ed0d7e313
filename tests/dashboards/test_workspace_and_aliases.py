"""The saved view as an object tree, and our values under other frameworks' names, read back from the offline file."""

from __future__ import annotations

import json
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from rlalign.cli.workspace import main
from rlalign.config import TrackingConfig, config_from_dict
from rlalign.dashboards import WandbSink
from rlalign.dashboards.aliases import ALIASES, aliased
from rlalign.dashboards.panels import PANELS, Section, panel_of
from rlalign.verifier.compare import LogprobPair, compare
from rlalign.verifier.metrics import align_metrics


@pytest.fixture(scope="module")
def workspace() -> Any:
    pytest.importorskip("wandb_workspaces", reason="a workspace needs wandb-workspaces, the extra 'workspace'")
    from rlalign.dashboards.workspace import make_workspace

    return make_workspace("someone", "something")


def test_sections_in_the_order_in_which_they_are_read(workspace: Any) -> None:
    assert [section.name for section in workspace.sections] == list(get_args(Section))
    assert all(section.panels for section in workspace.sections)
    assert workspace.settings.x_axis == "step"


def test_every_metric_of_every_panel_is_in_a_chart(workspace: Any) -> None:
    for section in workspace.sections:
        names = {metric for chart in section.panels for metric in getattr(chart, "y", [])}
        patterns = [chart.metric_regex for chart in section.panels if getattr(chart, "metric_regex", None)]
        for panel in PANELS:
            if panel.section == section.name and panel.title != "pictures":
                exact = {metric for metric in panel.metrics if not metric.endswith("*")}
                assert exact <= names
                assert len(patterns) >= len(panel.metrics) - len(exact)


def test_the_pictures_are_where_the_sink_logs_them(workspace: Any) -> None:
    where = next(section for section in workspace.sections if section.name == "Where")
    shown = {key for chart in where.panels for key in getattr(chart, "media_keys", [])}
    shown |= {chart.table_name for chart in where.panels if hasattr(chart, "table_name")}
    pictures = ("abs_diff_histogram", "prob_scatter", "position_heat_map", "layer_heat_map", "trace", "worst_tokens")
    assert shown == {f"where/{name}" for name in pictures}


def test_the_server_would_get_all_of_it(workspace: Any) -> None:
    sent = workspace._to_model().model_dump_json(by_alias=True)
    assert all(metric in sent for metric in ("align/mismatch_count", "where/prob_scatter", "align/adv_skew"))


def test_the_command_shows_the_view_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("wandb_workspaces", reason="a workspace needs wandb-workspaces, the extra 'workspace'")
    assert main(["--entity", "someone", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("Agreement: ")
    assert main(["--project", "x"]) == 2
    assert "--entity" in capsys.readouterr().err


def test_aliases_stand_for_metrics_that_exist() -> None:
    one = np.float32([-1.0, -2.0])
    known = set(align_metrics(compare([LogprobPair(one, one, 2)])))
    for names in ALIASES.values():
        for ours in names.values():
            assert ours in known if ours.startswith("align/") else panel_of(ours) is not None


def test_no_alias_takes_a_name_of_ours() -> None:
    ours = [metric for panel in PANELS for metric in panel.metrics if not metric.endswith("*")]
    for names in ALIASES.values():
        assert not any(fnmatchcase(theirs, metric) for theirs in names for metric in ours)


def test_values_are_logged_once_more() -> None:
    metrics = {"align/k3": 0.5, "reward/mean": 1.0, "align/logp_abs_diff/mean": 0.25}
    assert aliased(metrics, ()) == {}
    assert aliased(metrics, ("verl", "slime")) == {
        "rollout_corr/k3_kl": 0.5, "critic/score/mean": 1.0,
        "train/train_rollout_logprob_abs_diff": 0.25, "rollout/raw_reward": 1.0,
    }  # fmt: skip


def test_an_unknown_framework_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tracking\.aliases\.0"):
        config_from_dict({"tracking": {"aliases": ["other"]}})


def test_aliases_reach_the_offline_file(tmp_path: Path) -> None:
    sink = WandbSink(TrackingConfig(aliases=("verl", "trl")), tmp_path, {})
    sink.log(1, {"align/k3": 0.5, "lr": 2.0})
    sink.close()
    command = [sys.executable, "-P", "-m", "wandb", "leet", "inspect", "--json", str(sink.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    (row,) = [one["history"]["item"] for one in map(json.loads, done.stdout.splitlines()) if one["type"] == "history"]
    expected = {"align/k3": 0.5, "rollout_corr/k3_kl": 0.5, "lr": 2.0, "actor/lr": 2.0, "learning_rate": 2.0}
    assert expected.items() <= row.items()
