"""Checkpoints: an ordinary Hugging Face folder, with the trainer's exact state beside it. No pickle anywhere.

    <path>/config.json, model.safetensors, ...     the model in compute dtype (and the tokenizer)
    <path>/trainer/optimizer.safetensors           float32 masters and moments
    <path>/trainer/critic.safetensors              the same of the critic, if there is one
    <path>/trainer/state.json                      update counts, hashes, generator states, the caller's data state

A folder is written under another name and renamed, so that <path> is always a whole checkpoint or missing.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from rlalign.generators import Generators
from rlalign.trainer.optimizer import MasterAdamW

FORMAT = 2


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends well, and vanishes when it doesn't.

    What stood at ``path`` stays beside it until the new one is in place, where ``existing_folder`` finds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, previous = path.with_name(f".{path.name}.new"), _previous(path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        _sync(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(previous, ignore_errors=True)
        path.rename(previous)
    temporary.rename(path)
    shutil.rmtree(previous, ignore_errors=True)


def existing_folder(path: Path) -> Path:
    """``path``, or the one it was replacing when the process died between two renames. FileNotFoundError if none."""
    for candidate in (path, _previous(path)):
        if (candidate / "trainer" / "state.json").is_file():
            return candidate
    what = "has no trainer/state.json" if path.is_dir() else "does not exist"
    raise FileNotFoundError(f"checkpoint {path} {what}")


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _sync(folder: Path) -> None:
    """Contents reach the disk before the name does."""
    for file in folder.rglob("*"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_state(
    folder: Path,
    optimizers: Mapping[str, MasterAdamW],
    generators: Generators,
    data_state: Mapping[str, Any],
    weights_sha256: str,
) -> None:
    """Everything but the model. ``data_state`` must be JSON: TypeError otherwise."""
    folder.mkdir()
    for name, optimizer in optimizers.items():
        _save(optimizer.state(), folder / f"{name}.safetensors")
    state = {
        "format": FORMAT,
        "num_updates": {name: optimizer.num_updates for name, optimizer in optimizers.items()},
        "masters_sha256": {name: optimizer.masters_sha256() for name, optimizer in optimizers.items()},
        "weights_sha256": weights_sha256,
        "generators": generators.state(),
        "data_state": dict(data_state),
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2, allow_nan=False) + "\n")


def read_state(folder: Path, optimizers: Mapping[str, MasterAdamW], generators: Generators) -> dict[str, Any]:
    """Restore optimizers, their modules' parameters and generators in place, bit for bit; returns the state's JSON.

    ValueError naming what differs: format, optimizers (a critic on one side only), tensors, hashes.
    """
    state = json.loads((folder / "state.json").read_text())
    if state["format"] != FORMAT:
        raise ValueError(f"{folder}: format {state['format']} is not supported, only {FORMAT}")
    if (saved := sorted(state["num_updates"])) != sorted(optimizers):
        raise ValueError(f"{folder}: it holds the optimizers {saved}, this run has {sorted(optimizers)}")
    for name, optimizer in optimizers.items():
        optimizer.load_state(load_file(folder / f"{name}.safetensors"), num_updates=state["num_updates"][name])
        if optimizer.masters_sha256() != state["masters_sha256"][name]:
            raise ValueError(f"{folder}: {name}.safetensors is damaged: its masters' SHA-256 is not the recorded one")
    generators.load_state(state["generators"])
    return state


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
