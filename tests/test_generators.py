"""A user's random numbers: the same ones whatever happens around them, and saved as of a finished step."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from rlalign.generators import Generators


def draw(generators: Generators) -> tuple[float, ...]:
    with generators:
        return (random.random(), random.gauss(0, 1), np.random.normal(), float(torch.rand(())))


def test_others_neither_disturb_nor_are_disturbed():
    alone = Generators(3)
    expected = [draw(alone) for _ in range(3)]
    disturbed, got = Generators(3), []
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    theirs = []
    for _ in range(3):
        got.append(draw(disturbed))
        theirs.append((random.random(), np.random.random(), float(torch.rand(()))))
    assert got == expected
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    assert theirs == [(random.random(), np.random.random(), float(torch.rand(()))) for _ in range(3)]
    assert draw(Generators(4)) != expected[0]


def test_what_is_saved_is_what_was_committed():
    generators = Generators(2**64 - 1)
    draw(generators)
    generators.commit()
    saved = json.loads(json.dumps(generators.state()))
    expected = draw(generators)
    assert generators.state() == saved
    restored = Generators(0)
    restored.load_state(saved)
    assert draw(restored) == expected
    generators.rewind()
    assert draw(generators) == expected


@pytest.mark.parametrize("damage", [{"python": [3]}, {"torch": "~"}, {"numpy": None}])
def test_damaged_states_are_refused(damage):
    with pytest.raises(ValueError, match="can't be read"):
        Generators(0).load_state(Generators(0).state() | damage)
    with pytest.raises(ValueError, match=r"lack \['numpy', 'torch'\]"):
        Generators(0).load_state({"python": Generators(0).state()["python"]})
