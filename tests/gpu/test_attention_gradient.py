"""Attention on the GPU: accuracy against float64; gradients run to run, beside anything, in every schedule."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from rlalign_kernels.reference import truths
from support_attention import DEVICE, PROBLEMS, SHORT, Problem, make, packed, same_bits

NAMES = pytest.mark.parametrize("name", PROBLEMS)


@NAMES
def test_accuracy_is_that_of_the_operator_it_replaces(name):
    p = make(name, SHORT)
    out, lse = packed(p)
    settings = {key: value for key, value in p.settings.items()}
    with torch.device(DEVICE):
        exact, exact_lse = truths.attention(p.q, p.k, p.v, p.cu.cpu(), p.cu.cpu(), p.keywords["scale"], **settings)
    if p.sinks:
        wide = p.keywords["sinks"].double()[None]
        exact, exact_lse = exact * torch.sigmoid(exact_lse - wide)[..., None], torch.logaddexp(exact_lse, wide.expand_as(exact_lse))  # fmt: skip  # noqa: E501
    error = float((out.double() - exact).norm() / exact.norm())
    assert torch.allclose(lse.double(), exact_lse, atol=2e-5, rtol=1e-5)
    assert error < {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}[p.dtype]
    if p.sinks or "softcap" in settings or "window" in settings:
        return  # no library operator to replace
    library = torch.cat([_sdpa(p, b) for b in range(len(p.lengths))])
    assert error <= 1.2 * float((library.double() - exact).norm() / exact.norm())


def _sdpa(p: Problem, b: int) -> torch.Tensor:
    heads = [x[p.rows(b)].transpose(0, 1)[None] for x in (p.q, p.k, p.v)]
    causal = p.settings.get("causal", True)
    return F.scaled_dot_product_attention(*heads, is_causal=causal, enable_gqa=True)[0].transpose(0, 1)


@NAMES
def test_gradients_against_float64_and_beside_anything(name):
    p = make(name, SHORT)
    names = ("q", "k", "v")
    cotangent = torch.randn(*p.q.shape[:2], p.dims[1], device=DEVICE).to(p.dtype)

    def gradients(inputs: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        if p.sinks:
            leaves.append(p.keywords["sinks"].clone().requires_grad_())
            p.keywords["sinks"] = leaves[-1]
        return list(torch.autograd.grad(packed(p, *leaves[:3])[0], leaves, grad))

    found = gradients([p.q, p.k, p.v], cotangent)
    exact_inputs = [x.double().requires_grad_() for x in (p.q, p.k, p.v)]
    with torch.device(DEVICE):
        exact, lse = truths.attention(*exact_inputs, p.cu.cpu(), p.cu.cpu(), p.keywords["scale"], **p.settings)
    if p.sinks:
        exact_inputs.append(p.keywords["sinks"].detach().double().requires_grad_())
        exact = exact * torch.sigmoid(lse - exact_inputs[3][None])[..., None]
    truth = dict(zip((*names, "sinks"), torch.autograd.grad(exact, exact_inputs, cotangent.double()), strict=False))
    sizes = {what: grad.norm() for what, grad in truth.items()}
    if p.sinks:  # a sum over all tokens, of either sign: measured by its terms, for it may come near zero itself
        terms = torch.sigmoid(exact_inputs[3] - lse) * (cotangent.double() * exact).sum(-1)
        sizes["sinks"] = terms.norm()
    bound = {torch.float32: 2e-6, torch.float16: 7e-4, torch.bfloat16: 6e-3}[p.dtype]
    for (what, expected), grad in zip(truth.items(), found, strict=True):
        assert float((grad.double() - expected).norm() / sizes[what]) < bound, what
    rows = p.rows(3)
    poisoned = [x.clone() for x in (p.q, p.k, p.v)]
    grad = cotangent.clone()
    for x in (*poisoned, grad):
        x[: rows.start], x[rows.stop :] = torch.nan, torch.nan
    beside = gradients(poisoned, grad)
    assert same_bits([x[rows] for x in beside[:3]], [x[rows] for x in found[:3]])


@NAMES
def test_schedules_of_the_gradient_give_one_result(name):
    """Stock tiles, and Hopper's kernels where they are: one chain per sum, whatever is computed at once."""
    from rlalign_kernels.attention import triton_backend, triton_gradient
    from rlalign_kernels.attention.schedules import Tile

    p = make(name, SHORT)
    left = None if "window" not in p.settings else p.settings["window"] - 1
    right = 0 if p.settings.get("causal", True) else None
    masking = triton_backend.Masking(p.keywords["scale"], left, right, p.settings.get("softcap"))
    sinks = p.keywords.get("sinks")
    out, lse = triton_backend.forward(p.q, triton_backend.Keys(p.k, p.v, p.cu), p.cu, masking, sinks, None, True)
    problem = (p.q, p.k, p.v, sinks, out, lse, p.cu, p.cu, torch.randn_like(out), masking)
    wide = max(p.dims) > 128 or p.dtype == torch.float32
    tiles = [(Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)), (Tile(32, 16, 4, 2), Tile(16, 32, 4, 1))]
    if not wide:
        tiles += [(Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)), (Tile(128, 32, 8, 2), Tile(32, 128, 8, 1))]
    chosen = [x for x in triton_gradient.backward(*problem) if x is not None]
    for pair in tiles:
        found = [x for x in triton_gradient.backward(*problem, tiles=pair) if x is not None]
        assert same_bits(found, chosen), pair


def test_gradients_are_the_same_in_200_runs_beside_noise():
    p = Problem([700, 1, 129, 1025], heads=(8, 2))
    inputs = [x.clone().requires_grad_() for x in (p.q, p.k, p.v)]
    out, _ = packed(p, *inputs)
    cotangent = torch.randn_like(out)
    first = torch.autograd.grad(out, inputs, cotangent, retain_graph=True)
    noise, stream, rng = torch.randn(2048, 2048, device=DEVICE), torch.cuda.Stream(), random.Random(0)
    for _ in range(200):
        with torch.cuda.stream(stream):
            for _ in range(rng.randint(0, 3)):
                noise @ noise
        assert same_bits(torch.autograd.grad(out, inputs, cotangent, retain_graph=True), first)
