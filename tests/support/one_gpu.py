"""``experiment=one_gpu`` with settings changed, on questions made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from rlalign.config import Config, config_from_dict

ROOT = Path(__file__).resolve().parents[2]


def one_gpu(*overrides: str) -> Config:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        settings = compose("grpo", ["experiment=one_gpu", *overrides])
    return config_from_dict(OmegaConf.to_container(settings, resolve=True, throw_on_missing=True))


def questions(path: Path, count: int) -> Path:
    """A file of ``count`` rows as GSM8K's."""
    rows = [{"question": f"What is {n} + {n}?", "answer": f"Twice {n}.\n#### {2 * n}"} for n in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path
