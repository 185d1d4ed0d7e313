"""Launches that remember: what is decided once, what is looked at every time, and what is kept."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from rlalign_kernels import triton_runner
from rlalign_kernels.launch import Launch, Remembered
from triton import knobs

STREAM = 7


@pytest.fixture(autouse=True)
def a_stream(monkeypatch):
    active = SimpleNamespace(get_current_stream=lambda device: STREAM)
    monkeypatch.setattr(triton_runner, "driver", SimpleNamespace(active=active))


@dataclass
class Descriptor:
    base: torch.Tensor
    shape: list[int]


class Compiled:
    """Stands for what Triton compiled: records how it was called, with and without its hooks."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.direct, self.hooked = [], []

    def run(self, grid_x, grid_y, grid_z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        assert (stream, function, metadata) == (STREAM, "function", "metadata")
        assert launch_metadata is enter is leave is None
        # a descriptor is lent for the call
        lent = [replace(x) if isinstance(x, Descriptor) else x for x in arguments]
        self.direct.append(((grid_x, grid_y, grid_z), lent))

    def __getitem__(self, grid):
        return lambda *arguments, stream: self.hooked.append((grid, stream, arguments))


class Kernel:
    """Stands for a Triton kernel: records how it was called."""

    arg_names = ("x_ptr", "y_desc", "n", "BLOCK", "FLAG")

    def __init__(self) -> None:
        self.first, self.compiled = [], Compiled()

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.first.append((grid, [replace(x) if isinstance(x, Descriptor) else x for x in arguments], constants))
            return self.compiled

        return launch


def describe(x: torch.Tensor) -> Descriptor:
    return Descriptor(x, list(x.shape))


def test_the_first_launch_is_tritons_own_and_later_ones_change_pointers_only():
    kernel = Kernel()
    launch = Launch(kernel, (3, 2), (7,), boxes={1: describe}, FLAG=True, num_warps=4, BLOCK=16)
    x, y = torch.zeros(8), torch.zeros(2, 4)
    launch(x, y)
    ((grid, arguments, constants),) = kernel.first
    assert grid == (3, 2, 1) and constants == {"FLAG": True, "num_warps": 4, "BLOCK": 16, "enable_fp_fusion": True}
    assert arguments[0] is x and arguments[1].base is y and arguments[2] == 7
    other = torch.ones(8), torch.ones(2, 4)
    launch(*other)
    ((grid, direct),) = kernel.compiled.direct
    assert len(kernel.first) == 1 and grid == (3, 2, 1)
    pointer, descriptor, *rest = direct
    assert pointer == other[0].data_ptr()
    assert descriptor.base is other[1] and descriptor.shape == [2, 4]
    assert rest == [7, 16, True]  # in the kernel's order


def test_another_alignment_is_another_first_launch():
    kernel = Kernel()
    launch = Launch(kernel, (1,), (7,), BLOCK=16, FLAG=False)
    x = torch.zeros(64)
    assert x.data_ptr() % 16 == 0
    for tensors in ((x, x), (x[1:], x), (x[2:], x), (x, x[1:]), (x[1:], x), (x, None), (x, x), (x, None)):
        launch(*tensors)
    # x[1:] and x[2:] are the same kernel: Triton asks for multiples of 16 bytes only; and None is a constant to it
    assert len(kernel.first) == 4
    assert [direct[:2] for _, direct in kernel.compiled.direct] == [
        [x[2:].data_ptr(), x.data_ptr()],
        [x[1:].data_ptr(), x.data_ptr()],
        [x.data_ptr(), x.data_ptr()],
        [x.data_ptr(), 0],
    ]


def test_a_profilers_hooks_are_called(monkeypatch):
    """Triton's own call of a compiled kernel calls them; ours leaves them out only where there are none."""
    kernel = Kernel()
    launch, x = Launch(kernel, (3,), (7,), BLOCK=16, FLAG=True), torch.zeros(8)
    launch(x, x)
    for name in ("launch_enter_hook", "launch_exit_hook"):
        with monkeypatch.context() as patch:
            patch.setattr(getattr(knobs.runtime, name), "calls", [print])
            launch(x, x)
    launch(x, x)
    assert kernel.compiled.hooked == [((3, 1, 1), STREAM, (x.data_ptr(), x.data_ptr(), 7, 16, True))] * 2
    assert len(kernel.compiled.direct) == 1


class KnownLauncher:
    """Stands for the launcher of Triton 3.6: what it would hand to C is what ``direct`` must hand to it."""

    launch_cooperative_grid, launch_pdl, global_scratch_size, profile_scratch_size = False, True, 0, 0

    def __init__(self, described: int) -> None:
        self.called: list[tuple] = []
        launcher = lambda *arguments: self.called.append(arguments)  # noqa: E731  named as the closure's is
        kind = {"swizzle": 3, "elem_size": 4, "elem_type": 7, "block_size": [2, 4], "fp4_padded": False}
        tensordesc_meta = [kind] * described

        def inner(*arguments):
            return launcher(*arguments, tensordesc_meta)

        self.launch = inner if described else launcher


KnownLauncher.__module__ = triton_runner._KNOWN_LAUNCHER


@pytest.mark.parametrize("version", ["3.6.0", "9.0.0"])
def test_a_known_launcher_is_called_below_its_loop_and_an_unknown_one_as_it_is(version, monkeypatch):
    monkeypatch.setattr(triton_runner.triton, "__version__", version)
    utils = SimpleNamespace(fill_tma_descriptor=lambda address, *rest: (address, *rest))
    monkeypatch.setattr(triton_runner.driver.active, "utils", utils, raising=False)
    kernel = Kernel()
    kernel.compiled.run = KnownLauncher(described=1)
    if version != "3.6.0":
        with pytest.raises(TypeError, match="not callable"):  # as it is: this one can't be called
            _twice(kernel)
        return
    x, y = _twice(kernel)
    shape, strides = [2, 4], [4, 1]
    encoded = (y.data_ptr(), 3, 4, 7, [2, 4], shape, strides, 0)
    first = (3, 2, 1, STREAM, "function", False, True, None, None, "metadata", None, None, None)
    assert kernel.compiled.run.called == [(*first, x.data_ptr(), encoded, *shape, *strides, 7, 16, True)]


def _twice(kernel: Kernel) -> tuple[torch.Tensor, torch.Tensor]:
    def describe(x: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(base=x, shape=list(x.shape), strides=list(x.stride()), padding="zero")

    launch = Launch(kernel, (3, 2), (7,), boxes={1: describe}, FLAG=True, num_warps=4, BLOCK=16)
    launch(torch.zeros(8), torch.zeros(2, 4))
    x, y = torch.ones(8), torch.ones(2, 4)
    launch(x, y)
    return x, y


def test_no_tensor_is_kept():
    launch = Launch(Kernel(), (1,), (7,), boxes={1: describe}, BLOCK=16, FLAG=False)
    x, y = torch.zeros(8), torch.zeros(2, 4)
    launch(x, y)
    launch(x, y)
    gone = [weakref.ref(x), weakref.ref(y)]
    launch._kernel.first.clear()
    launch._kernel.compiled.direct.clear()
    del x, y
    assert [ref() for ref in gone] == [None, None]


def test_a_full_memory_starts_anew():
    found: Remembered[int] = Remembered(size=3)
    for i in range(5):
        found[i] = i
    assert len(found) == 2
    assert [found.get(i) for i in range(5)] == [None, None, None, 3, 4]


def test_what_was_refused_once_is_refused_again_and_what_fitted_before_is_looked_at():
    from rlalign_kernels import attention_packed

    q = torch.randn(4, 2, 16, dtype=torch.float16)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    known = {"cu_seqlens_q": cu, "scale": 0.25, "backend": "triton"}
    attention_packed(q, q, q, cu_seqlens_k=cu, **known)
    for _ in range(2):
        with pytest.raises(ValueError, match="differ in length"):
            attention_packed(q, q, q, cu_seqlens_k=torch.tensor([0, 2, 4], dtype=torch.int32), **known)
        with pytest.raises(ValueError, match="window=0"):
            attention_packed(q, q, q, cu_seqlens_k=cu, window=0, **known)
        with pytest.raises(ValueError, match="dtype"):
            attention_packed(q, q.float(), q, cu_seqlens_k=cu, **known)
