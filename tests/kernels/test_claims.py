"""Claims about schedules, under Triton's interpreter: their logic, and that a schedule with other bits is named."""

from __future__ import annotations

import torch
from rlalign_kernels.claims import AttentionShape, Setting, Shapes, attention, elementwise, linear, vocab
from rlalign_kernels.conformance import Claim, Subject, Verdict, examine
from support_kernels import interpreted

SHAPES = Shapes(((32, 32),), (140, 16), (AttentionShape(1, 1, 16, 16),), (32,), 24)
SETTING = Setting("triton", torch.device("cpu"), torch.float32, (2, 9), (5,))


def only(subject: Subject, claim: str) -> Verdict:
    """The verdict on one claim; the others are not looked at."""
    chosen = [one for one in subject.claims() if one.name == claim]
    return next(examine(Subject(subject.operator, subject.shape, lambda: chosen)))


@interpreted
def test_every_table_of_schedules_is_compared():
    for file, counts in (
        (linear, [4]), (attention, [5, None]), (vocab, [4, None]), (elementwise, [4, 4, 3, 3, 3, 3, 3])
    ):  # fmt: skip
        for subject, count in zip(file.subjects(SHAPES, SETTING), counts, strict=True):
            if count is not None:
                verdict = only(subject, "schedules")
                assert verdict.num_cases == count and not verdict.found.startswith("RuntimeError"), verdict


@interpreted
def test_a_schedule_with_other_bits_is_named(monkeypatch):
    from rlalign_kernels.gemm import triton_backend

    real = triton_backend.forward

    def forward(*args, schedule=None, **keywords):
        out = real(*args, schedule=schedule, **keywords)
        return out * (1 + 2**-20) if schedule is not None and schedule.block_n == 64 else out

    monkeypatch.setattr(triton_backend, "forward", forward)
    verdict = only(next(linear.subjects(SHAPES, SETTING)), "schedules")
    assert verdict.holds is False
    assert verdict.num_differing == 2
    assert verdict.found.startswith("Tile(block_m=64, block_n=64")


@interpreted
def test_a_schedule_that_does_not_fit_this_gpu_is_left_out(monkeypatch):
    from rlalign_kernels.elementwise import triton_rotary

    real = triton_rotary.rotate

    class OutOfResources(Exception):
        """As Triton's."""

    def rotate(*args, pairs=None, **keywords):
        if pairs == 4096:
            raise OutOfResources
        return real(*args, **keywords)

    monkeypatch.setattr(triton_rotary, "rotate", rotate)
    rotary = next(s for s in elementwise.subjects(SHAPES, SETTING) if s.operator == "rotary")
    verdict = only(rotary, "schedules")
    assert (verdict.holds, verdict.num_cases) == (True, 2)


def test_an_error_counts_as_a_case_that_does_not_hold():
    def cases():
        yield None
        raise RuntimeError("out of luck")

    (verdict,) = examine(Subject("x", "1", lambda: [Claim("rows", cases)]))
    assert (verdict.holds, verdict.num_cases, verdict.found) == (False, 2, "RuntimeError: out of luck")
