"""linear on the GPU: a row's bits are its own in every batch and under every schedule; accuracy, gradients, leaves.

Bits are compared in float32 output, before the one rounding could hide a difference.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from rlalign_kernels import linear
from rlalign_kernels.gemm.schedules import HOPPER_TILES, HopperTile, Tile, _holds, fitted, hopper_available
from rlalign_kernels.gemm.triton_backend import forward
from rlalign_kernels.reference import truths

DEVICE = "cuda"
# (N, K, dtype): a model's shapes, and sizes that are no multiple of any tile, in and out of the copy engine's reach
PROBLEMS = {
    "bf16 6144x2048": (6144, 2048, torch.bfloat16),
    "bf16 2048x6144": (2048, 6144, torch.bfloat16),
    "bf16 4096x4096": (4096, 4096, torch.bfloat16),
    "bf16 12288x4096": (12288, 4096, torch.bfloat16),
    "bf16 1000x520": (1000, 520, torch.bfloat16),
    "bf16 333x777": (333, 777, torch.bfloat16),
    "fp16 520x1000": (520, 1000, torch.float16),
    "fp32 300x520": (300, 520, torch.float32),
    "fp32 129x77": (129, 77, torch.float32),
}
NAMES = pytest.mark.parametrize("name", PROBLEMS)
ROW_COUNTS = [*range(1, 258), 300, 400, 511, 513, 1023, 1024, 1025, 2561, 4096]
STOCK = [
    Tile(block_m, block_n, block_k, 8 if block_m * block_n > 8192 else 4, stages, swap=swap, tma=tma, group=group)
    for block_m, block_n, block_k, stages, group in ((16, 16, 256, 3, 1), (64, 64, 128, 4, 4), (128, 128, 64, 4, 8))
    for swap in (False, True)
    for tma in (False, True)
]
# what the chooser takes of layers wider than 8,448, and where Hopper's kernel can't write the output
STOCK += [Tile(rows, 64, 128, 4, stages, swap=True, tma=True) for rows, stages in ((16, 4), (32, 4), (64, 3))]
STOCK += [Tile(128, 64, 128, 4, 4, tma=True)]
FLOAT32 = [Tile(16, 32, 16, 2, 2), Tile(64, 64, 16, 8, 2), Tile(32, 16, 16, 1, 1, swap=True), Tile(128, 32, 16, 8, 3)]
# every tile that the chooser knows, both ways round, and rings and turns that it would not take
HOPPER = [
    fitted(replace(tile, swap=swap), torch.float32) for tile in HOPPER_TILES for swap in {tile.swap, tile.all_cols < 96}
] + [HopperTile(1, 16, 8, turns=1), HopperTile(2, 128, 3, turns=2), HopperTile(3, 64, 2, swap=False, turns=3, more=32)]
TREES = [Tile(64, 64, 128, 4, 4, swap=swap, tma=True) for swap in (False, True)]
TREES += [fitted(tile, torch.float32) for tile in HOPPER_TILES]


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.detach().contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def normal(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).to(dtype)


def heavy(*shape: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Factors over six decades, hence products over twelve; for float16, which must hold the sums, a hundredth."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    least = -5 if dtype == torch.float16 else -3
    decades = least + 6 * torch.rand(shape, generator=generator, device=DEVICE)
    return (torch.randn(shape, generator=generator, device=DEVICE) * 10**decades).to(dtype)


def make(name: str, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    width, depth, dtype = PROBLEMS[name]
    sizes = ((num_rows, depth), (width, depth), (width,))
    return tuple(heavy(*size, seed=seed, dtype=dtype) for seed, size in enumerate(sizes))


def wide(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, **keywords) -> torch.Tensor:
    """float32 output into memory that holds NaN: the allocator is given some to hand out."""
    torch.full((x.shape[0], weight.shape[0]), torch.nan, device=DEVICE)
    return forward(x, weight, bias, out_dtype=torch.float32, **keywords)


@NAMES
def test_a_row_alone_and_in_every_batch(name):
    x, weight, bias = make(name, 16384)
    whole = wide(x, weight, bias)
    assert whole.isfinite().all()
    for count in ROW_COUNTS:
        for start in (0, 8191 - count // 2, 16384 - count):
            part = slice(start, start + count)
            assert same_bits(wide(x[part], weight, bias), whole[part]), part
    for row in (0, 7, 8191, 16383):
        assert same_bits(wide(x[row : row + 1], weight, bias), whole[row : row + 1]), row
    order = torch.randperm(16384, generator=torch.Generator(DEVICE).manual_seed(9), device=DEVICE)
    assert same_bits(wide(x[order], weight, bias), whole[order])
    rounded = whole.to(x.dtype)
    for count in (1, 16, 64, 257, 4096, 16384):
        assert same_bits(linear(x[:count], weight, bias, backend="triton"), rounded[:count]), count
    assert linear(x[:0], weight, bias, backend="triton").shape == (0, weight.shape[0])


@pytest.mark.parametrize("name", ["bf16 1000x520", "bf16 333x777", "fp32 300x520"])
def test_a_row_alone_and_among_a_hundred_thousand(name):
    x, weight, bias = make(name, 100_000)
    whole = wide(x, weight, bias)
    for row in (0, 50_000, 99_999):
        assert same_bits(wide(x[row : row + 1], weight, bias), whole[row : row + 1]), row


@NAMES
@pytest.mark.parametrize("data", [heavy, normal])
def test_every_schedule(name, data):
    width, depth, dtype = PROBLEMS[name]
    x, weight, bias = (data(*size, seed=3, dtype=dtype) for size in ((200, depth), (width, depth), (width,)))
    expected = wide(x, weight, bias)
    boxes = depth % 8 == 0
    schedules = FLOAT32 if dtype == torch.float32 else [tile for tile in STOCK if boxes or not tile.tma]
    if dtype != torch.float32 and boxes and hopper_available(torch.cuda.get_device_capability()):
        schedules = [*schedules, *(HOPPER if width % 4 == 0 else [])]
    for tile in schedules:
        assert same_bits(wide(x, weight, bias, schedule=tile), expected), tile
        assert same_bits(wide(x[:3], weight, bias, schedule=tile), expected[:3]), tile


@pytest.mark.parametrize("depth", [64, 136, 256])
def test_tiles_of_fewer_boxes_than_a_ring_holds(depth):
    """Several tiles per program, of which only the first finds its boxes under way."""
    if not hopper_available(torch.cuda.get_device_capability()):
        pytest.skip("the kernel with the ring needs sm_90 and a Triton with Gluon for it")
    x, weight = (heavy(rows, depth, seed=rows, dtype=torch.bfloat16) for rows in (4096, 6144))
    expected = wide(x, weight, schedule=Tile(128, 128, 64, 8, 3))
    for tile in HOPPER:
        assert same_bits(wide(x, weight, schedule=tile), expected), tile
    low, high = (wide(x[:, k : k + depth // 2], weight[:, k : k + depth // 2]) for k in (0, depth // 2))
    assert same_bits(wide(x, weight, leaves=2), low + high)


@NAMES
@pytest.mark.parametrize("leaves", [2, 4, 8])
def test_leaves_are_chains_that_meet_in_a_tree(name, leaves):
    x, weight, bias = make(name, 1100)
    if x.shape[1] % leaves:
        with pytest.raises(ValueError, match=f"leaves={leaves} does not divide"):
            linear(x, weight, leaves=leaves, backend="triton")
        return
    length = x.shape[1] // leaves
    sums = [wide(x[:, k : k + length], weight[:, k : k + length]) for k in range(0, x.shape[1], length)]
    while len(sums) > 1:
        sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
    expected = sums[0] + bias.float()
    assert same_bits(wide(x, weight, bias, leaves=leaves), expected)
    for count in (1, 16, 17, 32, 33, 60, 64, 65, 130, 300, 600):
        assert same_bits(wide(x[:count], weight, bias, leaves=leaves), expected[:count]), count
    if length % 128 == 0 and hopper_available(torch.cuda.get_device_capability()):
        for tile in TREES:
            if isinstance(tile, Tile) or _holds(tile, leaves):
                assert same_bits(wide(x, weight, bias, leaves=leaves, schedule=tile), expected), tile
    assert same_bits(linear(x, weight, bias, leaves=leaves, backend="triton"), expected.to(x.dtype))


@NAMES
def test_neighbours_may_hold_anything_and_strides_are_free(name):
    x, weight, bias = make(name, 300)
    whole = wide(x, weight, bias)
    for poison in (torch.nan, torch.inf, torch.finfo(x.dtype).max):
        around = torch.full((302, x.shape[1] + 24), poison, dtype=x.dtype, device=DEVICE)
        around[1:301:2, 8 : x.shape[1] + 8] = x[::2]
        found = wide(around[1:301, 8 : x.shape[1] + 8], weight, bias)
        assert same_bits(found[::2], whole[::2])
        weights = torch.full((weight.shape[0] + 2, weight.shape[1] + 9), poison, dtype=x.dtype, device=DEVICE)
        weights[1:-1, 3:-6] = weight
        assert same_bits(wide(x, weights[1:-1, 3:-6], bias), whole)
    assert same_bits(wide(x.t().contiguous().t(), weight, bias), whole)
    assert same_bits(wide(x, weight.t().contiguous().t(), bias), whole)
    assert same_bits(wide(x[:1].expand(40, -1), weight, bias), whole[:1].expand(40, -1))
    cube = x.view(3, 100, -1).transpose(0, 1)
    assert same_bits(
        linear(cube, weight, bias, backend="triton").transpose(0, 1).flatten(0, 1),
        linear(x, weight, bias, backend="triton"),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("leaves", [1, 2])
def test_no_sum_is_minus_zero(dtype, leaves):
    """Products that underflow below zero, and a K that needs padding or does not."""
    for depth in (16, 32, 40, 64, 72, 1024):
        x = torch.full((70, depth), -1e-30, dtype=dtype, device=DEVICE)
        weight = torch.full((136, depth), 1e-30, dtype=dtype, device=DEVICE)
        for count in (1, 17, 70):
            assert not bits(wide(x[:count], weight, leaves=leaves)).any(), (depth, count)


@NAMES
def test_infinities_and_nans_are_where_torch_has_them(name):
    x, weight, bias = (normal(*shape, seed=8, dtype=PROBLEMS[name][2]) for shape in ((70, 64), (136, 64), (136,)))
    x[3, 5], x[4, 7], x[5, 1] = torch.inf, -torch.inf, torch.nan
    x[6, 2], x[6, 3] = torch.inf, torch.inf
    found, expected = linear(x, weight, bias, backend="triton"), F.linear(x, weight, bias)
    for where in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(where(found), where(expected))


@NAMES
@pytest.mark.parametrize("num_rows", [1, 64, 300, 2048])
def test_as_accurate_as_torch(name, num_rows):
    width, depth, dtype = PROBLEMS[name]
    x, weight, bias = (normal(*size, seed=5, dtype=dtype) for size in ((num_rows, depth), (width, depth), (width,)))
    truth = truths.linear(x, weight, bias)

    def error(y: torch.Tensor) -> float:
        return float((y.double() - truth).norm() / truth.norm())

    found = linear(x, weight, bias, backend="triton")
    assert error(found) <= 1.2 * error(F.linear(x, weight, bias))


@NAMES
def test_gradients_match_float64_and_repeat(name):
    width, depth, dtype = PROBLEMS[name]
    inputs = [normal(*size, seed=6, dtype=dtype) for size in ((3, 100, depth), (width, depth), (width,))]
    cotangent = normal(3, 100, width, seed=7, dtype=dtype)
    exact_inputs = [x.double().requires_grad_() for x in inputs]
    exact = torch.autograd.grad(truths.linear(*exact_inputs), exact_inputs, cotangent.double())
    runs = []
    for _ in range(3):
        given = [x.clone().requires_grad_() for x in inputs]
        runs.append(torch.autograd.grad(linear(*given, backend="triton"), given, cotangent))
    bound = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for first, *others, truth in zip(*runs, exact, strict=True):
        assert all(same_bits(first, other) for other in others)
        assert (first.double() - truth).norm() / truth.norm() < bound


@pytest.mark.parametrize("num_rows", [1, 64, 300, 2048])
def test_graph_replay_gives_the_eager_bits(num_rows):
    x, weight, bias = make("bf16 2048x6144", num_rows)
    expected = linear(x, weight, bias, backend="triton")
    static = torch.zeros_like(x)
    linear(static, weight, bias, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear(static, weight, bias, backend="triton")
    static.copy_(x)
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        assert same_bits(out, expected)
