"""The linear kernels under Triton's interpreter: logic, masking and accuracy. Never bits: its dot is not bit-faithful.

tests/gpu proves the bits. Where there is a GPU the interpreter is off and this file skips.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rlalign_kernels import linear
from rlalign_kernels.gemm import schedules
from rlalign_kernels.gemm.schedules import Layer, Tile
from rlalign_kernels.reference import truths
from support_kernels import error, interpreted, normal

# (M, N, K): tails of every kind, and sizes that the copy engine's boxes fit
SHAPES = [(1, 40, 48), (5, 33, 31), (70, 64, 128), (40, 16, 7), (17, 130, 64), (3, 1, 1)]
SCHEDULES = {
    "pointers": Tile(16, 32, 16, 4, 2),
    "pointers, swapped": Tile(32, 16, 32, 4, 2, swap=True),
    "boxes": Tile(32, 16, 16, 4, 2, tma=True),
    "boxes, swapped": Tile(16, 64, 32, 4, 2, swap=True, tma=True, group=1),
}


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_as_accurate_as_torch(shape, dtype):
    num_rows, width, depth = shape
    x, weight, bias = (
        normal(num_rows, depth, seed=1, dtype=dtype), normal(width, depth, seed=2, dtype=dtype),
        normal(width, seed=3, dtype=dtype),
    )  # fmt: skip
    for given in (None, bias):
        truth = truths.linear(x, weight, given)
        bound = 1.2 * error(F.linear(x, weight, given), truth) + 1e-7
        assert error(linear(x, weight, given, backend="triton"), truth) <= bound


@interpreted
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("leaves", [1, 2, 8])
def test_every_schedule_computes_the_product(name, leaves):
    from rlalign_kernels.gemm.triton_backend import forward  # imports triton

    tile = SCHEDULES[name]
    x, weight, bias = (normal(*shape, seed=4, dtype=torch.float16) for shape in ((19, 256), (40, 256), (40,)))
    out = forward(x, weight, bias, leaves, out_dtype=torch.float32, schedule=tile)
    assert out.dtype == torch.float32
    assert error(out, truths.linear(x, weight, bias)) < 1e-6


@interpreted
def test_strides_of_every_kind_and_neighbours_that_may_hold_anything():
    x, weight, bias = normal(30, 48, seed=7), normal(40, 48, seed=8), normal(40, seed=9)
    whole = linear(x, weight, bias, backend="triton")
    hostile = torch.full((32, 51), torch.nan)
    hostile[1:31, 2:50] = x
    around = torch.full((44, 64), torch.inf)
    around[3:43, 5:53] = weight
    pairs = torch.stack((bias, torch.full_like(bias, torch.nan)), 1)
    for a, w, b in (
        (hostile[1:31, 2:50], around[3:43, 5:53], pairs[:, 0]),
        (x.t().contiguous().t(), weight.t().contiguous().t(), bias),
        (x.view(5, 6, 48), weight, bias),
        (x.view(5, 6, 48).transpose(0, 1).contiguous().transpose(0, 1), weight, bias),
    ):
        assert error(linear(a, w, b, backend="triton").reshape(30, 40), whole) < 1e-6
    expanded = linear(x[:1].expand(30, 48), weight, bias, backend="triton")
    assert error(expanded, whole[:1].expand(30, 40)) < 1e-6


@interpreted
def test_no_rows_no_columns_no_depth():
    weight, bias = normal(6, 8, seed=10), normal(6, seed=11)
    assert linear(torch.empty(0, 8), weight, bias, backend="triton").shape == (0, 6)
    assert linear(torch.empty(2, 0, 8), weight, backend="triton").shape == (2, 0, 6)
    assert linear(normal(3, 8, seed=12), weight[:0], backend="triton").shape == (3, 0)
    assert torch.equal(linear(torch.empty(3, 0), weight[:, :0], bias, backend="triton"), bias.expand(3, 6))
    x = torch.empty(0, 8, requires_grad=True)
    linear(x, weight, bias, backend="triton").sum().backward()
    assert x.grad.shape == (0, 8)


@interpreted
@pytest.mark.parametrize("leaves", [1, 4])
def test_gradients_match_float64(leaves):
    inputs = [normal(3, 10, 16, seed=13), normal(12, 16, seed=14), normal(12, seed=15)]
    cotangent = normal(3, 10, 12, seed=16)
    a = [x.clone().requires_grad_() for x in inputs]
    b = [x.double().requires_grad_() for x in inputs]
    grads = torch.autograd.grad(linear(*a, leaves=leaves, backend="triton"), a, cotangent)
    for grad, truth in zip(grads, torch.autograd.grad(truths.linear(*b), b, cotangent.double()), strict=True):
        assert error(grad, truth) < 1e-6


@interpreted
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_the_gradients_that_are_needed(wanted):
    inputs = [
        x.requires_grad_(i in wanted)
        for i, x in enumerate((normal(9, 16, seed=17), normal(5, 16, seed=18), normal(5, seed=19)))
    ]
    linear(*inputs, backend="triton").square().sum().backward()
    assert [x.grad is not None for x in inputs] == [i in wanted for i in range(3)]


@interpreted
@pytest.mark.parametrize("given", [(True, True), (False, True), (False, False)])
def test_backward_leaves_torch_settings_as_they_were(given, monkeypatch):
    settings = torch.backends.cuda.matmul
    multiply, seen = torch.mm, []

    def recording(*args):
        seen.append(settings.allow_bf16_reduced_precision_reduction)
        return multiply(*args)

    monkeypatch.setattr(torch, "mm", recording)
    settings.allow_bf16_reduced_precision_reduction = given
    try:
        x = normal(9, 16, seed=17).requires_grad_()
        linear(x, normal(5, 16, seed=18), backend="triton").sum().backward()
        assert seen == [False]
        assert settings.allow_bf16_reduced_precision_reduction == given[0]
        assert settings.allow_bf16_reduced_precision_reduction_split_k == given[1]
    finally:
        settings.allow_bf16_reduced_precision_reduction = True


@interpreted
def test_refusals_name_the_argument():
    x, weight = normal(4, 8, seed=20), normal(6, 8, seed=21)
    with pytest.raises(ValueError, match=r"leaves=3 is not supported; use one of \(1, 2, 4, 8\)"):
        linear(x, weight, leaves=3, backend="triton")
    with pytest.raises(ValueError, match="leaves=2 does not divide K=7"):
        linear(x[:, :7], weight[:, :7], leaves=2, backend="triton")
    with pytest.raises(ValueError, match=r"x\.dtype=torch\.float64"):
        linear(x.double(), weight.double(), backend="triton")
    with pytest.raises(NotImplementedError, match="interpreter"):
        linear(x.bfloat16(), weight.bfloat16(), backend="triton")


@pytest.mark.parametrize("architecture", [(8, 0), (8, 9), (9, 0), (10, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_chosen_tiles_fit_the_machine_and_the_leaves(architecture, dtype):
    shared_memory = {(8, 0): 163, (8, 9): 99}.get(architecture, 227) * 1024
    for width, depth in ((6144, 2048), (2048, 6144), (1000, 520), (33, 7)):
        for leaves in (1, 2, 4, 8):
            if depth % leaves:
                continue
            layer = Layer(width, depth, dtype, leaves, architecture, depth % 8 == 0)
            for rows in (1, 17, 64, 65, 129, 256, 257, 1000, 1024, 1025, 2048, 5000, 100_000):
                tile = schedules.tile(layer, rows)
                held = (tile.block_m + tile.block_n) * tile.block_k * dtype.itemsize
                assert held * tile.num_stages <= shared_memory
                assert not tile.tma or (architecture == (9, 0) and layer.boxes)
                assert not tile.tma or leaves == 1 or depth // leaves % tile.block_k == 0


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_chosen_hopper_tiles_fit_the_machine_and_the_leaves(out_dtype):
    for width, depth in ((6144, 2048), (2048, 6144), (12288, 4096), (1000, 520), (8, 64)):
        for leaves in (1, 2, 4, 8):
            layer = Layer(width, depth, torch.bfloat16, leaves, (9, 0), True)
            for rows in (1, 17, 33, 64, 65, 129, 256, 257, 300, 700, 1000, 1024, 2048, 5000, 100_000):
                tile = schedules.hopper_tile(layer, rows, out_dtype, 132)
                if tile is None:
                    assert rows <= schedules.FEW_ROWS or depth // leaves % 64
                    continue
                stage = (tile.rows + tile.all_cols) * tile.block_k * 2
                finished = tile.rows * min(tile.chunk, tile.cols, tile.more or tile.cols) * out_dtype.itemsize
                assert tile.num_stages >= 3
                assert tile.num_stages * (stage + 16) + finished <= 232_448
                assert leaves == 1 or depth // leaves % tile.block_k == 0
                assert tile.all_cols // 2 * leaves.bit_length() <= 192


def test_a_full_gpu_takes_large_tiles_and_a_few_rows_small_ones():
    layer = Layer(4096, 4096, torch.bfloat16, 1, (9, 0), True)
    chosen = {rows: schedules.hopper_tile(layer, rows, torch.bfloat16, 132) for rows in (256, 4096)}
    assert chosen[4096].rows * chosen[4096].all_cols == 128 * 256
    assert chosen[256].rows * chosen[256].all_cols == 64 * 128
