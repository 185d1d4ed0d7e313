"""Log-prob and sampling: bits, support, noise, gradients, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rlalign_kernels import SamplingRows, linear_logprob, linear_sample
from rlalign_kernels.reference import truths
from rlalign_kernels.reference.philox import gumbel, philox, philox_host
from rlalign_kernels.reference.support import kept_support
from support_kernels import error, normal, same_bits

T, H = 40, 32


def make_rows(n=T, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    def full(value, dtype):
        return torch.as_tensor(value).to(dtype).expand(n).clone()

    return SamplingRows(
        full(temperature, torch.float32),
        full(top_k, torch.int64),
        full(top_p, torch.float32),
        full(min_p, torch.float32),
    )


def mixed_rows(n=T):
    i = torch.arange(n)
    rows = make_rows(n)
    rows.temperature.copy_(torch.tensor([0.0, 1.0, 0.7, 1.3])[i % 4])
    rows.top_k.copy_(torch.tensor([0, 5, 0, 40, 0])[i % 5])
    rows.top_p.copy_(torch.tensor([1.0, 0.9, 1.0])[i % 3])
    rows.min_p.copy_(torch.tensor([0.0, 0.0, 0.02, 0.0, 0.0, 0.0, 0.3])[i % 7])
    return rows


def problem(vocab, dtype=torch.float32, seed=0):
    hidden, weight = normal(T, H, seed=seed, dtype=dtype), normal(vocab, H, seed=seed + 1, dtype=dtype) * 0.3
    return hidden, weight, torch.arange(T) * 7919 % vocab


FIELDS = ("logprob", "entropy", "logsumexp")


def equal(a, b, index=slice(None)):
    return all(same_bits(getattr(a, f)[index], getattr(b, f)) for f in FIELDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [13, 100, 1024, 2500])
def test_bits_depend_on_the_row_alone(vocab, dtype):
    hidden, weight, targets = problem(vocab, dtype)
    rows, bias = mixed_rows(), normal(vocab, seed=9, dtype=dtype)
    args = {"bias": bias, "softcap": 20.0, "backend": "reference"}
    whole = linear_logprob(hidden, weight, targets, rows=rows, return_support=True, **args)
    poisoned = hidden.clone()
    poisoned[1::2] = float("nan")
    for index in (slice(0, 1), slice(3, 4), slice(2, 19), slice(1, T), torch.randperm(T)):
        part = linear_logprob(hidden[index], weight, targets[index], rows=rows[index], **args)
        assert equal(whole, part, index)
    given = linear_logprob(hidden, weight, targets, rows=rows, support=whole.support, **args)
    assert equal(whole, given)
    plain = linear_logprob(hidden[::2], weight, targets[::2], backend="reference")
    assert equal(linear_logprob(poisoned, weight, targets, backend="reference"), plain, slice(0, T, 2))


def test_nothing_truncated_is_the_plain_path():
    hidden, weight, targets = problem(1500)
    plain = linear_logprob(hidden, weight, targets, backend="reference")
    for rows in (make_rows(), make_rows(temperature=0.0, top_k=3), make_rows(top_k=1500), make_rows(min_p=1e-30)):
        assert equal(plain, linear_logprob(hidden, weight, targets, rows=rows, backend="reference"))
    everything = torch.ones(T, 1500, dtype=torch.bool)
    assert equal(plain, linear_logprob(hidden, weight, targets, support=everything, backend="reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_accurate_as_torch(dtype):
    hidden, weight, targets = problem(3000, dtype, seed=2)
    truth = truths.logprob(hidden, weight, targets)
    ours, native = (linear_logprob(hidden, weight, targets, backend=b) for b in ("reference", "native"))
    for name, want in zip(FIELDS, truth, strict=True):
        assert error(getattr(ours, name), want) <= 1.2 * error(getattr(native, name), want)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_support_and_values_match_a_python_truth(backend):
    hidden, weight, targets = problem(60, seed=3)
    rows = mixed_rows()
    out = linear_logprob(hidden, weight, targets, rows=rows, return_support=True, backend=backend)
    greedy = rows.temperature == 0
    temperature = torch.where(greedy, 1.0, rows.temperature)
    logits = truths.linear(hidden, weight) / temperature.double()[:, None]
    settings = zip(logits, rows.top_k.tolist(), rows.top_p.tolist(), rows.min_p.tolist(), greedy.tolist(), strict=True)
    kept = torch.stack(
        [truths.support(z, 0, 1.0, 0.0) if g else truths.support(z, k, p, m) for z, k, p, m, g in settings]
    )
    assert torch.equal(out.support, kept)
    assert not kept.all()
    truth = truths.logprob(hidden, weight, targets, temperature, kept)
    torch.testing.assert_close(out.logprob.double(), truth[0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(out.entropy.double(), truth[1], rtol=2e-6, atol=2e-6)
    assert torch.isinf(out.logprob).any()


def test_ties_go_to_the_lowest_id_and_the_crossing_token_stays():
    logits = torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0, -1.0]])
    assert kept_support(logits, make_rows(1, top_k=2))[0].tolist() == [False, True, True, False, False, False]
    even = torch.zeros(1, 4)
    assert kept_support(even, make_rows(1, top_p=0.5))[0].tolist() == [True, True, False, False]
    assert kept_support(even, make_rows(1, top_p=0.51))[0].tolist() == [True, True, True, False]
    # Renormalised over the two that top-k leaves: the first alone has one half.
    assert kept_support(even, make_rows(1, top_k=2, top_p=0.5))[0].tolist() == [True, False, False, False]
    assert kept_support(logits, make_rows(1, min_p=0.5))[0].tolist() == [False, True, True, False, True, False]


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_gradients_match_float64(backend):
    hidden, weight, targets = problem(1100, seed=4)
    rows, bias = mixed_rows(), normal(1100, seed=5)
    kept = linear_logprob(
        hidden, weight, targets, rows=rows, bias=bias, softcap=8.0, return_support=True, backend="reference"
    ).support
    targets = kept.float().argmax(1)
    cotangents = [normal(T, seed=s) for s in (6, 7)]
    a = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    b = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    out = linear_logprob(a[0], a[1], targets, rows=rows, support=kept, bias=a[2], softcap=8.0, backend=backend)
    temperature = torch.where(rows.temperature == 0, 1.0, rows.temperature)
    truth = truths.logprob(b[0], b[1], targets, temperature, kept, b[2], 8.0)
    grads = torch.autograd.grad((out.logprob, out.entropy), a, cotangents)
    expected = torch.autograd.grad(truth[:2], b, [c.double() for c in cotangents])
    for grad, want in zip(grads, expected, strict=True):
        assert error(grad, want) < 5e-6
    if backend == "reference":
        again = linear_logprob(a[0], a[1], targets, rows=rows, support=kept, bias=a[2], softcap=8.0, backend=backend)
        grads_again = torch.autograd.grad((again.logprob, again.entropy), a, cotangents)
        assert all(same_bits(x, y) for x, y in zip(grads, grads_again, strict=True))


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_ignored_rows_are_zero_and_have_no_gradient(backend):
    hidden, weight, targets = problem(50, seed=6)
    targets[::3] = -100
    hidden.requires_grad_()
    out = linear_logprob(hidden, weight, targets, backend=backend)
    (grad,) = torch.autograd.grad((out.logprob, out.entropy), hidden, [normal(T, seed=s) for s in (7, 8)])
    for values in (out.logprob, out.entropy, grad):
        assert torch.equal(values[::3], torch.zeros_like(values[::3]))
        assert values[1::3].abs().min() > 0


def test_philox_known_answers():
    ones = 0xFFFFFFFF
    vectors = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for counter, key, words in vectors:
        out = philox(torch.tensor(counter)[:, None], torch.tensor(key)[:, None])
        assert out[:, 0].tolist() == list(words)
        on_host = philox_host(np.array(counter, dtype=np.uint64)[:, None], np.array(key, dtype=np.uint64)[:, None])
        assert on_host[:, 0].tolist() == list(words)


def test_noise_is_a_function_of_seed_position_and_id():
    seeds = torch.tensor([3, 2**63 - 1, -5, 3])
    positions = torch.tensor([0, 7, 7, 1])
    whole = gumbel(seeds, positions, 0, 2100)
    assert same_bits(gumbel(seeds[2:3], positions[2:3], 1024, 1000), whole[2:3, 1024:2024])
    unsigned = seeds.view(torch.uint64)
    assert same_bits(gumbel(unsigned, positions, 0, 2100), whole)
    assert len({tuple(row.tolist()) for row in whole}) == 4
    many = gumbel(torch.arange(2000), torch.zeros(2000, dtype=torch.int64), 0, 100)
    assert torch.isfinite(many).all()
    assert abs(float(many.mean()) - 0.57722) < 0.01
    assert abs(float(many.var()) - 1.64493) < 0.03


@pytest.mark.parametrize("vocab", [13, 100, 2500])
def test_sampled_bits_are_the_scored_bits(vocab):
    hidden, weight, _ = problem(vocab, seed=8)
    rows, seeds, positions = mixed_rows(), torch.arange(T) * 977, torch.arange(T) % 5
    args = {"softcap": 30.0, "backend": "reference"}
    drawn = linear_sample(hidden, weight, rows=rows, seeds=seeds, positions=positions, raw_logprobs=True, **args)
    scored = linear_logprob(hidden, weight, drawn.token, rows=rows, return_support=True, **args)
    assert same_bits(drawn.logprob, scored.logprob)
    assert scored.support.gather(1, drawn.token[:, None]).all()
    assert same_bits(drawn.raw_logprob, linear_logprob(hidden, weight, drawn.token, **args).logprob)
    greedy = rows.temperature == 0
    assert torch.equal(drawn.token[greedy], truths.linear(hidden, weight).argmax(1)[greedy])
    for index in (slice(5, 6), slice(3, 30), torch.randperm(T)):
        part = linear_sample(
            hidden[index], weight, rows=rows[index], seeds=seeds[index], positions=positions[index], **args
        )
        assert torch.equal(part.token, drawn.token[index])
        assert same_bits(part.logprob, drawn.logprob[index])


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_draws_follow_the_distribution(backend):
    weight = normal(20, H, seed=9) * 0.4
    hidden = normal(1, H, seed=10).expand(4000, H).contiguous()
    rows = make_rows(4000, temperature=0.8, top_k=12)
    drawn = linear_sample(
        hidden,
        weight,
        rows=rows,
        seeds=torch.arange(4000),
        positions=torch.zeros(4000, dtype=torch.int64),
        backend=backend,
    )
    counts = torch.bincount(drawn.token, minlength=20) / 4000
    logits = truths.linear(hidden[:1], weight)[0] / 0.8
    kept = truths.support(logits, 12, 1.0, 0.0)
    expected = torch.where(kept, logits, -torch.inf).softmax(0)
    assert (counts - expected).abs().max() < 0.03
    assert counts[~kept].sum() == 0


def test_banned_ids_are_never_drawn_and_greedy_ties_take_the_lowest_id():
    hidden, weight, _ = problem(30, seed=11)
    weight[20:] = weight[10:20]
    rows, seeds = make_rows(temperature=0.0), torch.arange(T)
    banned = torch.zeros(T, 30, dtype=torch.bool)
    banned[:, :10] = True
    args = {"seeds": seeds, "positions": seeds, "backend": "reference"}
    drawn = linear_sample(hidden, weight, rows=rows, banned=banned, **args)
    assert ((drawn.token >= 10) & (drawn.token < 20)).all()
    mixed = mixed_rows()
    drawn = linear_sample(hidden, weight, rows=mixed, banned=banned, **args)
    assert (drawn.token >= 10).all()
    scored = linear_logprob(hidden, weight, drawn.token, rows=mixed, banned=banned, backend="reference")
    assert same_bits(scored.logprob, drawn.logprob)


def test_refusals_name_index_and_value():
    hidden, weight, targets = problem(50, seed=12)
    targets[7] = 50
    with pytest.raises(ValueError, match=r"targets\[7\]=50 is outside the vocabulary"):
        linear_logprob(hidden, weight, targets, backend="reference")
    targets[7] = -1
    with pytest.raises(ValueError, match=r"targets\[7\]=-1"):
        linear_logprob(hidden, weight, targets, backend="native")
    targets[7] = 0
    with pytest.raises(ValueError, match=r"rows.temperature\[0\]=-1.0"):
        linear_logprob(hidden, weight, targets, rows=make_rows(temperature=-1.0), backend="reference")
    with pytest.raises(ValueError, match=r"rows.top_p is torch.float32 \(3,\)"):
        broken = SamplingRows(
            *(getattr(make_rows(), f) for f in ("temperature", "top_k")), torch.ones(3), torch.zeros(T)
        )
        linear_logprob(hidden, weight, targets, rows=broken, backend="reference")
    with pytest.raises(ValueError, match="softcap=0"):
        linear_logprob(hidden, weight, targets, softcap=0.0, backend="reference")
    with pytest.raises(ValueError, match="ignore_index=None is no int"):
        linear_logprob(hidden, weight, targets, ignore_index=None, backend="reference")
    with pytest.raises(ValueError, match=r"support is torch.int64"):
        linear_logprob(hidden, weight, targets, support=torch.ones(T, 50, dtype=torch.int64), backend="reference")
    seeds = torch.arange(T)
    with pytest.raises(ValueError, match=r"banned\[3\] leaves no id"):
        full = torch.zeros(T, 50, dtype=torch.bool)
        full[3] = True
        linear_sample(hidden, weight, rows=make_rows(), seeds=seeds, positions=seeds, banned=full, backend="reference")
    with pytest.raises(ValueError, match="'cuda' is unknown"):
        linear_sample(hidden, weight, rows=make_rows(), seeds=seeds, positions=seeds, backend="cuda")
