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


class FakeCuda:
    """GPUs whose generators count up from their seed; as torch's, they take one before they are in use."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, devices: int = 1) -> None:
        self.in_use, self.devices, self.kept, self.states = False, devices, -1, {}
        for name in ("init", "manual_seed_all", "set_rng_state", "get_rng_state"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: self.in_use)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: self.devices)

    def init(self) -> None:
        if not self.in_use:
            self.in_use, self.states = True, dict.fromkeys(range(self.devices), self.kept)

    def manual_seed_all(self, seed: int) -> None:
        self.kept, self.states = seed, dict.fromkeys(self.states, seed)

    def set_rng_state(self, state: torch.Tensor, device: str) -> None:
        assert self.in_use, "would be lost"
        self.states[int(device.removeprefix("cuda:"))] = int.from_bytes(bytes(state.tolist()), "big")

    def get_rng_state(self, device: int) -> torch.Tensor:
        return torch.tensor(list(self.states[device].to_bytes(8, "big")), dtype=torch.uint8)

    def draw(self, device: int = 0) -> int:
        self.init()
        self.states[device] += 1
        return self.states[device]


def test_a_gpu_first_used_inside_begins_with_the_seed_and_leaves_with_the_outer_one(monkeypatch):
    torch.manual_seed(100)
    cuda = FakeCuda(monkeypatch)
    generators = Generators(3)
    with generators:
        assert [cuda.draw(), cuda.draw()] == [4, 5]
    assert [cuda.draw(), cuda.draw()] == [101, 102]
    with generators:
        assert cuda.draw() == 6
    assert cuda.draw() == 103
    generators.rewind()
    with generators:
        assert cuda.draw() == 4, "what was drawn since the commit is forgotten, and so is that there was a GPU"


def test_a_gpu_first_used_outside_is_seeded_inside(monkeypatch):
    cuda, generators = FakeCuda(monkeypatch), Generators(3)
    torch.manual_seed(100)
    assert cuda.draw() == 101
    with generators:
        assert cuda.draw() == 4
    assert cuda.draw() == 102


def test_a_gpus_state_goes_on_in_a_process_that_has_not_used_it_yet(monkeypatch):
    cuda, generators = FakeCuda(monkeypatch), Generators(3)
    with generators:
        cuda.draw()
    generators.commit()
    saved = json.loads(json.dumps(generators.state()))
    cuda, restored = FakeCuda(monkeypatch), Generators(0)
    restored.load_state(saved)
    with restored:
        assert cuda.draw() == 5


def test_a_gpu_that_is_not_here_is_named(monkeypatch):
    cuda, generators = FakeCuda(monkeypatch, devices=2), Generators(3)
    with generators:
        cuda.draw(1)
    generators.commit()
    saved = generators.state()
    FakeCuda(monkeypatch, devices=1)
    with pytest.raises(ValueError, match=r"\['cuda:1'\] have nowhere to go: GPUs here are \['cuda:0'\]"):
        Generators(0).load_state(saved)
