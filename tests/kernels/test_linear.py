"""Linear: a row's bits are its own, whatever the batch; accuracy, gradients, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rlalign_kernels import linear
from rlalign_kernels.reference import gemm, truths
from support_kernels import error, heavy, normal, same_bits

SHAPES = [(128, 128), (384, 128), (20, 33), (7, 64), (100, 384), (96, 500), (48, 1000)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "depth"), SHAPES)
def test_row_bits_do_not_depend_on_the_batch(width, depth, dtype):
    x, weight = heavy(530, depth, seed=0, dtype=dtype), heavy(width, depth, seed=1, dtype=dtype)
    bias = heavy(width, seed=2, dtype=dtype)
    whole = linear(x, weight, bias, backend="reference")
    for start, count in ((0, 1), (1, 1), (3, 15), (5, 16), (6, 17), (100, 255), (2, 257), (11, 300), (529, 1)):
        part = linear(x[start : start + count], weight, bias, backend="reference")
        assert same_bits(part, whole[start : start + count]), (start, count)
    order = torch.randperm(530, generator=torch.Generator().manual_seed(3))
    assert same_bits(linear(x[order], weight, bias, backend="reference"), whole[order])
    poisoned = x.clone()
    poisoned[1::2] = torch.tensor([float("nan"), float("inf"), 1e30])[torch.arange(265) % 3, None].to(dtype)
    assert same_bits(linear(poisoned, weight, bias, backend="reference")[::2], whole[::2])
    assert same_bits(linear(x.view(2, 265, depth), weight, bias, backend="reference").view(530, width), whole)


def test_every_row_count_keeps_the_bits():
    x, weight, bias = heavy(300, 150, seed=0), heavy(40, 150, seed=1), normal(40, seed=2)
    whole = linear(x, weight, bias, backend="reference")
    for count in range(1, 258):
        for start in (0, 150 - count // 2, 300 - count):
            part = linear(x[start : start + count], weight, bias, backend="reference")
            assert same_bits(part, whole[start : start + count]), (start, count)


@pytest.mark.parametrize("shape", [(1, 512), (5, 512), (17, 512), (64, 512), (0, 512), (512,), (3, 5, 512)])
@pytest.mark.parametrize("width", [512, 8])
def test_the_output_may_be_changed_in_place(shape, width):
    """As OLMo does. A product of padded rows is a view of more."""
    x, weight = normal(*shape, seed=0).requires_grad_(), normal(width, 512, seed=1).requires_grad_()
    out = linear(x, weight, backend="reference").clamp_(-1, 1)
    expected = F.linear(x.detach(), weight.detach()).clamp(-1, 1)
    torch.testing.assert_close(out.detach(), expected, rtol=1e-4, atol=1e-4)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (x, weight)))


@pytest.mark.parametrize(
    ("width", "depth"),
    # a last block of columns narrower than a tile; sums of so few terms that a few have equal bits in any order
    [(2049, 77), (2050, 385), (2063, 769), (4097, 130), (18, 2), (20, 2), (27, 2), (16, 3), (20, 4), (1, 1), (40, 5)],
)
def test_odd_widths_and_few_terms_keep_the_bits(width, depth):
    x, weight = normal(300, depth, seed=0), normal(width, depth, seed=1)
    whole = linear(x, weight, backend="reference")
    assert error(whole, truths.linear(x, weight)) < 1e-6
    for count in (1, 2, 3, 4, 15, 17, 63, 257):
        for start in range(0, 301 - count, 1 if width * count < 100 else 43):
            part = linear(x[start : start + count], weight, backend="reference")
            assert same_bits(part, whole[start : start + count]), (start, count)


def test_misaligned_and_strided_inputs_keep_the_bits():
    x, weight = normal(64, 100, seed=4), normal(50, 100, seed=5)
    whole = linear(x, weight, backend="reference")
    shifted = torch.empty(64 * 100 + 1)[1:].view(64, 100).copy_(x)
    strided = torch.empty(100, 64).t().copy_(x)
    weight_shifted = torch.empty(50 * 100 + 3)[3:].view(50, 100).copy_(weight)
    assert same_bits(linear(shifted, weight_shifted, backend="reference"), whole)
    assert same_bits(linear(strided, weight, backend="reference"), whole)


@pytest.mark.parametrize(("width", "depth"), [(16, 64), (64, 500)])
def test_tall_tiles_keep_the_bits(width, depth):
    x, weight = heavy(5000, depth, seed=8), heavy(width, depth, seed=9)
    assert gemm.gemm_schedule(width, depth).rows[-1] <= 4096
    whole = linear(x, weight, backend="reference")
    for start, count in ((0, 1), (4095, 2), (17, 600), (900, 4100), (4900, 100)):
        assert same_bits(linear(x[start : start + count], weight, backend="reference"), whole[start : start + count])


@pytest.mark.parametrize("depth", [64, 384, 1000])
def test_every_schedule_equals_the_base_tile(depth):
    x, weight = heavy(300, depth, seed=6), heavy(96, depth, seed=7)
    base = gemm.gemm_schedule(96, depth).base
    tiles = []
    for start in range(0, 300, base):
        tile = torch.full((base, depth), float("nan"))
        tile[: len(x[start : start + base])] = x[start : start + base]
        total = tile[:, : gemm.K_BLOCK] @ weight[:, : gemm.K_BLOCK].t()
        for k in range(gemm.K_BLOCK, depth, gemm.K_BLOCK):
            total = total + tile[:, k : k + gemm.K_BLOCK] @ weight[:, k : k + gemm.K_BLOCK].t()
        tiles.append(total)
    assert same_bits(linear(x, weight, backend="reference"), torch.cat(tiles)[:300])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "depth"), [(128, 128), (128, 384), (64, 2000)])
def test_as_accurate_as_torch(width, depth, dtype):
    x, weight = normal(200, depth, seed=8, dtype=dtype), normal(width, depth, seed=9, dtype=dtype)
    truth = truths.linear(x, weight)
    assert error(linear(x, weight, backend="reference"), truth) <= 1.2 * error(F.linear(x, weight), truth)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_match_float64(backend, dtype):
    inputs = [
        normal(3, 40, 50, seed=10, dtype=dtype),
        normal(30, 50, seed=11, dtype=dtype),
        normal(30, seed=12, dtype=dtype),
    ]
    cotangent = normal(3, 40, 30, seed=13, dtype=dtype)
    a = [x.clone().requires_grad_() for x in inputs]
    b = [x.double().requires_grad_() for x in inputs]
    grads = torch.autograd.grad(linear(*a, backend=backend), a, cotangent)
    expected = torch.autograd.grad(truths.linear(*b), b, cotangent.double())
    for grad, truth in zip(grads, expected, strict=True):
        assert grad.dtype == dtype
        assert error(grad, truth) < (1e-6 if dtype == torch.float32 else 4e-3)
    if backend == "reference":
        again = torch.autograd.grad(linear(*a, backend=backend), a, cotangent)
        assert all(same_bits(x, y) for x, y in zip(grads, again, strict=True))


def test_empty_batch_and_refusals():
    x, weight = normal(4, 8, seed=14), normal(6, 8, seed=15)
    assert linear(x[:0], weight, backend="reference").shape == (0, 6)
    with pytest.raises(ValueError, match="do not fit"):
        linear(x[:, :7], weight, backend="reference")
    with pytest.raises(ValueError, match=r"weight.dtype=torch.bfloat16"):
        linear(x, weight.bfloat16(), backend="reference")
    with pytest.raises(ValueError, match="bias has shape"):
        linear(x, weight, x[0], backend="native")
    with pytest.raises(ValueError, match=r"x.dtype=torch.float16"):
        linear(x.half(), weight.half(), backend="reference")
    with pytest.raises(NotImplementedError, match=r"leaves=2.*native"):
        linear(x, weight, leaves=2, backend="native")
    with pytest.raises(ValueError, match="leaves=3 is not supported"):
        linear(x, weight, leaves=3, backend="reference")


def test_leaves_are_products_of_their_own_that_meet_in_a_tree():
    x, weight, bias = heavy(40, 800, seed=16), heavy(33, 800, seed=17), normal(33, seed=18)
    leaf = [linear(x[:, i : i + 200], weight[:, i : i + 200], backend="reference") for i in range(0, 800, 200)]
    expected = ((leaf[0] + leaf[1]) + (leaf[2] + leaf[3])) + bias
    assert same_bits(linear(x, weight, bias, leaves=4, backend="reference"), expected)
    assert not same_bits(linear(x, weight, bias, backend="reference"), expected)
