"""Norms, rotary and activations under Triton's interpreter: logic, masking, strides, accuracy, refusals.

Nothing here is a matrix product, so a row's bits can be compared too. tests/gpu proves them on hardware.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from rlalign_kernels import apply_rotary, geglu, gelu, layer_norm, rms_norm, rope, rotary_cos_sin, silu, swiglu
from rlalign_kernels.elementwise.row_plan import RowTile, backward_tile, backward_width, lanes, most_parts
from rlalign_kernels.reference import truths
from support_kernels import error, heavy, interpreted, normal, same_bits

pytestmark = interpreted

FORMS = {
    "llama": {},
    "gemma": {"weight_offset": 1.0, "cast_before_weight": False},
    "olmo": {"cast_before_weight": False},
}


def norm_of(name, x, weight, residual=None, **changed):
    if name == "layer":
        return layer_norm(x, weight, weight + 1, eps=1e-5, residual=residual, backend="triton")
    return rms_norm(x, weight, eps=1e-5, residual=residual, backend="triton", **{**FORMS[name], **changed})


def truth_of(name, x, weight):
    if name == "layer":
        return truths.layer_norm(x, weight, weight + 1, 1e-5)
    return truths.rms_norm(x, weight, 1e-5, FORMS[name].get("weight_offset", 0.0))


SHAPES = ((3, 1), (5, 5), (2, 3, 40), (3, 1100))
CASES = [*product([*FORMS, "layer"], SHAPES)]


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_norms_and_their_gradients(name, shape):
    x, residual, weight = normal(*shape, seed=0), normal(*shape, seed=1), normal(shape[-1], seed=2) + 1
    inputs = [t.requires_grad_() for t in (x, residual, weight)]
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    cotangents = [normal(*shape, seed=3), normal(*shape, seed=4)]
    out, total = norm_of(name, x, weight, residual)
    exact_total = exact_inputs[0] + exact_inputs[1]
    exact = truth_of(name, exact_total, exact_inputs[2])
    assert torch.equal(total, x + residual)
    assert error(out, exact) < 2e-7
    grads = torch.autograd.grad([out, total], inputs, cotangents)
    exact_grads = torch.autograd.grad([exact, exact_total], exact_inputs, [c.double() for c in cotangents])
    assert torch.equal(grads[0], grads[1])
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        assert float((grad - exact_grad).norm()) < 5e-7 * float(exact_grad.norm()) + 1e-6


def test_only_the_gradients_that_are_needed():
    x, weight, bias, cotangent = normal(9, 40, seed=0), normal(40, seed=1), normal(40, seed=2), normal(9, 40, seed=3)
    found = []
    for wanted in ((0, 1, 2), (0,), (1,), (2,)):
        inputs = [t.clone().requires_grad_(i in wanted) for i, t in enumerate((x, weight, bias))]
        layer_norm(*inputs, eps=1e-5, backend="triton").backward(cotangent)
        assert [t.grad is not None for t in inputs] == [i in wanted for i in range(3)]
        found.append([t.grad for t in inputs])
    assert all(torch.equal(found[0][i], found[i + 1][i]) for i in range(3))
    inputs = [t.clone().requires_grad_() for t in (x, x, weight)]
    _, total = rms_norm(inputs[0], inputs[2], eps=1e-5, residual=inputs[1], backend="triton")
    total.backward(cotangent)  # nothing comes back through the norm itself
    assert torch.equal(inputs[0].grad, cotangent) and inputs[2].grad is None


def test_a_row_of_any_batch_tile_and_stride_has_the_same_bits():
    from rlalign_kernels.elementwise import triton_norm_calls as calls

    x, weight = heavy(37, 200, seed=0), normal(200, seed=1)
    whole = norm_of("llama", x, weight)
    for rows in (slice(0, 1), slice(7, 8), slice(3, 20)):
        assert same_bits(norm_of("llama", x[rows], weight), whole[rows])
    poisoned = x.clone()
    poisoned[1::2] = torch.nan
    assert same_bits(norm_of("llama", poisoned, weight)[::2], whole[::2])
    for rows in (1, 2, 8):
        settings = calls.NormSettings("rms_norm", 1e-5, cast=True)
        assert same_bits(calls.forward(x, None, weight, None, settings, tile=RowTile(rows, 4))[0], whole)
    wide = torch.full((37, 500), torch.nan)
    wide[:, 100:300] = x
    assert same_bits(norm_of("llama", wide[:, 100:300], weight), whole)
    assert same_bits(norm_of("llama", x.t().contiguous().t(), weight), whole)
    heads = x[:36].view(2, 6, 3, 200)
    for dims in ((0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3)):
        assert same_bits(norm_of("llama", heads.permute(dims), weight), whole[:36].view(2, 6, 3, 200).permute(dims))
    assert same_bits(norm_of("llama", x[5].expand(4, 200), weight), whole[5].expand(4, 200))


def test_the_row_sum_is_the_written_one():
    """Lanes ascending, neighbours three times, then halves."""
    x = heavy(1, 2500, seed=5).abs()
    padded = torch.zeros(3 * lanes(2500))
    padded[:2500] = x * x
    total = torch.zeros(lanes(2500))
    for part in padded.view(3, -1):
        total = total + part
    for _ in range(3):
        total = total[0::2] + total[1::2]
    while len(total) > 1:
        total = total[: len(total) // 2] + total[len(total) // 2 :]
    expected = x * (1 / (total / 2500 + 1e-5).sqrt())
    assert same_bits(norm_of("olmo", x, torch.ones(2500)), expected)


def test_rows_that_are_read_ahead_change_no_gradient():
    from rlalign_kernels.elementwise import triton_norm_calls as calls

    x, grad, weight = heavy(21, 40, seed=0), normal(21, 40, seed=1), normal(40, seed=2)
    mean, inverse = x.mean(1), 1 / x.norm(dim=1)
    for centered in (False, True):
        settings = calls.NormSettings("norm", 1e-5, centered=centered)
        found = [
            calls.backward(grad, x, x, weight, mean, inverse, settings, need_bias=centered, tile=RowTile(4, 4, stages))
            for stages in (1, 2, 3)
        ]
        wanted = 2 + centered
        for other in found[1:]:
            assert all(same_bits(a, b) for a, b in zip(other[:wanted], found[0][:wanted], strict=True))


def test_a_tile_wider_than_the_plans_lanes_gives_the_same_gradient():
    from rlalign_kernels.elementwise import triton_norm_calls as calls

    x, grad, weight = normal(3, 2049, seed=0), normal(3, 2049, seed=1), normal(2049, seed=2)
    settings, inverse = calls.NormSettings("norm", 1e-5), torch.tensor([1.0, 2.0, 0.5])
    assert backward_width(2049, 4, 16) == 2 * lanes(2049) == 2 * backward_width(2049, 4, 4)
    wide, narrow = (calls.backward(grad, None, x, weight, None, inverse, settings, tile=RowTile(1, n)) for n in (16, 4))
    assert error(wide[0], narrow[0]) < 1e-7
    assert same_bits(wide[1], narrow[1])


@pytest.mark.parametrize("num_parts", [1, 31, 32, 33, 200, 512])
def test_parts_meet_in_the_written_order(num_parts):
    """Part p goes to lane p mod 32, lanes ascending, then halves."""
    from rlalign_kernels.elementwise import triton_norm_calls as calls

    parts = heavy(2, num_parts, 37, seed=num_parts)
    found = calls._add_parts(parts, torch.float32)
    assert all(same_bits(a, sum_of_parts(b)) for a, b in zip(found, parts, strict=True))


def sum_of_parts(parts):
    padded = torch.zeros(512, parts.shape[1])
    padded[: len(parts)] = parts
    total = torch.zeros(32, parts.shape[1])
    for turn in padded.view(16, 32, -1):
        total = total + turn
    while len(total) > 1:
        total = total[: len(total) // 2] + total[len(total) // 2 :]
    return total[0]


def test_a_row_is_read_ahead_where_shared_memory_has_room():
    stages = {machine: backward_tile(8192, 4, machine, False).num_stages for machine in ((8, 0), (8, 9), (9, 0))}
    assert stages == {(8, 0): 1, (8, 9): 1, (9, 0): 3}
    assert [backward_tile(size, 2, (9, 0), False).rows for size in (128, 768, 1024, 1025)] == [16, 2, 2, 1]


def test_a_program_is_as_wide_as_its_loads_and_long_rows_have_fewer_parts():
    assert [backward_width(8193, itemsize, 16) for itemsize in (2, 4)] == [4096, 2048]
    assert [backward_width(size, 2, 4) for size in (5, 128, 1100, 5000)] == [8, 128, 1024, 1024]
    assert [most_parts(size) for size in (3, 2048, 2049, 8192, 8193)] == [512, 512, 256, 256, 128]


def test_a_program_adds_the_weight_gradients_of_several_tiles(monkeypatch):
    """Of 11 tiles of two rows every third, ascending, the last with a row to spare; rows of a tile by halves."""
    from rlalign_kernels.elementwise import triton_norm_calls as calls

    monkeypatch.setattr(calls, "most_parts", lambda size: 3)
    x, grad, settings = normal(21, 40, seed=0), heavy(21, 40, seed=1), calls.NormSettings("norm", 1e-5, centered=True)
    _, dweight, dbias = calls.backward(
        grad, None, x, None, torch.zeros(21), torch.ones(21), settings, need_bias=True, tile=RowTile(2, 4)
    )
    tiles = torch.cat([grad, torch.zeros(1, 40)]).view(11, 2, 40)
    parts = []
    for part in range(3):
        total = torch.zeros(2, 40)
        for tile in tiles[part::3]:
            total = total + tile
        parts.append(total[0] + total[1])
    assert same_bits(dbias, sum_of_parts(torch.stack(parts)))
    assert error(dweight, (grad.double() * x).sum(0)) < 5e-7
    assert error(dbias, grad.double().sum(0)) < 5e-7


def test_weight_gradients_of_more_rows_than_a_tile():
    x, weight, cotangent = normal(700, 3, seed=0), normal(3, seed=1), normal(700, 3, seed=2)
    a, b = weight.clone().requires_grad_(), weight.double().requires_grad_()
    rms_norm(x, a, eps=1e-5, backend="triton").backward(cotangent)
    truths.rms_norm(x, b, 1e-5).backward(cotangent.double())
    assert error(a.grad, b.grad) < 5e-7


@pytest.mark.parametrize(
    ("dtype", "table_dtype"),
    [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float16, torch.float32)],
)
@pytest.mark.parametrize(
    ("query_heads", "key_heads", "dim", "rotated"), [(3, 1, 32, 32), (3, 3, 24, 16), (1, 1, 6, 2), (10, 5, 40, 24)]
)
def test_rotary_has_the_bits_of_its_formula(query_heads, key_heads, dim, rotated, dtype, table_dtype):
    wide = normal(9, query_heads + key_heads + 2, dim, seed=0, dtype=dtype)
    heads = wide[:, 1:-1].split((query_heads, key_heads), 1)
    cos, sin = normal(9, rotated, seed=1, dtype=table_dtype), normal(rotated, 9, seed=2, dtype=table_dtype).t()
    expected = [rope._rotate(x, cos, sin) for x in heads]
    turned = apply_rotary(*heads, cos, sin, backend="triton")
    assert all(map(same_bits, turned, expected))
    leaves = [x.clone().requires_grad_() for x in heads]
    cotangents = [normal(9, dim, x.shape[1], seed=3, dtype=dtype).transpose(1, 2) for x in heads]
    grads = torch.autograd.grad(apply_rotary(*leaves, cos, sin, backend="triton"), leaves, cotangents)
    assert all(map(same_bits, grads, [rope._rotate_back(cotangent, cos, sin) for cotangent in cotangents]))
    wide[1::2] = torch.nan
    found = apply_rotary(*heads, cos, sin, backend="triton")
    assert all(same_bits(x[::2], y[::2]) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("position_dtype", [torch.int32, torch.int64])
def test_tables(position_dtype):
    positions = torch.tensor([[0, 1, 7], [100_000, 4095, 31]], dtype=position_dtype)
    frequencies = 10000.0 ** (-torch.arange(0, 24, 2) / 24)
    tables = rotary_cos_sin(
        positions, frequencies, attention_scaling=1.5, dtype=torch.float32, backend="triton"
    )  # fmt: skip
    angles = (positions.float()[..., None] * frequencies).double()
    for table, exact in zip(tables, (angles.cos(), angles.sin()), strict=True):
        assert table.shape == (2, 3, 24)
        assert (table - 1.5 * torch.cat((exact, exact), -1)).abs().max() < 3e-7


ACTIVATIONS = {
    "silu": (silu, {}, truths.silu),
    "gelu": (gelu, {}, lambda x: truths.gelu(x, "none")),
    "gelu tanh": (gelu, {"approximate": "tanh"}, lambda x: truths.gelu(x, "tanh")),
}
GATED = {"silu": swiglu, "gelu": geglu, "gelu tanh": geglu}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_their_gradients(name, dtype):
    run, settings, truth = ACTIVATIONS[name]
    bound = {torch.float32: 2e-7, torch.float16: 4e-4}[dtype]
    both = 3 * normal(7, 2, 30, seed=0, dtype=dtype)
    for x, up in ((both[:, 0], both[:, 1]), (both[:, 0].t(), both[:, 1].t()), (both[1], both[2])):
        cotangent = normal(*x.shape, seed=1, dtype=dtype)
        for gated in (False, True):
            inputs = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, up)[: 1 + gated]]
            exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
            out = (GATED[name] if gated else run)(*inputs, **settings, backend="triton")
            exact = truth(exact_inputs[0]) * (exact_inputs[1] if gated else 1)
            assert out.dtype == dtype and error(out, exact) < bound * (1 + gated)
            grads = torch.autograd.grad(out, inputs, cotangent)
            for grad, e in zip(grads, torch.autograd.grad(exact, exact_inputs, cotangent.double()), strict=True):
                assert error(grad, e) < bound
    product = GATED[name](both[:, 0], both[:, 1], **settings, backend="triton")
    assert torch.equal(product, run(both[:, 0], **settings, backend="triton") * both[:, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_far_out(name, dtype):
    run, settings, _ = ACTIVATIONS[name]
    x = torch.tensor([-1e4, -120.0, 0.0, 120.0, 1e4, torch.nan], dtype=dtype, requires_grad=True)
    out = run(x, **settings, backend="triton")
    assert torch.equal(out[:5].detach(), x[:5].detach().clamp(min=0)) and out[5].isnan()
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(x))
    assert grad[:5].tolist() == [0, 0, 0.5, 1, 1] and grad[5].isnan()


def test_one_of_two_gradients():
    gate, up = normal(4, 6, seed=0), normal(4, 6, seed=1)
    both = [t.clone().requires_grad_() for t in (gate, up)]
    swiglu(*both, backend="triton").square().sum().backward()
    for i in range(2):
        inputs = [t.clone().requires_grad_(i == j) for j, t in enumerate((gate, up))]
        swiglu(*inputs, backend="triton").square().sum().backward()
        assert torch.equal(inputs[i].grad, both[i].grad) and inputs[1 - i].grad is None


def test_nothing_in_nothing_out():
    weight = torch.ones(8, requires_grad=True)
    out, total = rms_norm(torch.zeros(0, 8), weight, eps=1e-6, residual=torch.zeros(0, 8), backend="triton")
    out.sum().backward()
    assert out.shape == total.shape == (0, 8) and not weight.grad.any()
    turned = apply_rotary(torch.zeros(0, 2, 8), torch.zeros(0, 1, 8), *torch.zeros(2, 0, 8), backend="triton")
    assert [x.shape for x in turned] == [(0, 2, 8), (0, 1, 8)]
    assert rotary_cos_sin(torch.arange(0), torch.ones(4), dtype=torch.float32, backend="triton")[0].shape == (0, 8)
    assert swiglu(torch.zeros(0, 8), torch.zeros(0, 8), backend="triton").shape == (0, 8)


def test_refusals_name_the_argument():
    x, weight = normal(4, 8, seed=11), normal(8, seed=12)
    run = {"eps": 1e-6, "backend": "triton"}
    with pytest.raises(NotImplementedError, match=r"rms_norm: rows of 16385"):
        rms_norm(torch.zeros(1, 16385), torch.zeros(16385), **run)
    with pytest.raises(NotImplementedError, match=r"x\.dtype=torch\.bfloat16.*interpreter"):
        rms_norm(x.bfloat16(), weight.bfloat16(), **run)
    with pytest.raises(ValueError, match=r"x\.dtype=torch\.float64.*float16"):
        rms_norm(x.double(), weight.double(), **run)
    with pytest.raises(ValueError, match=r"residual \(3, 8\)"):
        rms_norm(x, weight, residual=x[:3], **run)
    with pytest.raises(ValueError, match=r"residual\.dtype=torch\.float16"):
        layer_norm(x, weight, weight, residual=x.half(), **run)
    with pytest.raises(ValueError, match="a bias without a weight"):
        layer_norm(x, None, weight, **run)
    with pytest.raises(ValueError, match=r"float16.*use float32 or bfloat16$"):
        rotary_cos_sin(torch.arange(3), weight, dtype=torch.float16, backend="reference")
    with pytest.raises(ValueError, match=r"silu: x\.dtype=torch\.int64"):
        silu(torch.arange(3), backend="triton")
