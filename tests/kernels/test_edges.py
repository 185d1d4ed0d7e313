"""What all operators owe a caller with unusual inputs: autocast, second derivatives, nothing at all, one gradient."""

from __future__ import annotations

import pytest
import torch
from rlalign_kernels import (
    apply_rotary,
    geglu,
    gelu,
    layer_norm,
    linear,
    linear_logprob,
    linear_sample,
    rms_norm,
    silu,
    swiglu,
)
from rlalign_kernels.rows import LEAST_TEMPERATURE, SamplingRows
from support_kernels import interpreted, normal, same_bits

from rlalign import config

T, H, V = 6, 40, 24
BACKENDS = ["reference", pytest.param("triton", marks=interpreted)]
WEIGHT, VECTOR, TABLE = normal(V, H, seed=1), normal(H, seed=2), normal(T, 8, seed=3)

# of x [T, H]
OPERATORS = {
    "linear": lambda x, b: linear(x, WEIGHT, backend=b),
    "linear, leaves": lambda x, b: linear(x, WEIGHT, leaves=4, backend=b),
    "rms_norm": lambda x, b: rms_norm(x, VECTOR, eps=1e-6, backend=b),
    "layer_norm": lambda x, b: layer_norm(x, VECTOR, VECTOR, eps=1e-6, backend=b),
    "apply_rotary": lambda x, b: apply_rotary(*x.view(T, 5, 8).split((3, 2), 1), TABLE, TABLE, backend=b)[0],
    "silu": lambda x, b: silu(x, backend=b),
    "gelu": lambda x, b: gelu(x, backend=b),
    "swiglu": lambda x, b: swiglu(x, x + 1, backend=b),
    "geglu": lambda x, b: geglu(x, x + 1, backend=b),
    "linear_logprob": lambda x, b: linear_logprob(x, WEIGHT, torch.arange(T), backend=b).logprob,
}
everyone = pytest.mark.parametrize("run", OPERATORS.values(), ids=list(OPERATORS))
both = pytest.mark.parametrize("backend", BACKENDS)


@both
@everyone
def test_autocast_changes_no_bit(run, backend):
    x = normal(T, H, seed=4)
    plain = run(x, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same_bits(run(x, backend), plain)
        assert torch.is_autocast_enabled("cpu")


def test_native_follows_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(normal(T, H, seed=4), WEIGHT, backend="native").dtype == torch.bfloat16


@both
@everyone
def test_a_second_derivative_is_refused_rather_than_left_out(run, backend):
    x = normal(T, H, seed=4).requires_grad_()
    (grad,) = torch.autograd.grad(run(x, backend).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (grad.square().sum() + x.sum()).backward()


@both
@pytest.mark.parametrize(("rows", "depth", "width"), [(0, 3, 2), (2, 0, 3), (3, 4, 0), (0, 0, 0)])
def test_linear_without_elements(rows, depth, width, backend):
    x, weight, bias = torch.ones(rows, depth), torch.ones(width, depth), torch.ones(width)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    out = linear(*inputs, backend=backend)
    assert torch.equal(out, torch.full((rows, width), depth + 1.0))
    for tensor, grad in zip(inputs, torch.autograd.grad(out.sum(), inputs), strict=True):
        assert grad.shape == tensor.shape
        assert not grad.any() or (tensor is bias and torch.equal(grad, torch.full((width,), float(rows))))


@both
@pytest.mark.parametrize("operator", [rms_norm, layer_norm])
def test_norms_without_columns(operator, backend):
    x, weight = torch.ones(3, 0, requires_grad=True), torch.ones(0, requires_grad=True)
    out = operator(x, weight, eps=1e-6, backend=backend) if operator is rms_norm else (
        layer_norm(x, weight, None, eps=1e-6, backend=backend)
    )  # fmt: skip
    grads = torch.autograd.grad(out.sum(), (x, weight))
    assert [tuple(tensor.shape) for tensor in (out, *grads)] == [(3, 0), (3, 0), (0,)]


@both
def test_the_head_gives_the_one_gradient_that_is_wanted(backend):
    def tensors():
        return [normal(T, H, seed=5), WEIGHT.clone(), normal(V, seed=6)]

    def gradients(wanted):
        inputs = tensors()
        for index in wanted:
            inputs[index].requires_grad_()
        hidden, weight, bias = inputs
        out = linear_logprob(hidden, weight, torch.arange(T), bias=bias, backend=backend)
        return torch.autograd.grad(out.logprob.sum(), [inputs[index] for index in wanted])

    for index, grad in enumerate(gradients([0, 1, 2])):
        assert grad.any() and torch.equal(gradients([index])[0], grad)


@both
def test_an_ignored_row_of_nan_has_no_gradient_under_a_soft_cap(backend):
    hidden, targets = normal(T, H, seed=5), torch.arange(T)
    hidden[2], targets[2] = float("nan"), -100
    hidden.requires_grad_()
    out = linear_logprob(hidden, WEIGHT, targets, softcap=5.0, backend=backend)
    (grad,) = torch.autograd.grad(out.logprob.sum(), hidden)
    assert grad.isfinite().all() and not grad[2].any() and grad[3].any()


def rows_at(temperature: float) -> SamplingRows:
    zeros = torch.zeros(T)
    return SamplingRows(torch.full((T,), temperature), zeros.long(), zeros + 1, zeros)


@both
def test_the_smallest_temperature_still_divides(backend):
    hidden, rows = normal(T, H, seed=7) * 100, rows_at(LEAST_TEMPERATURE)
    targets = (hidden @ WEIGHT.t()).argmax(1)
    out = linear_logprob(hidden, WEIGHT, targets, rows=rows, backend=backend)
    assert out.logprob.abs().max() < 1e-6 and out.entropy.abs().max() < 1e-5
    drawn = linear_sample(hidden, WEIGHT, rows=rows, seeds=targets, positions=targets, backend=backend)
    assert torch.equal(drawn.token, targets) and drawn.logprob.abs().max() < 1e-6
    with pytest.raises(ValueError, match=r"rows\.temperature\[0\]=4\.99\d*e-06 is out of bounds"):
        linear_logprob(hidden, WEIGHT, targets, rows=rows_at(LEAST_TEMPERATURE / 2), backend=backend)


def test_settings_have_the_operators_bound():
    assert config.LEAST_TEMPERATURE == LEAST_TEMPERATURE
    assert config.SamplingParams(temperature=LEAST_TEMPERATURE).temperature > 0
    with pytest.raises(ValueError, match="use 0 \\(greedy\\) or at least 1e-05"):
        config.SamplingParams(temperature=LEAST_TEMPERATURE / 2)


@interpreted
def test_logits_too_large_for_their_temperature_are_no_number():
    """What a GPU finds out in the kernel: 0 would be a log-prob like any other."""
    from rlalign_kernels.vocab import triton_backend  # imports triton

    hidden, seeds = normal(T, H, seed=7), torch.arange(T)
    hidden[1] *= 1e12
    args = hidden, WEIGHT, None, None
    out = triton_backend.linear_logprob(*args, seeds, seeds >= 0, None, None, None, False)
    assert [value.isfinite().tolist() for value in (out.logprob, out.entropy, out.logsumexp)] == [
        [True, False, True, True, True, True]
    ] * 3
    drawn = triton_backend.linear_sample(*args, rows_at(1.0), seeds, seeds, True, None)
    assert drawn.logprob.isnan().tolist() == drawn.raw_logprob.isnan().tolist() == (seeds == 1).tolist()


@both
@pytest.mark.parametrize(
    ("depth", "softcap", "named"),
    [(H, float("inf"), "softcap=inf"), (H, "x", "softcap='x'"), (0, None, r"hidden \(6, 0\)")],
)
def test_the_head_refuses(depth, softcap, named, backend):
    with pytest.raises(ValueError, match=named):
        linear_logprob(torch.ones(T, depth), WEIGHT[:, :depth], torch.arange(T), softcap=softcap, backend=backend)
