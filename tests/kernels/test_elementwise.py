"""Transcendentals and tree sums: an element's or a row's bits are its own."""

from __future__ import annotations

import pytest
import torch
from rlalign_kernels import geglu, gelu, silu, swiglu
from rlalign_kernels.reference import truths
from rlalign_kernels.reference.elementwise import FUNCTIONS, _blocked, elementwise, softmax_exp, tree_sum
from rlalign_kernels.reference.support import prefix_sum
from support_kernels import error, heavy, normal, same_bits

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_bits_do_not_depend_on_place_or_schedule(name):
    x = heavy(40_000, seed=0)
    x = x.abs() if name.startswith("log") else x
    whole = elementwise(name, x)
    assert same_bits(whole, _blocked(name, x))
    for start, size in ((0, 1), (1, 1), (3, 7), (777, 65), (16_380, 9), (39_999, 1), (5, 33_001)):
        assert same_bits(elementwise(name, x[start : start + size]), whole[start : start + size])
    assert same_bits(elementwise(name, x.view(200, 200).t()), whole.view(200, 200).t().contiguous())


@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 9, 16, 31, 64, 100, 1000, 1024])
def test_tree_sum_is_the_written_tree_in_any_batch(width):
    x = heavy(33, width, seed=1)

    def tree(row):
        padded = row + [0.0] * ((1 << (len(row) - 1).bit_length()) - len(row))
        while len(padded) > 1:
            half = len(padded) // 2
            pairs = zip(padded[:half], padded[half:], strict=True)
            padded = [(torch.tensor(a) + torch.tensor(b)).item() for a, b in pairs]
        return padded[0]

    total = tree_sum(x)
    assert total.shape == (33, 1)
    assert total[5].item() == tree(x[5].tolist())
    assert same_bits(tree_sum(x[7:8]), total[7:8])
    assert same_bits(tree_sum(x.view(3, 11, width)), total.view(3, 11, 1))


def test_prefix_sum_is_a_prefix_sum_row_by_row():
    x = normal(9, 77, seed=2).abs()
    sums = prefix_sum(x)
    torch.testing.assert_close(sums, x.double().cumsum(1).float())
    assert same_bits(prefix_sum(x[4:5]), sums[4:5])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["silu", "gelu none", "gelu tanh"])
def test_activations_are_invariant_and_as_accurate_as_torch(name, dtype):
    x = normal(50, 37, seed=3, dtype=dtype) * 4
    if name == "silu":
        run, truth, plain = (lambda t: silu(t, backend="reference")), truths.silu(x), torch.nn.functional.silu(x)
    else:
        mode = name.split()[1]
        run, truth = (lambda t: gelu(t, approximate=mode, backend="reference")), truths.gelu(x, mode)
        plain = torch.nn.functional.gelu(x, approximate=mode)
    out = run(x)
    assert out.dtype == dtype
    assert error(out, truth) <= 1.2 * error(plain, truth)
    for row in (0, 13, 49):
        assert same_bits(run(x[row : row + 1, 1:]), out[row : row + 1, 1:])
    poisoned = x.clone()
    poisoned[1] = float("nan")
    assert same_bits(run(poisoned)[2:], out[2:])
    assert run(torch.tensor([-1e4, 1e4], dtype=dtype)).tolist() == [0, torch.tensor(1e4, dtype=dtype).item()]


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_activation_gradients_match_float64(backend):
    x, up, cotangent = (normal(20, 30, seed=s) for s in (4, 5, 6))
    for run, truth in (
        (lambda t: silu(t, backend=backend), truths.silu),
        (lambda t: gelu(t, backend=backend), lambda t: truths.gelu(t, "none")),
        (lambda t: gelu(t, approximate="tanh", backend=backend), lambda t: truths.gelu(t, "tanh")),
        (lambda t: swiglu(t, up, backend=backend), lambda t: truths.silu(t) * up.double()),
        (lambda t: swiglu(up, t, backend=backend), lambda t: truths.silu(up) * t.double()),
        (lambda t: geglu(t, up, backend=backend), lambda t: truths.gelu(t, "none") * up.double()),
        (lambda t: geglu(up, t, approximate="tanh", backend=backend), lambda t: truths.gelu(up, "tanh") * t.double()),
    ):
        a, b = x.clone().requires_grad_(), x.double().requires_grad_()
        (grad,) = torch.autograd.grad(run(a), a, cotangent)
        (expected,) = torch.autograd.grad(truth(b), b, cotangent.double())
        assert error(grad, expected) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_and_geglu_are_the_activation_times_up(dtype):
    """Their gradients are too: a model's training does not depend on whether its gates were fused."""
    inputs = [normal(20, 30, seed=seed, dtype=dtype).requires_grad_() for seed in (7, 8)]
    cotangent = normal(20, 30, seed=9, dtype=dtype)
    ways = [(silu, swiglu, {"backend": "reference"})]
    ways += [(gelu, geglu, {"approximate": how, "backend": "reference"}) for how in ("none", "tanh")]
    for alone, gated, run in ways:
        expected, out = alone(inputs[0], **run) * inputs[1], gated(*inputs, **run)
        assert same_bits(out, expected)
        grads = (torch.autograd.grad(each, inputs, cotangent) for each in (out, expected))
        assert all(map(same_bits, *grads))


def test_refusals_name_the_argument():
    x = normal(4, 4, seed=9)
    with pytest.raises(ValueError, match=r"silu: x.dtype=torch.float64"):
        silu(x.double(), backend="reference")
    with pytest.raises(ValueError, match="approximate='fast'"):
        gelu(x, approximate="fast", backend="reference")
    with pytest.raises(ValueError, match="differ in shape"):
        swiglu(x, x[:2], backend="reference")
    with pytest.raises(ValueError, match="backend='cuda' is unknown"):
        silu(x, backend="cuda")


def test_softmax_exp_is_exp_where_it_matters_and_exactly_zero_below():
    x = torch.linspace(-60, 0, 5001)
    assert torch.equal(softmax_exp(x.clone()), elementwise("exp", x))
    low = torch.tensor([-80.0, -81.0, -95.0, -1e30, -torch.inf])
    assert torch.equal(softmax_exp(low.clone()), torch.zeros(5))
    near = torch.linspace(-80, -60, 301)
    assert (softmax_exp(near.clone()) - near.exp()).abs().max() < 1e-34
    assert softmax_exp(torch.tensor([torch.nan])).isnan().all()
