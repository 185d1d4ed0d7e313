"""Whether the promised bits hold on this machine, for a model's shapes: what runs before the first token on a GPU.

What ``probe`` is to the reference backend on a CPU, ``sweep`` is to the triton backend on a GPU. It looks at what
``claims`` say of forwards, at fewer batch sizes than scripts/doctor.py, takes seconds once kernels are compiled, and
refuses a machine on which something does not hold. Nothing is chosen by it.
"""

from __future__ import annotations

from functools import partial

import torch

from rlalign_kernels.claims import Setting, Shapes, all_subjects
from rlalign_kernels.conformance import CONFORMANCE, Subject, examine
from rlalign_kernels.dispatch import Backend

_ROWS, _LENGTHS = (2, 17, 64, 257, 1024), (1, 129, 1100)


def sweep(
    shapes: Shapes,
    *,
    backend: Backend,
    dtype: torch.dtype,
    device: torch.device,
    rows: tuple[int, ...] = _ROWS,
    lengths: tuple[int, ...] = _LENGTHS,
) -> None:
    """Look at every operator of ``shapes``, once per process; verdicts are in ``CONFORMANCE``.

    rows: batch sizes, ascending; lengths: of attention's sequences. Raises RuntimeError naming operator, shape and what
    differs where bits do not hold, or the operator can't run.
    """
    name = str(dtype).removeprefix("torch.")
    for subject in all_subjects(shapes, Setting(backend, device, dtype, rows, lengths, schedules=False)):
        key = ("sweep", subject.operator, subject.shape, backend, name)
        verdict = CONFORMANCE.get(key, partial(_look, subject))
        if verdict is not True:
            raise RuntimeError(
                f"{subject.operator} {subject.shape} with backend={backend!r}, {name} on {_device_name(device)}: "
                f"{verdict}; scripts/doctor.py says more, numerics=native runs without this promise"
            )


def _look(subject: Subject) -> bool | str:
    """True, or the claim that does not hold and where it fails first. Gradients have no second side to agree with."""
    forward = Subject(
        subject.operator, subject.shape, lambda: [claim for claim in subject.claims() if claim.name != "backward"]
    )
    for verdict in examine(forward):
        if verdict.holds is False:
            return f"{verdict.claim}: {verdict.found}"
    return True


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
