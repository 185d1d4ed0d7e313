"""``scripts/plot_gap.py``: how far rollout and trainer are apart, step by step, of runs beside each other."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlalign.cli.errors import EXIT_EQUAL, run_main
from rlalign.dashboards.jsonl import read_metrics

_GAPS = {"align/logp_abs_diff/max": "-", "align/logp_abs_diff/mean": "--"}
_MATCH = "align/bitwise_match_frac"
# Below this the axis is linear, so that 0.0 has a place on it: far under the least gap of ordinary operators.
_LINEAR_BELOW = 1e-5


def read_steps(folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """A run's numerics, and its metrics of the steps that were verified. FileNotFoundError, ValueError: unusable."""
    summary = folder / "summary.json"
    if not summary.is_file():
        raise FileNotFoundError(f"{summary} is missing: a run writes it when it ends")
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if _MATCH in row]
    if not rows:
        raise ValueError(f"{folder / 'metrics.jsonl'}: no step has {_MATCH!r}")
    return str(json.loads(summary.read_text(encoding="utf-8"))["numerics"]), rows


def save_gap(runs: Sequence[Path], path: Path) -> None:
    """PNG or SVG, by ``path``: differences of log-probs above, share of tokens that differ below; x: the step."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (gap, share) = plt.subplots(2, 1, figsize=(8, 5), sharex=True, layout="constrained")
    for index, folder in enumerate(runs):
        numerics, rows = read_steps(folder)
        steps = [row["step"] for row in rows]
        for metric, style in _GAPS.items():
            label = f"{numerics}, {metric.rpartition('/')[2]}"
            gap.plot(steps, [row[metric] for row in rows], style, color=f"C{index}", label=label, marker=".")
        share.plot(
            steps, [100 * (1 - row[_MATCH]) for row in rows], color=f"C{index}", label=numerics, marker="."
        )  # fmt: skip
    gap.set_yscale("symlog", linthresh=_LINEAR_BELOW)
    gap.set_ylim(bottom=-_LINEAR_BELOW / 4)
    gap.set_ylabel("|Δ log-prob|, nats")
    share.set_ylim(-3, 103)
    share.set_ylabel("tokens that differ, %")
    share.set_xlabel("step")
    share.xaxis.get_major_locator().set_params(integer=True)
    for axes in (gap, share):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the picture; ``argv`` None takes the process's own. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="plot_gap.py", description=__doc__.partition(": ")[2], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="a run's folder")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="PNG or SVG")
    args = parser.parse_args(argv)

    def run() -> int:
        save_gap(args.runs, args.output)
        print(args.output)
        return EXIT_EQUAL

    return run_main(run)


if __name__ == "__main__":
    sys.exit(main())
