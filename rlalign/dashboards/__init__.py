"""Where a run shows itself: ``metrics.jsonl`` always, wandb when asked. The only room that imports wandb."""

from rlalign.dashboards.jsonl import MetricsFile, read_metrics, to_json
from rlalign.dashboards.pictures import PictureData
from rlalign.dashboards.sink import NullSink, Sink, WandbSink, make_sink

__all__ = ["MetricsFile", "NullSink", "PictureData", "Sink", "WandbSink", "make_sink", "read_metrics", "to_json"]
