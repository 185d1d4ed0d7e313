"""``scripts/doctor.py``: do the operators' bits hold on this machine?

Says what the machine is, which versions, plan fingerprints and schedules are in use, and looks at every operator: a row
alone against the row among others, chunks and pages, every schedule against the chosen one, gradients twice.
Exit codes: 0 all hold, 1 some operator's bits do not, 2 unusable input or nothing could be checked, 3 internal error.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from rlalign.cli.errors import run_main
from rlalign.cli.parser import Parser

if TYPE_CHECKING:
    import torch
    from rlalign_kernels.claims import Setting, Shapes

    from rlalign.cli.doctor_report import Outcome

_BACKENDS = ("auto", "reference", "native", "triton")
_DTYPES = ("float32", "bfloat16", "float16")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="doctor.py", description="Do the operators' bits hold on this machine?")
    parser.add_argument(
        "--backend", choices=_BACKENDS, default="auto", help="auto: triton on a GPU, else reference; native: PyTorch's"
    )
    parser.add_argument("--model", type=Path, metavar="PATH", help="shapes of this checkpoint folder or config.json")
    parser.add_argument("--dtype", choices=_DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--only", default="", metavar="TEXT", help="operators whose name contains this text")
    parser.add_argument("--quick", action="store_true", help="leave out other schedules, which a GPU compiles first")
    parser.add_argument(
        "--tuned", type=Path, metavar="FILE", help="a table of scripts/tune.py, instead of RLALIGN_TUNED"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's own)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    parser.epilog = "Exit codes: 0 all hold, 1 some do not, 2 unusable input or nothing checked, 3 internal error."
    return parser


def run(args: argparse.Namespace) -> int:
    """The whole command; returns the exit code. Raises ValueError for input that can't be used."""
    # imported when needed: --help should not wait for torch
    from rlalign.cli.doctor_report import show

    console = Console(stderr=args.json)
    outcome = _examine(args, console)
    if args.json:
        print(json.dumps(outcome.to_dict(), indent=2))
    else:
        show(outcome, console)
    return outcome.exit_code


def _examine(args: argparse.Namespace, console: Console) -> Outcome:
    import torch
    from rlalign_kernels import probe, tuned
    from rlalign_kernels.claims import all_subjects
    from rlalign_kernels.conformance import examine

    from rlalign.cli.doctor_report import Outcome, grouped

    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads {args.threads}: at least 1")
        torch.set_num_threads(args.threads)
    setting = _setting(args)
    if args.tuned is not None:
        if setting.backend != "triton":
            raise ValueError(f"--tuned {args.tuned}: backend {setting.backend} takes no table; only triton does")
        tuned.use(args.tuned)
    shapes = _shapes(args, setting)
    subjects = [subject for subject in all_subjects(shapes, setting) if args.only in subject.operator]
    if not subjects:
        raise ValueError(f"--only {args.only!r} is in no operator's name")
    begin = time.perf_counter()
    if setting.backend == "triton":
        from rlalign_kernels.gpu import architecture

        tuned.in_use(architecture(setting.device))  # one that can't be used is no operator's fault
    if setting.backend == "reference":
        probe([])
    verdicts = []
    with console.status("") as status:
        for subject in subjects:
            status.update(f"{subject.operator} {subject.shape}")
            verdicts += examine(subject)
            if setting.device.type == "cuda":
                torch.cuda.empty_cache()
    facts = _facts(args, setting, shapes) | {"seconds": round(time.perf_counter() - begin, 3)}
    return Outcome(grouped(verdicts), facts)


def _setting(args: argparse.Namespace) -> Setting:
    import torch
    from rlalign_kernels.claims import setting

    gpu = torch.cuda.is_available()
    triton = gpu and importlib.util.find_spec("triton") is not None
    backend = args.backend if args.backend != "auto" else "triton" if triton else "reference"
    if backend == "triton" and not triton:
        lacking = "triton is not installed" if gpu else "torch sees no CUDA device"
        raise ValueError(f"--backend triton: {lacking}; --backend reference looks at this CPU")
    device = (
        torch.device("cuda", torch.cuda.current_device()) if gpu and backend != "reference" else torch.device("cpu")
    )
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    if dtype == "float16" and backend == "reference":
        raise ValueError("--dtype float16 is not supported with backend reference; use float32 or bfloat16")
    return setting(backend, device, getattr(torch, dtype), schedules=not args.quick)


def _shapes(args: argparse.Namespace, setting: Setting) -> Shapes:
    from rlalign_kernels.claims import LARGE, SMALL

    if args.model is None:
        return LARGE if setting.device.type == "cuda" else SMALL
    from rlalign.cli.model_shapes import model_shapes

    return model_shapes(args.model)


def _facts(args: argparse.Namespace, setting: Setting, shapes: Shapes) -> dict[str, Any]:
    from rlalign.cli.doctor_schedules import schedules_in_use
    from rlalign.run.facts import versions

    default = "Qwen3-1.7B" if setting.device.type == "cuda" else "a small model"
    return {
        "machine": _machine(),
        "versions": versions(),
        "fingerprints": _fingerprints(setting.device),
        "backend": setting.backend,
        "device": str(setting.device),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "model": None if args.model is None else str(args.model),
        "shapes_of": default if args.model is None else str(args.model),
        "shapes": asdict(shapes),
        "schedules": schedules_in_use(shapes, setting),
    }


def _machine() -> dict[str, Any]:
    import torch
    from rlalign_kernels.plan import cpu_model

    from rlalign.cli.bench_kernels import gpu_meta
    from rlalign.run.facts import git_commit

    found: dict[str, Any] = {"cpu": cpu_model(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        meta = gpu_meta(None)
        major, minor = torch.cuda.get_device_capability()
        found |= {name: meta[name] for name in ("gpu", "processors", "driver", "cuda")}
        found["architecture"] = f"sm_{major}{minor}"
    return found | {"commit": git_commit()}


def _fingerprints(device: torch.device) -> dict[str, Any]:
    """Of every backend that can run here."""
    import torch
    from rlalign_kernels import fingerprint

    where: dict[str, Any] = {"reference": "cpu", "native": device}
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
        where["triton"] = torch.device("cuda", torch.cuda.current_device())
    prints = {backend: fingerprint(backend, place) for backend, place in where.items()}
    return {backend: {"sha256": found.sha256, **found.fields} for backend, found in prints.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    wanted = "--traceback" in argv if argv is not None else None
    return run_main(lambda: run(make_parser().parse_args(argv)), traceback=wanted or None)
