"""The output layer on the GPU: the contract's axes bit for bit, accuracy against float64, gradients, memory, draws.

Three equalities that chain: a row alone = that row among any others (scored) = the row whose token was drawn.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from rlalign_kernels import SamplingRows, linear_logprob, linear_sample
from rlalign_kernels.reference import truths
from rlalign_kernels.reference.philox import gumbel
from support_attention import DEVICE, bits, heavy

VOCABS = [1, 2, 31, 32, 33, 127, 128, 129, 255, 256, 257, 4095, 4096, 4097, 50257, 128256, 151936]
FIELDS = ("logprob", "entropy", "logsumexp")
ALL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DTYPES = pytest.mark.parametrize("dtype", ALL_DTYPES)
MIB = 2**20


def decades(shape, dtype, seed):
    """Factors over six decades, hence products over twelve, so small that logits are of a few units."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    scale = 10 ** (6 * torch.rand(shape, generator=generator, device=DEVICE) - 5.3)
    return (torch.randn(shape, generator=generator, device=DEVICE) * scale).to(dtype)


def problem(num_rows, vocab, depth=64, dtype=torch.bfloat16, data=heavy):
    hidden, weight = data((num_rows, depth), dtype, 1), data((vocab, depth), dtype, 2) * 0.2
    return hidden, weight, torch.arange(num_rows, device=DEVICE) * 7919 % vocab


def make_rows(n, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, truncates=None):
    def full(value, dtype):
        return torch.as_tensor(value, device=DEVICE).to(dtype).expand(n).clone()

    return SamplingRows(
        full(temperature, torch.float32), full(top_k, torch.int64), full(top_p, torch.float32),
        full(min_p, torch.float32), truncates,
    )  # fmt: skip


def mixed_rows(n):
    i = torch.arange(n, device=DEVICE)

    def pick(*values):
        return torch.tensor(values, device=DEVICE)[i % len(values)]

    return make_rows(
        n, temperature=pick(0.0, 1.0, 0.6, 1.3), top_k=pick(0, 5, 0, 40, 0), top_p=pick(1.0, 0.9, 1.0),
        min_p=pick(0.0, 0.0, 0.02, 0.0, 0.0, 0.0, 0.3),
    )  # fmt: skip


def poison(num_rows, fields=8):
    """The allocator is given NaN to hand out."""
    junk = [torch.full((fields, max(1, num_rows)), torch.nan, device=DEVICE) for _ in range(4)]
    del junk


def values(out):
    return torch.stack([getattr(out, name) for name in FIELDS])


def score(hidden, weight, targets, **keywords):
    poison(hidden.shape[0])
    return values(linear_logprob(hidden, weight, targets, backend="triton", **keywords))


def error(x, truth):
    return float((x.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize(
    ("vocab", "dtype", "capped", "data"),
    [(vocab, torch.bfloat16, False, heavy) for vocab in VOCABS]
    + [(4097, dtype, True, heavy) for dtype in ALL_DTYPES]
    + [(vocab, dtype, False, data) for vocab in (33, 50257) for dtype in ALL_DTYPES[1:] for data in (heavy, decades)]
    + [(vocab, torch.bfloat16, False, decades) for vocab in (33, 50257)],
)
def test_a_row_alone_and_among_others(vocab, dtype, capped, data):
    hidden, weight, targets = problem(4096, vocab, dtype=dtype, data=data)
    rows = make_rows(4096, temperature=0.6, truncates=False)
    keywords = {"bias": heavy((vocab,), dtype, 3), "softcap": 5.0} if capped else {}
    whole = score(hidden, weight, targets, rows=rows, **keywords)
    assert whole.isfinite().all()
    for size in (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 256, 257, 1024):
        # row 1234 comes first, in the middle and last
        for start in (0, 1234, 1234 - size // 2, 1235 - size, 4096 - size):
            part = slice(start, start + size)
            got = score(hidden[part], weight, targets[part], rows=rows[part], **keywords)
            assert torch.equal(bits(got), bits(whole[:, part])), part
    order = torch.randperm(4096, device=DEVICE)
    got = score(hidden[order], weight, targets[order], rows=rows, **keywords)
    assert torch.equal(bits(got), bits(whole[:, order]))
    for value in (torch.nan, torch.inf, torch.finfo(dtype).max):
        hidden[1::2] = value
        got = score(hidden, weight, targets, rows=rows, **keywords)
        assert torch.equal(bits(got[:, ::2]), bits(whole[:, ::2])), value


def test_every_number_of_rows_out_of_a_hundred_thousand():
    """Scored and drawn: the first, the middle and the last so many; one alone among them."""
    hidden, weight, targets = problem(100_000, 4097)
    rows, seeds = make_rows(100_000, temperature=0.6, truncates=False), torch.arange(100_000, device=DEVICE) * 977
    rows.temperature[::3] = 0.0

    def run(part):
        scored = score(hidden[part], weight, targets[part], rows=rows[part])
        drawn = linear_sample(
            hidden[part], weight, rows=rows[part], seeds=seeds[part], positions=seeds[part], backend="triton"
        )  # fmt: skip
        return torch.stack((*scored, drawn.logprob, drawn.token.float()))

    whole = run(slice(None))
    assert whole.isfinite().all()
    for count in (*range(258), 1023, 1024, 1025, 4096, 16384):
        for start in (0, 50_000 - count // 2, 100_000 - count):
            part = slice(start, start + count)
            assert torch.equal(bits(run(part)), bits(whole[:, part])), part


@DTYPES
@pytest.mark.parametrize("depth", [64, 100, 2048])
@pytest.mark.parametrize("data", [heavy, decades])
def test_every_schedule_gives_the_same_bits(dtype, depth, data):
    from rlalign_kernels.vocab import triton_launches as launches
    from rlalign_kernels.vocab.schedules import HeadTile

    if dtype == torch.float32:
        tiles = [HeadTile(16, 128, 16, 4, 2), HeadTile(32, 128, 16, 4, 2), HeadTile(64, 128, 16, 8, 1)]
    else:
        tiles = [
            HeadTile(16, 128, 128, 4, 3, swap=True, tma=True), HeadTile(32, 128, 64, 4, 4, swap=True),
            HeadTile(64, 128, 64, 4, 4, tma=True, per_processor=2), HeadTile(16, 128, 64, 4, 2),
            HeadTile(128, 128, 64, 8, 3, tma=True, flatten=True), HeadTile(128, 256, 64, 8, 3, tma=True),
            HeadTile(128, 256, 32, 8, 3, tma=True, row_tiles=3),
        ]  # fmt: skip
    hidden, weight, _ = problem(193, 1000, depth, dtype, data)
    head = launches.Head.of(weight, None, None)
    settings = launches.Settings(*(getattr(make_rows(193, temperature=0.6), f) for f in launches.Settings._fields))
    seeds = torch.arange(193, device=DEVICE) * 977
    found = []
    for tile in tiles:
        poison(193)
        wide = tile.block_n > 128
        parts = [launches.scan(hidden, head, settings, None, tile=tile), launches.logits(hidden, head, tile)]
        if not wide:
            drawing = {"seeds": seeds, "positions": seeds, "raw": True}
            parts.append(launches.scan(hidden, head, settings, None, tile=tile, **drawing))
        found.append(parts)
    assert found[0][1].isfinite().all()
    for other in found[1:]:
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found[0], other, strict=False))


@DTYPES
@pytest.mark.parametrize("extras", [{}, {"bias": True, "softcap": 5.0}])
def test_as_accurate_as_torch(dtype, extras):
    hidden, weight, targets = problem(300, 3000, 512, dtype)
    keywords = {"softcap": extras.get("softcap")}
    keywords["bias"] = heavy((3000,), dtype, 3) if "bias" in extras else None
    inputs = [x.requires_grad_() for x in (hidden, weight, keywords["bias"]) if x is not None]
    rows = make_rows(300, temperature=0.6, truncates=False)
    cotangents = [torch.randn(300, device=DEVICE) for _ in FIELDS]
    ours = values(linear_logprob(hidden, weight, targets, rows=rows, backend="triton", **keywords))
    logits = F.linear(hidden, weight, keywords["bias"]).float()
    if keywords["softcap"]:
        logits = torch.tanh(logits / keywords["softcap"]) * keywords["softcap"]
    logits = logits / rows.temperature[:, None]
    log_p = torch.log_softmax(logits, 1)
    native = (
        log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(1), torch.logsumexp(logits, 1)
    )  # fmt: skip
    results = [(*out, *torch.autograd.grad(list(out), inputs, cotangents)) for out in (ours, native)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    bias = wide[2] if "bias" in extras else None
    truth = truths.logprob(wide[0], wide[1], targets, rows.temperature, None, bias, extras.get("softcap"))
    exact = (*truth, *torch.autograd.grad(truth, wide, [c.double() for c in cotangents]))
    for mine, theirs, want in zip(*results, exact, strict=True):
        assert error(mine, want) <= 1.2 * error(theirs, want) + 1e-7


def test_gradients_are_deterministic_and_those_of_float64():
    hidden, weight, targets = problem(500, 5003, 256, torch.float32)
    targets[::7] = -100
    inputs = [x.requires_grad_() for x in (hidden, weight)]
    cotangents = [torch.randn(500, device=DEVICE) for _ in range(2)]

    def run():
        out = linear_logprob(hidden, weight, targets, backend="triton")
        return torch.autograd.grad((out.logprob, out.entropy), inputs, cotangents)

    grads, again = run(), run()
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(grads, again, strict=True))
    wide = [x.detach().double().requires_grad_() for x in inputs]
    kept = targets >= 0
    truth = [torch.where(kept, x, 0.0) for x in truths.logprob(*wide, targets.clamp(min=0))[:2]]
    wanted = torch.autograd.grad(truth, wide, [c.double() for c in cotangents])
    for grad, want in zip(grads, wanted, strict=True):
        assert error(grad, want) < 5e-6
    assert not grads[0][~kept].any()


@pytest.mark.parametrize(
    ("num_rows", "depth", "vocab"), [(8192, 512, 151936), (8192, 2048, 151936), (70000, 64, 50257), (3000, 8192, 32000)]
)
def test_memory_is_bounded(num_rows, depth, vocab):
    from rlalign_kernels.vocab.triton_gradient import MOST_BYTES

    hidden, weight, targets = problem(num_rows, vocab, depth)
    inputs = [x.requires_grad_() for x in (hidden, weight)]
    cotangent = torch.randn(num_rows, device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = linear_logprob(*inputs, targets, backend="triton")
    assert torch.cuda.max_memory_allocated() - before < 300 * MIB
    torch.autograd.grad((out.logprob, out.entropy), inputs, (cotangent, cotangent))
    most = sum(x.numel() * x.element_size() for x in inputs) + MOST_BYTES + 32 * MIB
    assert torch.cuda.max_memory_allocated() - before < (1024 * MIB if (num_rows, depth) == (8192, 2048) else most)


def test_more_rows_than_one_part_holds(monkeypatch):
    from rlalign_kernels.vocab import triton_gradient

    hidden, weight, targets = problem(1000, 3001, 128)
    inputs = [x.requires_grad_() for x in (hidden, weight)]
    cotangent = torch.randn(1000, device=DEVICE)

    def run():
        out = linear_logprob(*inputs, targets, backend="triton")
        return torch.autograd.grad(out.logprob, inputs, cotangent)

    whole = run()
    monkeypatch.setattr(triton_gradient, "_MOST_ROWS", 300)
    monkeypatch.setattr(triton_gradient, "_LOGIT_BYTES", 300 * 2 * 512)
    for grad, want in zip(run(), whole, strict=True):
        assert error(grad, want.double()) < 2e-3


@pytest.mark.parametrize("vocab", [1, 33, 128, 4097, 151936])
def test_draws(vocab):
    """The explicit Gumbel maximum over full logits; scored bits; invariant to the batch."""
    from rlalign_kernels.vocab import triton_launches as launches

    hidden, weight, _ = problem(300, vocab)
    rows = make_rows(300, temperature=0.6, truncates=False)
    rows.temperature[::3] = 0.0
    seeds, positions = torch.arange(300, device=DEVICE) * 977 - 2**62, torch.arange(300, device=DEVICE) * 3
    drawn = linear_sample(
        hidden, weight, rows=rows, seeds=seeds, positions=positions, raw_logprobs=True, backend="triton"
    )  # fmt: skip
    logits = launches.logits(hidden, launches.Head.of(weight, None, None))
    greedy = rows.temperature == 0
    assert torch.equal(drawn.token[greedy], logits.argmax(1)[greedy])
    noisy = logits / 0.6 + gumbel(seeds, positions, 0, vocab)
    chosen, best = noisy.gather(1, drawn.token[:, None])[:, 0], noisy.amax(1)
    assert ((best - chosen)[~greedy] < 2e-5).all()  # the reference's logarithms round otherwise
    assert int((noisy.argmax(1) != drawn.token)[~greedy].sum()) <= 1
    scored = linear_logprob(hidden, weight, drawn.token, rows=rows, backend="triton")
    assert torch.equal(bits(scored.logprob), bits(drawn.logprob))
    raw = linear_logprob(hidden, weight, drawn.token, backend="triton")
    assert torch.equal(bits(raw.logprob), bits(drawn.raw_logprob))
    for part in (slice(7, 8), slice(3, 20), slice(0, 64), slice(100, 165)):
        some = linear_sample(
            hidden[part], weight, rows=rows[part], seeds=seeds[part], positions=positions[part], backend="triton"
        )  # fmt: skip
        assert torch.equal(some.token, drawn.token[part])
        assert torch.equal(bits(some.logprob), bits(drawn.logprob[part]))
    for value in (torch.nan, torch.inf, 1e30):
        hidden[1::2] = value
        some = linear_sample(hidden, weight, rows=rows, seeds=seeds, positions=positions, backend="triton")
        assert torch.equal(some.token[::2], drawn.token[::2])
        assert torch.equal(bits(some.logprob[::2]), bits(drawn.logprob[::2]))


@pytest.mark.parametrize("ids", [(3, 130, 33_000), (130, 135, 33_000), (33_000, 50_256)])
def test_greedy_ties_take_the_lowest_id(ids):
    """In one block of ids, in several, and in several groups of blocks."""
    hidden, weight, _ = problem(70, 50257)
    best = weight[3] * 8
    weight[list(ids)] = best
    hidden[:] = best.sign()
    for size in (1, 20, 70):
        rows, seeds = make_rows(size, temperature=0.0), torch.arange(size, device=DEVICE)
        drawn = linear_sample(hidden[:size], weight, rows=rows, seeds=seeds, positions=seeds, backend="triton")
        assert (drawn.token == ids[0]).all()


@pytest.mark.parametrize("vocab", [60, 5003])
def test_truncated_rows_keep_the_same_ids_on_both_sides(vocab):
    hidden, weight, _ = problem(150, vocab)
    rows, seeds = mixed_rows(150), torch.arange(150, device=DEVICE) * 31
    banned = torch.zeros(150, vocab, dtype=torch.bool, device=DEVICE)
    banned[:, :7] = True
    for ban in (None, banned):
        keywords = {"seeds": seeds, "positions": seeds, "raw_logprobs": True, "backend": "triton"}
        drawn = linear_sample(hidden, weight, rows=rows, banned=ban, **keywords)
        scored = linear_logprob(
            hidden, weight, drawn.token, rows=rows, banned=ban, return_support=True, backend="triton"
        )  # fmt: skip
        assert torch.equal(bits(scored.logprob), bits(drawn.logprob))
        assert scored.support.gather(1, drawn.token[:, None]).all()
        assert not scored.support.all(1).all() and scored.logprob.isfinite().all()
        raw = linear_logprob(hidden, weight, drawn.token, banned=ban, backend="triton")
        assert torch.equal(bits(raw.logprob), bits(drawn.raw_logprob))
        for part in (slice(5, 6), slice(11, 75)):
            own = None if ban is None else ban[part]
            out = linear_logprob(
                hidden[part], weight, drawn.token[part], rows=rows[part], banned=own, return_support=True,
                backend="triton",
            )  # fmt: skip
            assert torch.equal(out.support, scored.support[part])
            assert torch.equal(bits(values(out)), bits(values(scored)[:, part]))
    if vocab < 100:
        logits = truths.linear(hidden, weight) / torch.where(rows.temperature == 0, 1.0, rows.temperature)[:, None]
        kept = linear_logprob(hidden, weight, drawn.token, rows=rows, return_support=True, backend="triton").support
        for i in range(0, 150, 11):
            if rows.temperature[i] > 0:
                settings = int(rows.top_k[i]), float(rows.top_p[i]), float(rows.min_p[i])
                assert torch.equal(kept[i].cpu(), truths.support(logits[i].cpu(), *settings))


def test_draws_follow_the_distribution():
    """Chi-square over 200,000 draws from one row, half of them from one seed at many positions."""
    count = 200_000
    hidden, weight, _ = problem(1, 50)
    rows = make_rows(count, temperature=0.8, truncates=False)
    seeds = torch.arange(count, device=DEVICE)
    seeds[count // 2 :] = 12345
    drawn = linear_sample(
        hidden.expand(count, 64), weight * 0.3, rows=rows, seeds=seeds,
        positions=torch.arange(count, device=DEVICE), backend="triton",
    )  # fmt: skip
    expected = (truths.linear(hidden, weight * 0.3)[0] / 0.8).softmax(0) * count
    counts = torch.bincount(drawn.token, minlength=50).double()
    likely = expected >= 5
    statistic = float(((counts - expected).square() / expected)[likely].sum())
    degrees = int(likely.sum()) - 1
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5


def test_a_draw_can_be_captured():
    hidden, weight, targets = problem(8, 50257)
    rows, seeds = make_rows(8, temperature=0.7, truncates=False), torch.arange(8, device=DEVICE)
    positions = torch.zeros(8, dtype=torch.int64, device=DEVICE)

    def call():
        drawn = linear_sample(
            hidden, weight, rows=rows, seeds=seeds, positions=positions, raw_logprobs=True, backend="triton"
        )  # fmt: skip
        scored = linear_logprob(hidden, weight, targets, rows=rows, backend="triton")
        return drawn.token, drawn.logprob, drawn.raw_logprob, scored.logprob, scored.entropy

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for step in (3, 4):
        positions.fill_(step)
        hidden.copy_(heavy((8, 64), torch.bfloat16, step))
        rows.temperature.fill_(0.5 + step / 10)
        graph.replay()
        for a, b in zip(captured, call(), strict=True):
            assert torch.equal(a, b)


def test_what_the_host_does_not_read_gives_nan():
    hidden, weight, targets = problem(40, 50)
    targets[0], targets[1], targets[2] = 50, -1, -100
    rows = make_rows(40, truncates=False)
    rows.temperature[3], rows.top_p[4], rows.top_k[5], rows.temperature[6] = -1.0, 1.5, 3, 5e-6
    hidden[7] = heavy((64,), torch.bfloat16, 3) * 1e12  # its sums overflow
    got = score(hidden, weight, targets, rows=rows)
    assert got[:, [0, 1, 3, 4, 5, 6, 7]].isnan().all()
    assert (got[:, 2] == 0).all() and got[:, 8:].isfinite().all()


def test_the_smallest_temperature_still_divides():
    hidden, weight, _ = problem(40, 300)
    rows = make_rows(40, temperature=1e-5, truncates=False)
    best = linear_sample(
        hidden, weight, rows=make_rows(40, temperature=0.0), seeds=torch.arange(40, device=DEVICE),
        positions=torch.arange(40, device=DEVICE), backend="triton",
    ).token  # fmt: skip
    got = score(hidden, weight, best, rows=rows)
    assert got.isfinite().all() and (got[0] <= 0).all() and (got[0] > -1e-3).float().mean() > 0.9


def test_strides_and_biases_of_all_sorts():
    hidden, weight, targets = problem(100, 1000, 96)
    whole = score(hidden, weight, targets)
    wide_hidden, wide_weight = hidden.repeat(1, 2), weight.repeat(1, 2)
    odd = torch.cat((hidden.flatten()[:1], hidden.flatten()))[1:].view(100, 96)  # off every box's alignment
    for other_hidden, other_weight in ((wide_hidden[:, :96], wide_weight[:, 96:]), (odd, weight), (hidden.t().contiguous().t(), weight.t().contiguous().t())):  # fmt: skip  # noqa: E501
        assert torch.equal(bits(score(other_hidden, other_weight, targets.int())), bits(whole))
    logits = F.linear(hidden, weight).float()
    assert error(whole[2], torch.logsumexp(logits.double(), 1)) < 1e-2
