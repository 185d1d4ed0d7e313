"""Norms and rotary embedding: invariance, accuracy, gradients, refusals."""

from __future__ import annotations

import pytest
import torch
from rlalign_kernels import apply_rotary, layer_norm, rms_norm, rotary_cos_sin
from rlalign_kernels.reference import truths
from support_kernels import error, heavy, normal, same_bits

FORMS = [(0.0, True), (1.0, False), (0.0, False)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [16, 96, 128, 1000])
def test_norm_row_bits_do_not_depend_on_the_batch(hidden, dtype):
    x, weight = heavy(300, hidden, seed=0, dtype=dtype), normal(hidden, seed=1, dtype=dtype)
    whole = rms_norm(x, weight, eps=1e-6, backend="reference")
    for start, count in ((0, 1), (7, 1), (3, 17), (1, 299)):
        part = rms_norm(x[start : start + count], weight, eps=1e-6, backend="reference")
        assert same_bits(part, whole[start : start + count])
    poisoned = x.clone()
    poisoned[1::2] = float("nan")
    assert same_bits(rms_norm(poisoned, weight, eps=1e-6, backend="reference")[::2], whole[::2])
    heads = rms_norm(x.view(100, 3, hidden).transpose(0, 1), weight, eps=1e-6, backend="reference")
    assert same_bits(heads.transpose(0, 1).reshape(300, hidden), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("offset", "cast"), FORMS)
def test_norm_is_as_accurate_as_torch(offset, cast, dtype):
    x, weight = normal(200, 128, seed=2, dtype=dtype) * 3, normal(128, seed=3, dtype=dtype) + 1
    truth = truths.rms_norm(x, weight, 1e-5, offset)
    args = {"eps": 1e-5, "weight_offset": offset, "cast_before_weight": cast}
    ours, native = (rms_norm(x, weight, backend=b, **args) for b in ("reference", "native"))
    assert error(ours, truth) <= 1.2 * error(native, truth)
    assert ours.dtype == dtype


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize(("offset", "cast"), FORMS)
def test_norm_gradients_match_float64(offset, cast, backend):
    x, weight, cotangent = normal(40, 64, seed=4), normal(64, seed=5), normal(40, 64, seed=6)
    a = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    b = [x.double().requires_grad_(), weight.double().requires_grad_()]
    out = rms_norm(*a, eps=1e-5, weight_offset=offset, cast_before_weight=cast, backend=backend)
    grads = torch.autograd.grad(out, a, cotangent)
    expected = torch.autograd.grad(truths.rms_norm(*b, 1e-5, offset), b, cotangent.double())
    assert all(error(g, e) < 2e-6 for g, e in zip(grads, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_row_bits_and_accuracy(dtype):
    x, weight, bias = (normal(*shape, seed=s, dtype=dtype) for s, shape in enumerate(((90, 100), (100,), (100,))))
    x = 3 * x + 1
    run = {"eps": 1e-5, "backend": "reference"}
    whole = layer_norm(x, weight, bias, **run)
    for rows in (slice(0, 1), slice(7, 8), slice(3, 60)):
        assert same_bits(layer_norm(x[rows], weight, bias, **run), whole[rows])
    truth = truths.layer_norm(x, weight, bias, 1e-5)
    native = layer_norm(x, weight, bias, eps=1e-5, backend="native")
    assert error(whole, truth) <= 1.2 * error(native, truth)
    plain = layer_norm(x, None, None, **run)
    assert same_bits(layer_norm(x, torch.ones_like(weight), torch.zeros_like(bias), **run), plain)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_norms_of_a_sum_and_their_gradients(backend):
    x, residual, cotangent, other = (normal(40, 64, seed=s) for s in range(4))
    weight, bias = normal(64, seed=5), normal(64, seed=6)
    for layer in (False, True):
        a = [t.clone().requires_grad_() for t in (x, residual, weight, bias)[: 3 + layer]]
        b = [t.detach().double().requires_grad_() for t in a]
        norm, truth = (layer_norm, truths.layer_norm) if layer else (rms_norm, truths.rms_norm)
        out, total = norm(a[0], *a[2:], eps=1e-5, residual=a[1], backend=backend)
        assert same_bits(total, x + residual)
        assert same_bits(out, norm(total, *a[2:], eps=1e-5, backend=backend))
        grads = torch.autograd.grad([out, total], a, [cotangent, other])
        exact = [truth(b[0] + b[1], *b[2:], 1e-5), b[0] + b[1]]
        expected = torch.autograd.grad(exact, b, [cotangent.double(), other.double()])
        assert all(error(g, e) < 2e-6 for g, e in zip(grads, expected, strict=True))


def _tables(positions, inv_freq, dtype=torch.float32, backend="reference"):
    return rotary_cos_sin(positions, inv_freq, attention_scaling=1.0, dtype=dtype, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotated", [32, 16])
def test_rotary_is_invariant_and_right(rotated, dtype):
    query, key = normal(70, 3, 32, seed=7, dtype=dtype), normal(70, 1, 32, seed=16, dtype=dtype)
    positions = torch.randint(0, 4000, (70,), generator=torch.Generator().manual_seed(8))
    inv_freq = 10000.0 ** (-torch.arange(0, rotated, 2) / rotated)
    cos, sin = _tables(positions, inv_freq, dtype)
    whole = apply_rotary(query, key, cos, sin, backend="reference")
    native = apply_rotary(query, key, *_tables(positions, inv_freq, dtype, "native"), backend="native")
    for x, ours, theirs in zip((query, key), whole, native, strict=True):
        truth = truths.rotary(x, positions, inv_freq)
        assert error(ours, truth) <= 1.2 * error(theirs, truth)
    for start, count in ((0, 1), (13, 1), (5, 40)):
        rows = slice(start, start + count)
        tables = _tables(positions[rows], inv_freq, dtype)
        alone = apply_rotary(query[rows], key[rows], *tables, backend="reference")
        assert all(same_bits(part, x[rows]) for part, x in zip(alone, whole, strict=True))


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_rotary_gradient_matches_float64(backend):
    heads, cotangents = ([normal(20, n, 24, seed=seed + n) for n in (2, 1)] for seed in (9, 20))
    positions, inv_freq = torch.arange(20), 0.7 ** torch.arange(8).float()
    a, b = ([x.to(dtype).requires_grad_() for x in heads] for dtype in (torch.float32, torch.float64))
    out = apply_rotary(*a, *_tables(positions, inv_freq, backend=backend), backend=backend)
    grads = torch.autograd.grad(out, a, cotangents)
    truth = [truths.rotary(x, positions, inv_freq) for x in b]
    expected = torch.autograd.grad(truth, b, [cotangent.double() for cotangent in cotangents])
    assert all(error(grad, exact) < 1e-6 for grad, exact in zip(grads, expected, strict=True))
    cos, sin = torch.randn(20, 16), torch.randn(20, 16)
    ours = torch.autograd.grad(apply_rotary(*a, cos, sin, backend="reference"), a, cotangents)
    plain = torch.autograd.grad(apply_rotary(*a, cos, sin, backend="native"), a, cotangents)
    torch.testing.assert_close(ours, plain)


def test_tables_in_float32_turn_narrower_heads_and_are_rounded_once():
    query, key = normal(9, 4, 16, seed=21, dtype=torch.bfloat16), normal(9, 2, 16, seed=22, dtype=torch.bfloat16)
    cos, sin = normal(9, 16, seed=23), normal(9, 16, seed=24)
    turned = apply_rotary(query, key, cos, sin, backend="reference")
    wide = apply_rotary(query.float(), key.float(), cos, sin, backend="reference")
    assert all(same_bits(x, y.bfloat16()) for x, y in zip(turned, wide, strict=True))


def test_refusals_name_the_argument():
    x, weight = normal(4, 8, seed=11), normal(8, seed=12)
    with pytest.raises(ValueError, match="weight has shape"):
        rms_norm(x, weight[:4], eps=1e-6, backend="reference")
    with pytest.raises(ValueError, match="eps=-1"):
        rms_norm(x, weight, eps=-1, backend="reference")
    with pytest.raises(ValueError, match=r"inv_freq is torch.bfloat16"):
        rotary_cos_sin(torch.arange(3), weight.bfloat16(), dtype=torch.float32, backend="reference")
    with pytest.raises(ValueError, match=r"position_ids.dtype=torch.float32"):
        rotary_cos_sin(weight, weight, dtype=torch.float32, backend="reference")
    heads = normal(4, 2, 8, seed=13)
    with pytest.raises(ValueError, match="10 rotated channels"):
        apply_rotary(heads, heads, normal(4, 10, seed=14), normal(4, 10, seed=15), backend="reference")
    table = normal(4, 8, seed=14)
    with pytest.raises(ValueError, match=r"key \(3, 2, 8\).* do not fit"):
        apply_rotary(heads, heads[:3], table, table, backend="reference")
    with pytest.raises(ValueError, match=r"cos is torch.bfloat16.*supported: torch.float32"):
        apply_rotary(heads, heads, table.bfloat16(), table.bfloat16(), backend="reference")
    with pytest.raises(NotImplementedError, match="cos and sin have no gradient"):
        apply_rotary(heads, heads, table, table.clone().requires_grad_(), backend="reference")
    with pytest.raises(ValueError, match=r"key.dtype=torch.bfloat16 differs"):
        apply_rotary(heads, heads.bfloat16(), table, table, backend="reference")
