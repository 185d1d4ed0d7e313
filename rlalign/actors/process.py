"""What every actor's process has in common: thread count, device, silence."""

from __future__ import annotations

import atexit
import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rlalign_kernels import Fingerprint, fingerprint, tuned
from transformers.utils import logging as transformers_logging

from rlalign.config import Config
from rlalign.modeling import InnerAttention, backend_for, make_inner_attention, refuse_contradiction

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def environment(threads: int) -> dict[str, str]:
    """Environment of an actor's process: what maths libraries read when they are loaded, and a table of schedules."""
    return {
        **dict.fromkeys(_THREAD_VARIABLES, str(threads)),
        "OMP_WAIT_POLICY": "PASSIVE",  # see rlalign/__init__.py
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **({tuned.VARIABLE: str(Path(table).absolute())} if (table := os.environ.get(tuned.VARIABLE)) else {}),
    }


def set_up(threads: int) -> None:
    """Fix the thread count, which is part of the plan on a CPU, and keep libraries from talking."""
    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()
    # weights arrive as read-only views of Ray's object store, and are copied from there
    warnings.filterwarnings("ignore", message="The given (NumPy array|buffer) is not writable")


def settle() -> None:
    """Leave what stands by now, modules and models, out of later searches for unreachable cycles.

    Those walk every object there is: 0.4 s each time, in the midst of a step.
    """
    gc.unfreeze()  # or a cycle that an earlier call froze would stay
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # or extension modules take what is left at the end for leaks


@contextmanager
def settled() -> Iterator[None]:
    """``settle`` for the time of a loop, where the process goes on after it."""
    settle()
    try:
        yield
    finally:
        gc.unfreeze()


def device_of(config: Config) -> str:
    """Where the actors compute: ``auto`` is a GPU where there is one. Raises ValueError for a GPU that isn't there."""
    has_gpu = torch.cuda.is_available()
    if config.cluster.device == "cuda" and not has_gpu:
        raise ValueError("cluster.device=cuda: torch sees no CUDA device")
    if config.cluster.device == "auto":
        return "cuda" if has_gpu else "cpu"
    return config.cluster.device


def attention_of(config: Config) -> InnerAttention | None:
    """The inner attention of the settings; None is the operators' own.

    Raises ValueError for one that is unknown, can't run here or contradicts ``numerics``.
    """
    if config.attention is None:
        return None
    attention = make_inner_attention(config.attention)
    refuse_contradiction(attention, config.numerics)
    attention.check(torch.device(device_of(config)), getattr(torch, config.model.dtype))
    return attention


def policy_settings(config: Config) -> dict[str, Any]:
    """How every process of a run loads a policy: keywords of ``load_policy``."""
    return {
        "dtype": config.model.dtype,
        "numerics": config.numerics,
        "device": device_of(config),
        "attention": attention_of(config),
    }


def plan_of(config: Config) -> Fingerprint:
    """What can change a bit in this process."""
    device = device_of(config)
    return fingerprint(backend_for(config.numerics, device), device)
