"""Settings of a run that goes on: its own, with what was given on the command line on top; and whose run it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rlalign.config import Config, config_from_dict


def resumed_config(path: Path, overrides: Sequence[str]) -> Config:
    """The config of the run in ``path`` with ``overrides`` (``group.field=value``) applied.

    Raises FileNotFoundError if there is no run, ValueError for an override that can't be applied to one.
    """
    file = Path(path) / "config.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"run.resume={path}: there is no run, config.yaml is missing")
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    for override in overrides:
        _apply(values, override)
    values["run"]["resume"], values["run"]["dir"] = str(path), str(path)
    return config_from_dict(values)


def check_estimator(config: Config, recipe: str, wanted: str) -> None:
    """Raises ValueError unless ``algorithm.adv_estimator`` is the one that the recipe computes."""
    given = config.algorithm.adv_estimator
    if given != wanted:
        other = "that is ppo.py's" if given == "gae" else "that is grpo.py's"
        raise ValueError(f"algorithm.adv_estimator={given}: recipes/{recipe}.py needs {wanted}; {other}")


def _apply(values: dict[str, Any], override: str) -> None:
    name, equals, text = override.lstrip("+").partition("=")
    *groups, field = name.split(".")
    target: Any = values
    for group in groups:
        target = target.get(group) if isinstance(target, dict) else None
    if not equals or not isinstance(target, dict) or isinstance(target.get(field), dict):
        raise ValueError(
            f"{override!r} can't be given with run.resume: the run keeps its groups; override single fields, "
            "such as run.steps=100"
        )
    if name == "run.dir":
        raise ValueError("run.dir can't be given with run.resume: the run goes on in its own folder")
    target[field] = yaml.safe_load(text)
