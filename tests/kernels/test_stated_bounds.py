"""The error that docstrings state, of both backends against float64 and of one against the other."""

from __future__ import annotations

import pytest
import torch
from support.stated_bounds import problems
from support_kernels import interpreted
from test_edges import OPERATORS

SMALL, LARGE = (6, 40, 24), (5, 2560, 1200)
# a name of ``problems`` begins with that of its operator
NAMES = tuple(problems(1, 40, 4, torch.float32))
everyone = pytest.mark.parametrize("name", NAMES)


def test_every_operator_states_one():
    assert {name.split(",")[0] for name in NAMES} == {name.split(",")[0] for name in OPERATORS}


@everyone
@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_keeps_it(name, shape, dtype):
    assert problems(*shape, dtype)[name].error("reference") <= 1


@interpreted
@everyone
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_keeps_it(name, dtype):
    assert problems(*SMALL, dtype)[name].error("triton") <= 1


@interpreted
@everyone
def test_backends_are_no_further_apart_than_one_may_be_from_the_truth(name):
    asked = problems(*SMALL, torch.float32)[name]
    found = [asked.found(backend) for backend in ("reference", "triton")]
    assert asked.share(*found) <= 1
    if name.startswith("apply_rotary"):
        assert torch.equal(*found)
