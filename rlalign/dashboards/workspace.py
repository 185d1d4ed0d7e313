"""The saved view of a wandb project: one section per question, in the order in which they are read.

Made from the same table of panels as everything else; needs the extra ``workspace``.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, get_args

from rlalign.dashboards.panels import PANELS, STEP, Panel, Section

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

_PICTURES = tuple(
    f"where/{name}" for name in ("abs_diff_histogram", "prob_scatter", "position_heat_map", "layer_heat_map", "trace")
)
_TABLE = "where/worst_tokens"
_COLUMNS, _ROWS = 3, 3


def make_workspace(entity: str, project: str, *, name: str = "rlalign") -> Workspace:
    """The view as an object; ``save()`` sends it to the server. Raises ValueError if wandb-workspaces is missing."""
    try:
        import wandb_workspaces.workspaces as ws
    except ModuleNotFoundError as error:
        raise ValueError("a workspace needs wandb-workspaces: pip install 'rlalign[workspace]'") from error
    layout = ws.SectionLayoutSettings(columns=_COLUMNS, rows=_ROWS)
    sections = [
        ws.Section(
            name=section,
            panels=[chart for panel in PANELS if panel.section == section for chart in _charts(panel)],
            # agreement is why one looks: the others are opened when it is in doubt
            is_open=section in ("Agreement", "Where"),
            layout_settings=layout,
        )
        for section in get_args(Section)
    ]
    settings = ws.WorkspaceSettings(x_axis=STEP, max_runs=20)
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections, settings=settings)


def _charts(panel: Panel) -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    if panel.metrics == ("where/*",):
        return [
            *(wr.MediaBrowser(title=key.rpartition("/")[2], media_keys=[key], num_columns=1) for key in _PICTURES),
            wr.WeavePanelSummaryTable(table_name=_TABLE),
        ]
    exact = [metric for metric in panel.metrics if not metric.endswith("*")]
    prefixes = [metric[:-1] for metric in panel.metrics if metric.endswith("*")]
    charts: list[Any] = [wr.LinePlot(title=panel.title, x=STEP, y=exact)] if exact else []
    # the names behind a prefix are known only to the server, which takes a pattern
    return charts + [
        wr.LinePlot(title=f"{panel.title}: {prefix}", x=STEP, metric_regex=f"^{re.escape(prefix)}")
        for prefix in prefixes
    ]
