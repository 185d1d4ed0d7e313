"""Norms, rotary and activations on the GPU: the contract's axes bit for bit, accuracy against float64, gradients."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from rlalign_kernels import (
    apply_rotary,
    geglu,
    gelu,
    layer_norm,
    rms_norm,
    rope,
    rotary_cos_sin,
    silu,
    swiglu,
    write_kv_cache,
)
from rlalign_kernels import norm as norm_module
from rlalign_kernels.elementwise.row_plan import RowTile, backward_tile
from rlalign_kernels.reference import truths
from support_attention import DEVICE, heavy, same_bits

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
SIZES = (1, 128, 896, 2048, 2561, 5120, 16384)
# every length up to two tiles and one more, and some beyond; the short list where shapes are many
SWEEP = (*range(258), 1023, 1024, 1025, 4096)
BATCHES = (0, 1, 2, 3, 5, 8, 13, 16, 17, 31, 33, 64, 100, 127, 128, 129, 200, 255, 256, 257, 1023, 1024, 1025, 4096)
EPS = 1e-6


def decades(shape, dtype, seed=0):
    """Values over 12 decades (6 in float16): sums whose order matters at every step."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    spread = 3.0 if dtype == torch.float16 else 6.0
    scale = 10 ** ((torch.rand(shape, generator=generator, device=DEVICE) * 2 - 1) * spread)
    values = torch.randn(shape, generator=generator, device=DEVICE) * scale
    return values.clamp(-6e4, 6e4).to(dtype) if dtype == torch.float16 else values.to(dtype)


def normal(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).to(dtype)


MADE = {"normal": normal, "heavy": heavy, "decades": decades}


def error(x: torch.Tensor, truth: torch.Tensor) -> float:
    return float((x.detach().double() - truth.detach()).norm() / truth.detach().norm())


def poison(*shape: int, dtype: torch.dtype) -> None:
    """What the allocator hands out next is NaN."""
    block = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
    del block


def llama(x, weight, residual=None):
    return rms_norm(x, weight, eps=EPS, residual=residual, backend="triton")


def gemma(x, weight, residual=None):
    form = {"weight_offset": 1.0, "cast_before_weight": False}
    return rms_norm(x, weight, eps=EPS, residual=residual, backend="triton", **form)


def layer(x, weight, residual=None):
    return layer_norm(x, weight, weight, eps=EPS, residual=residual, backend="triton")


NORMS = {"llama": llama, "gemma": gemma, "layer": layer}


@DTYPES
@pytest.mark.parametrize("values", ["normal", "decades"])
@pytest.mark.parametrize("size", SIZES)
def test_a_row_alone_is_that_row_in_every_batch(size, values, dtype):
    make, long = MADE[values], size in (128, 2048)
    rows, batches = (16384, (*SWEEP, 16384)) if long else (4096, BATCHES)
    x, residual, weight = make((rows, size), dtype), make((rows, size), dtype, 1), heavy((size,), dtype, 2)
    for norm in (llama, layer) if size in (128, 2561) else (llama,):
        poison(rows, size, dtype=dtype)
        whole, total = norm(x, weight, residual)
        assert same_bits([total], [x + residual])
        assert same_bits([whole], [norm(total, weight)])
        for count in batches:
            first = norm(total[:count], weight)
            assert same_bits([first], [whole[:count]])
            assert same_bits([norm(total[rows - count :], weight)], [whole[rows - count :]])
            middle = slice(count // 2, count // 2 + min(count, 1))
            assert same_bits([norm(total[middle], weight)], [first[middle]])
        for row in (0, rows // 2, rows - 1):
            assert same_bits([norm(total[row], weight)], [whole[row]])
            beside = torch.full_like(total[:257], torch.nan)
            beside[row % 257] = total[row]
            assert same_bits([norm(beside, weight)[row % 257]], [whole[row]])


@DTYPES
@pytest.mark.parametrize("size", [128, 1000, 4096])
def test_strides_and_alignment_change_no_bit(size, dtype):
    x, weight = decades((120, size), dtype), heavy((size,), dtype, 2)
    whole = llama(x, weight)
    wide = torch.full((120, 2 * size + 3), torch.nan, dtype=dtype, device=DEVICE)
    for start in (0, 1, 8, size):
        wide.fill_(torch.nan)
        wide[:, start : start + size] = x
        assert same_bits([llama(wide[:, start : start + size], weight)], [whole])
    assert same_bits([llama(x.t().contiguous().t(), weight)], [whole])
    heads = x.view(10, 4, 3, size)
    for dims in ((0, 2, 1, 3), (2, 0, 1, 3)):
        assert same_bits([llama(heads.permute(dims), weight)], [whole.view(10, 4, 3, size).permute(dims)])
    assert same_bits([llama(x[5].expand(7, size), weight)], [whole[5].expand(7, size)])
    shifted = torch.empty(size + 1, dtype=dtype, device=DEVICE)[1:].copy_(weight)
    assert same_bits([llama(x, shifted)], [whole])


@DTYPES
@pytest.mark.parametrize("size", [128, 896, 2048, 5120])
def test_every_schedule_of_a_norm_gives_one_result(size, dtype):
    from rlalign_kernels.elementwise import triton_norm_calls as calls

    x, residual, weight = (decades((101, size), dtype, 3), decades((101, size), dtype, 4), heavy((size,), dtype, 5))
    for centered in (False, True):
        settings = calls.NormSettings("norm", EPS, cast=not centered, centered=centered)
        bias = weight if centered else None
        whole = [t for t in calls.forward(x, residual, weight, bias, settings, save=True) if t is not None]
        total, inverse, mean = whole[1], whole[-1], whole[2] if centered else None
        grads = calls.backward(x, residual, total, weight, mean, inverse, settings, need_bias=centered)
        tiles = [(1, 1), (1, 2), (1, 8), (4, 4)] if size > 128 else [(1, 1), (2, 8), (8, 2), (64, 4)]
        for rows, num_warps in tiles:
            tile = RowTile(rows, num_warps)
            other = calls.forward(x, residual, weight, bias, settings, save=True, tile=tile)
            assert same_bits([t for t in other if t is not None], whole), tile
        taken = backward_tile(size, dtype.itemsize, (9, 0), centered)
        for num_stages in (1, 2, 3):  # warps belong to the order of a gradient's sums
            tile = RowTile(taken.rows, taken.num_warps, num_stages)
            other = calls.backward(x, residual, total, weight, mean, inverse, settings, need_bias=centered, tile=tile)
            assert same_bits([t for t in other if t is not None], [t for t in grads if t is not None]), tile


@DTYPES
@pytest.mark.parametrize("size", [1, 100, 5120, 16384])
def test_norms_are_as_accurate_as_torch(size, dtype):
    x, weight = 3 * heavy((300, size), dtype, 6) + 1, heavy((size,), dtype, 7) + 1
    for norm, form in ((llama, {}), (gemma, {"weight_offset": 1.0, "cast_before_weight": False})):
        truth = truths.rms_norm(x, weight, EPS, form.get("weight_offset", 0.0))
        native = norm_module._native(x, None, weight, EPS, form.get("weight_offset", 0.0), not form)
        assert error(norm(x, weight), truth) <= 1.2 * error(native, truth) + 1e-9
    if size > 1:
        truth = truths.layer_norm(x, weight, weight, EPS)
        assert error(layer(x, weight), truth) <= 1.2 * error(F.layer_norm(x, (size,), weight, weight, EPS), truth)


@DTYPES
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(("rows", "size"), [(37, 64), (1500, 1000), (1500, 2561), (600, 8192), (300, 16384)])
def test_norm_gradients(name, rows, size, dtype):
    shapes = ((rows, size), (rows, size), (size,))
    inputs = [heavy(shape, dtype, 8 + i).requires_grad_() for i, shape in enumerate(shapes)]
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    out, total = NORMS[name](inputs[0], inputs[2], inputs[1])
    cotangents = [heavy((rows, size), dtype, 12), heavy((rows, size), dtype, 13)]
    grads = torch.autograd.grad([out, total], inputs, cotangents, retain_graph=True)
    exact_total = exact_inputs[0] + exact_inputs[1]
    if name == "layer":
        exact = truths.layer_norm(exact_total, exact_inputs[2], exact_inputs[2], EPS)
    else:
        exact = truths.rms_norm(exact_total, exact_inputs[2], EPS, float(name == "gemma"))
    exact_grads = torch.autograd.grad([exact, exact_total], exact_inputs, [c.double() for c in cotangents])
    bound = {torch.float32: 1e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}[dtype]
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        assert error(grad, exact_grad) < bound
    for _ in range(30):
        again = torch.autograd.grad([out, total], inputs, cotangents, retain_graph=True)
        assert same_bits(again, grads)
    for i in range(3):
        alone = [t.detach().requires_grad_(i == j) for j, t in enumerate(inputs)]
        both = NORMS[name](alone[0], alone[2], alone[1])
        assert [t.requires_grad for t in both] == [True, i < 2]
        found = torch.autograd.grad(both[: 1 + (i < 2)], alone[i], cotangents[: 1 + (i < 2)])
        assert same_bits(found, [grads[i]])


ROTATED = [(16, 8, 128, 128), (8, 8, 128, 128), (1, 1, 64, 32), (5, 1, 80, 20), (40, 8, 96, 96)]


@DTYPES
@pytest.mark.parametrize("values", ["heavy", "decades"])
@pytest.mark.parametrize("wide_tables", [False, True])
@pytest.mark.parametrize(("query_heads", "key_heads", "dim", "rotated"), ROTATED)
def test_rotary_has_the_bits_of_its_formula(query_heads, key_heads, dim, rotated, wide_tables, values, dtype):
    from rlalign_kernels.elementwise import triton_rotary

    make = MADE[values]
    tokens, counts = (4096, SWEEP) if (query_heads, key_heads) == (16, 8) else (700, (0, 1, 2, 7, 33, 256, 257, 700))
    heads = make((tokens, query_heads + key_heads + 2, dim), dtype, 0)[:, 1:-1].split((query_heads, key_heads), 1)
    cos, sin = (make((tokens, rotated), torch.float32 if wide_tables else dtype, seed) for seed in (1, 2))
    if values == "decades":  # as of a cosine, and no product overflows in float16
        cos, sin = cos.clamp(-1, 1), sin.clamp(-1, 1)
    expected = [rope._rotate(x, cos, sin) for x in heads]
    assert all(x.isfinite().all() for x in expected)
    for count in counts:
        poison(count, query_heads, dim, dtype=dtype)
        found = apply_rotary(*(x[tokens - count :] for x in (*heads, cos, sin)), backend="triton")
        assert same_bits(found, [x[tokens - count :] for x in expected])
        middle = slice(count // 2, count // 2 + min(count, 1))
        alone = apply_rotary(*(x[tokens - count :][middle] for x in (*heads, cos, sin)), backend="triton")
        assert same_bits(alone, [x[middle] for x in found])
    for pairs in (64, 256, 4096):
        assert same_bits(triton_rotary.rotate(*heads, cos, sin, back=False, pairs=pairs), expected)
    cotangents = [make((tokens, dim, x.shape[1]), dtype, 3).transpose(1, 2) for x in heads]
    leaves = [x.detach().clone().requires_grad_() for x in heads]
    grads = torch.autograd.grad(apply_rotary(*leaves, cos, sin, backend="triton"), leaves, cotangents)
    assert same_bits(grads, [rope._rotate_back(cotangent, cos, sin) for cotangent in cotangents])


@DTYPES
@pytest.mark.parametrize(("heads", "dim", "value_dim"), [(8, 128, 128), (1, 80, 64), (16, 192, 128), (3, 7, 5)])
def test_keys_and_values_come_into_their_slots(heads, dim, value_dim, dtype):
    pages, size = 64, 16
    for count in (0, 1, 2, 7, 128, 1000):
        rows = heavy((count, heads * (dim + value_dim) + 3), dtype, count)
        key = rows[:, : heads * dim].view(count, heads, dim)
        value = rows[:, heads * dim : -3].view(count, heads, value_dim)
        slots = torch.randperm(pages * size, device=DEVICE)[:count]
        ours, theirs = (
            [heavy((pages, size, heads, d), dtype, seed) for seed, d in ((5, dim), (6, value_dim))] for _ in range(2)
        )
        write_kv_cache(key, value, *ours, slot_mapping=slots, backend="triton")
        write_kv_cache(key, value, *theirs, slot_mapping=slots, backend="native")
        assert same_bits(ours, theirs)


@DTYPES
def test_tables_are_accurate_and_their_rows_alone(dtype):
    positions = torch.randint(0, 1_000_000, (4096,), device=DEVICE)
    frequencies = 10000.0 ** (-torch.arange(0, 128, 2, device=DEVICE) / 128)
    run = {"attention_scaling": 1.25, "dtype": dtype}
    found = rotary_cos_sin(positions, frequencies, **run, backend="triton")
    native = rotary_cos_sin(positions, frequencies, **{**run, "dtype": torch.float32}, backend="native")
    angles = (positions.float()[:, None] * frequencies).double().repeat(1, 2)
    for ours, theirs, truth in zip(found, native, (angles.cos(), angles.sin()), strict=True):
        assert error(ours, 1.25 * truth) <= 1.2 * error(theirs.to(dtype), 1.25 * truth)
    for rows in (slice(0, 1), slice(5, 6), slice(7, 300)):
        assert same_bits(
            rotary_cos_sin(positions[rows].int(), frequencies, **run, backend="triton"), [t[rows] for t in found]
        )


ACTIVATIONS = {
    "silu": (silu, swiglu, {}, F.silu, truths.silu),
    "gelu": (gelu, geglu, {}, F.gelu, lambda x: truths.gelu(x, "none")),
    "gelu tanh": (
        gelu, geglu, {"approximate": "tanh"}, lambda x: F.gelu(x, approximate="tanh"), lambda x: truths.gelu(x, "tanh")
    ),
}  # fmt: skip


@DTYPES
@pytest.mark.parametrize("values", ["heavy", "decades"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_depends_on_its_element_alone(name, values, dtype):
    from rlalign_kernels.elementwise import triton_activation_calls as calls

    run, gated, how, _, _ = ACTIVATIONS[name]
    x, up = 3 * MADE[values]((600, 1003), dtype, 1), MADE[values]((600, 1003), dtype, 2)
    kind = {"silu": 0, "gelu": 1, "gelu tanh": 2}[name]
    whole, product = run(x, **how, backend="triton"), gated(x, up, **how, backend="triton")
    assert whole.isfinite().all() and not product.isnan().any()  # an infinite product is that of float16's range
    assert same_bits([product], [whole * up])
    for rows, columns in ((slice(0, 1), slice(0, 1)), (slice(3, 40), slice(1, 77)), (slice(0, 600), slice(500, 1003))):
        piece = gated(x[rows, columns], up[rows, columns], **how, backend="triton")
        assert same_bits([piece], [product[rows, columns]])
    assert same_bits([gated(x.t(), up.t(), **how, backend="triton")], [product.t()])
    assert same_bits([run(x.flatten()[1:], **how, backend="triton")], [whole.flatten()[1:]])
    for block, num_warps in ((256, 1), (1024, 2), (8192, 8)):
        assert same_bits([calls.forward(x, up, kind, block=block, num_warps=num_warps)], [product])
    poisoned = x.clone()
    poisoned[1::2] = torch.nan
    assert same_bits([run(poisoned, **how, backend="triton")[::2]], [whole[::2]])
    far = torch.tensor([-1e4, -200.0, 0.0, 200.0, 1e4], dtype=dtype, device=DEVICE, requires_grad=True)
    out = run(far, **how, backend="triton")
    assert torch.equal(out.detach(), far.detach().clamp(min=0))
    assert torch.autograd.grad(out, far, torch.ones_like(far))[0].tolist() == [0, 0, 0.5, 1, 1]


@DTYPES
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_gradients_are_as_accurate_as_torch(name, dtype):
    run, gated, how, plain, truth = ACTIVATIONS[name]
    x, up, cotangent = (heavy((512, 700), dtype, seed) for seed in (1, 2, 3))
    x = (2 * x).detach()
    results = []
    for kind in ("ours", "torch", "truth"):
        inputs = [(t.double() if kind == "truth" else t).clone().requires_grad_() for t in (x, up)]
        if kind == "ours":
            single, out = run(inputs[0], **how, backend="triton"), gated(*inputs, **how, backend="triton")
        else:
            single = (plain if kind == "torch" else truth)(inputs[0])
            out = single * inputs[1]
        grads = torch.autograd.grad(out, inputs, cotangent.to(out.dtype), retain_graph=True)
        results.append([single, out, *grads, *torch.autograd.grad(single, inputs[0], cotangent.to(out.dtype))])
    for i, (ours, theirs, exact) in enumerate(zip(*results, strict=True)):
        assert error(ours, exact) <= 1.2 * error(theirs, exact), i


def test_nothing_waits_for_the_gpu_and_a_graph_replays_the_eager_bits():
    x, residual, weight = (heavy(shape, torch.bfloat16, i) for i, shape in enumerate(((64, 2048), (64, 2048), (2048,))))
    heads, tables = x.view(64, 16, 128), heavy((64, 128), torch.bfloat16, 3)
    positions, frequencies = torch.arange(64, device=DEVICE), torch.rand(64, device=DEVICE)

    def step() -> list[torch.Tensor]:
        out, total = llama(x, weight, residual)
        turned = apply_rotary(llama(heads, weight[:128]), heads[:, :8], tables, tables, backend="triton")
        cos_sin = rotary_cos_sin(positions, frequencies, dtype=torch.bfloat16, backend="triton")
        return [out, total, *turned, *cos_sin, layer(x, weight), swiglu(x, residual, backend="triton"), geglu(x, out, backend="triton")]  # fmt: skip  # noqa: E501

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in range(3):
        x.copy_(heavy((64, 2048), torch.bfloat16, 20 + seed))
        for t in captured:
            t.fill_(torch.nan)
        graph.replay()
        assert same_bits(captured, step())


@pytest.mark.parametrize("size", [2048, 4096, 16384])
def test_gradients_are_the_same_beside_noise(size):
    x, weight = (
        heavy((3000, size), torch.bfloat16, 0).requires_grad_(),
        heavy((size,), torch.bfloat16, 1).requires_grad_(),
    )
    out = llama(x, weight)
    cotangent = heavy(tuple(out.shape), torch.bfloat16, 2)
    first = torch.autograd.grad(out, [x, weight], cotangent, retain_graph=True)
    noise, stream, rng = torch.randn(2048, 2048, device=DEVICE), torch.cuda.Stream(), random.Random(0)
    for _ in range(100):
        with torch.cuda.stream(stream):
            for _ in range(rng.randint(0, 3)):
                noise @ noise
        assert same_bits(torch.autograd.grad(out, [x, weight], cotangent, retain_graph=True), first)


def test_refusals_name_the_argument():
    x = torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"rms_norm: x\.device=cpu.*CUDA"):
        llama(x, torch.zeros(8))
    with pytest.raises(ValueError, match=r"silu: x\.device=cpu"):
        silu(x, backend="triton")
    with pytest.raises(ValueError, match=r"weight\.device=cpu differs"):
        llama(x.to(DEVICE), torch.zeros(8))
    with pytest.raises(ValueError, match=r"position_ids\.device=cpu differs"):
        rotary_cos_sin(torch.arange(2), torch.ones(4, device=DEVICE), dtype=torch.float32, backend="triton")
