"""The output layer's Triton kernels under Triton's interpreter: logic, masking and accuracy. Never bits: its dot is not
bit-faithful.

tests/gpu proves the bits. Where there is a GPU the interpreter is off and this file skips.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rlalign_kernels import SamplingRows, linear_logprob, linear_sample
from rlalign_kernels.reference import truths
from rlalign_kernels.reference.philox import gumbel
from support_kernels import error, interpreted, normal

pytestmark = interpreted

T, H = 21, 24
FIELDS = ("logprob", "entropy", "logsumexp")


def problem(vocab, dtype=torch.float32, seed=0):
    hidden, weight = normal(T, H, seed=seed, dtype=dtype), normal(vocab, H, seed=seed + 1, dtype=dtype) * 0.3
    return hidden, weight, torch.arange(T) * 7919 % vocab


def make_rows(n=T, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, truncates=None):
    def full(value, dtype):
        return torch.as_tensor(value).to(dtype).expand(n).clone()

    return SamplingRows(
        full(temperature, torch.float32), full(top_k, torch.int64), full(top_p, torch.float32),
        full(min_p, torch.float32), truncates,
    )  # fmt: skip


def mixed_rows(n=T):
    i = torch.arange(n)
    return make_rows(
        temperature=torch.tensor([0.0, 1.0, 0.6, 1.3])[i % 4],
        top_k=torch.tensor([0, 5, 0, 40, 0])[i % 5],
        top_p=torch.tensor([1.0, 0.9, 1.0])[i % 3],
        min_p=torch.tensor([0.0, 0.0, 0.02, 0.0, 0.0, 0.0, 0.3])[i % 7],
    )


def temperatures(rows):
    return torch.where(rows.temperature == 0, 1.0, rows.temperature)


def check(out, truth, tolerance=2e-6):
    for name, want in zip(FIELDS, truth, strict=True):
        torch.testing.assert_close(getattr(out, name).double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("vocab", [1, 2, 31, 32, 33, 127, 128, 129, 255, 256, 257, 4097])
def test_values_at_every_edge_of_a_block(vocab):
    hidden, weight, targets = problem(vocab)
    rows = make_rows(temperature=0.6)
    out = linear_logprob(hidden, weight, targets, rows=rows, backend="triton")
    check(out, truths.logprob(hidden, weight, targets, 0.6))


def test_more_blocks_than_one_group(monkeypatch):
    from rlalign_kernels.vocab import triton_launches as launches  # imports triton
    from rlalign_kernels.vocab.plan import HeadPlan

    monkeypatch.setattr(launches, "HEAD_PLAN", HeadPlan(group=2))
    hidden, weight, targets = problem(703)
    check(linear_logprob(hidden, weight, targets, backend="triton"), truths.logprob(hidden, weight, targets))
    seeds = torch.arange(T)
    rows = make_rows(truncates=False)
    drawn = linear_sample(hidden, weight, rows=rows, seeds=seeds, positions=seeds, backend="triton")
    noisy = truths.linear(hidden, weight) + gumbel(seeds, seeds, 0, 703).double()
    assert torch.equal(drawn.token, noisy.argmax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("extras", [{}, {"bias": True}, {"softcap": 4.0}, {"bias": True, "softcap": 4.0}])
def test_gradients_match_float64(dtype, extras):
    hidden, weight, targets = problem(300, dtype, seed=4)
    bias = normal(300, seed=5, dtype=dtype) if "bias" in extras else None
    rows = make_rows(temperature=torch.linspace(0.5, 2.0, T))
    targets[3::5] = -100
    inputs = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]
    out = linear_logprob(
        hidden, weight, targets, rows=rows, bias=bias, softcap=extras.get("softcap"), backend="triton"
    )  # fmt: skip
    wide = [x.detach().double().requires_grad_() for x in inputs]
    truth = truths.logprob(
        wide[0], wide[1], targets.clamp(min=0), rows.temperature, None, wide[2] if bias is not None else None,
        extras.get("softcap"),
    )  # fmt: skip
    kept = targets >= 0
    truth = [torch.where(kept, x, 0.0) for x in truth]
    check(out, [x.detach() for x in truth], 2e-6 if dtype == torch.float32 else 5e-6)
    cotangents = [normal(T, seed=s) for s in (6, 7, 8)]
    for fields in ((0,), (1,), (0, 1, 2)):
        chosen = [cotangents[i] for i in fields]
        values = [getattr(out, FIELDS[i]) for i in fields]
        grads = torch.autograd.grad(values, inputs, chosen, retain_graph=True)
        wanted = torch.autograd.grad(
            [truth[i] for i in fields], wide, [c.double() for c in chosen], retain_graph=True
        )  # fmt: skip
        for grad, want in zip(grads, wanted, strict=True):
            assert error(grad, want) < (5e-6 if dtype == torch.float32 else 2e-3)
        assert not grads[0][~kept].any()


def test_gradients_in_parts_of_rows_and_ids(monkeypatch):
    from rlalign_kernels.vocab import triton_backend, triton_gradient  # imports triton

    hidden, weight, targets = problem(500, seed=4)
    inputs = [x.requires_grad_() for x in (hidden, weight, normal(500, seed=5))]
    cotangents = [normal(T, seed=s) for s in (6, 7)]

    def run(wanted):
        out = linear_logprob(inputs[0], inputs[1], targets, bias=inputs[2], backend="triton")
        return torch.autograd.grad((out.logprob, out.entropy), [inputs[i] for i in wanted], cotangents)

    whole = run((0, 1, 2))
    monkeypatch.setattr(triton_gradient, "_LOGIT_BYTES", T * 4 * 256)
    for grad, want in zip(run((0, 1, 2)), whole, strict=True):
        assert error(grad, want) < 1e-6
    monkeypatch.setattr(triton_gradient, "_MOST_ROWS", 11)
    monkeypatch.setattr(triton_backend, "_row_parts", lambda num_rows, *_: [slice(0, 5), slice(5, num_rows)])
    for wanted in ((0, 1, 2), (0,), (2,)):
        for grad, index in zip(run(wanted), wanted, strict=True):
            assert error(grad, whole[index]) < 1e-6


def test_support_and_values_match_a_python_truth():
    hidden, weight, targets = problem(60, seed=3)
    rows = mixed_rows()
    out = linear_logprob(hidden, weight, targets, rows=rows, return_support=True, backend="triton")
    logits = truths.linear(hidden, weight) / temperatures(rows).double()[:, None]
    settings = [x.tolist() for x in (rows.top_k, rows.top_p, rows.min_p, rows.temperature == 0)]
    kept = torch.stack(
        [
            truths.support(z, 0, 1.0, 0.0) if g else truths.support(z, k, p, m)
            for z, k, p, m, g in zip(logits, *settings, strict=True)
        ]
    )
    assert torch.equal(out.support, kept)
    assert not kept.all()
    check(out, truths.logprob(hidden, weight, targets, temperatures(rows), kept))
    assert torch.isinf(out.logprob).any()
    again = linear_logprob(hidden, weight, targets, rows=rows, support=kept, backend="triton")
    assert all(torch.equal(getattr(out, name), getattr(again, name)) for name in FIELDS)


def test_ids_that_can_never_be_drawn_are_kept_by_no_truncated_row(monkeypatch):
    """Banned ones, those of bias -inf, and all ids of a row of NaN; the logits of truncated rows are computed once."""
    from rlalign_kernels.vocab import triton_support  # imports triton

    hidden, weight, targets = problem(300, seed=6)
    rows, bias = mixed_rows(), normal(300, seed=7)
    bias[::3] = -torch.inf
    hidden[6] = torch.nan
    banned = torch.zeros(T, 300, dtype=torch.bool)
    banned[:, 1::50] = True
    counted, computed = [], triton_support.logits
    monkeypatch.setattr(triton_support, "logits", lambda x, head: counted.append(len(x)) or computed(x, head))
    out, truth = (
        linear_logprob(
            hidden, weight, targets, rows=rows, bias=bias, banned=banned, return_support=True, backend=backend
        )
        for backend in ("triton", "reference")
    )
    assert rows.truncated[6] and not out.support[6].any()
    assert torch.equal(out.support, truth.support)
    assert sum(counted) == rows.truncated.sum()


def equal_logits():
    """Every logit twice, 300 ids apart; an odd top-k cuts a pair in two. The third: a pair's second, most likely id."""
    hidden, half = normal(T, H, seed=4), normal(300, H, seed=5)
    rows = make_rows(top_k=torch.tensor([1, 3, 5, 0])[torch.arange(T) % 4], min_p=0.01 * (torch.arange(T) % 4 == 3))
    return hidden, torch.cat((half, half)), (hidden @ half.T).argmax(1) + 300, rows


def test_of_equal_logits_at_the_cut_the_lowest_id_is_kept():
    hidden, weight, second, rows = equal_logits()
    out, truth = (
        linear_logprob(hidden, weight, second, rows=rows, return_support=True, backend=backend)
        for backend in ("triton", "reference")
    )
    assert torch.equal(out.support, truth.support) and (out.logprob[::4] == -torch.inf).all()
    by_mask = linear_logprob(hidden, weight, second, rows=rows, support=out.support, backend="triton")
    assert all(torch.equal(getattr(out, name), getattr(by_mask, name)) for name in FIELDS)


def test_gradients_of_truncated_rows_by_parts_of_the_ids(monkeypatch):
    hidden, weight, second, rows = equal_logits()
    inputs = [x.requires_grad_() for x in (hidden, weight)]

    def run():
        out = linear_logprob(*inputs, second - 300, rows=rows, backend="triton")
        return torch.autograd.grad((out.logprob * torch.arange(T)).sum() + out.logsumexp.sum(), inputs)

    whole = run()
    monkeypatch.setattr("rlalign_kernels.vocab.triton_gradient._LOGIT_BYTES", T * 4 * 256)
    for parts, want in zip(run(), whole, strict=True):
        torch.testing.assert_close(parts, want, rtol=1e-5, atol=1e-5)


def test_gradients_of_truncated_rows_match_float64():
    hidden, weight, targets = problem(300, seed=4)
    rows, bias = mixed_rows(), normal(300, seed=5)
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    keywords = {"rows": rows, "bias": bias, "softcap": 8.0, "backend": "triton"}
    kept = linear_logprob(hidden.detach(), weight.detach(), targets, return_support=True, **keywords).support
    targets = kept.float().argmax(1)
    out = linear_logprob(hidden, weight, targets, **keywords)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    truth = truths.logprob(wide[0], wide[1], targets, temperatures(rows), kept, wide[2], 8.0)
    cotangents = [normal(T, seed=s) for s in (6, 7)]
    grads = torch.autograd.grad((out.logprob, out.entropy), inputs, cotangents)
    wanted = torch.autograd.grad(truth[:2], wide, [c.double() for c in cotangents])
    for grad, want in zip(grads, wanted, strict=True):
        assert error(grad, want) < 5e-6


@pytest.mark.parametrize("vocab", [1, 13, 128, 700])
def test_draws_are_the_explicit_gumbel_maximum(vocab):
    hidden, weight, _ = problem(vocab, seed=8)
    rows = make_rows(temperature=torch.tensor([0.0, 1.0, 0.6])[torch.arange(T) % 3], truncates=False)
    seeds = torch.arange(T) * 977 - 2**62
    positions = torch.arange(T, dtype=torch.int32) * 31
    drawn = linear_sample(
        hidden, weight, rows=rows, seeds=seeds, positions=positions, raw_logprobs=True, backend="triton"
    )  # fmt: skip
    logits = truths.linear(hidden, weight) / temperatures(rows).double()[:, None]
    greedy = (rows.temperature == 0)[:, None]
    noisy = logits + torch.where(greedy, 0.0, gumbel(seeds, positions.long(), 0, vocab).double())
    assert torch.equal(drawn.token, noisy.argmax(1))
    scored = truths.logprob(hidden, weight, drawn.token, temperatures(rows))[0]
    torch.testing.assert_close(drawn.logprob.double(), scored, rtol=2e-6, atol=2e-6)
    raw = truths.logprob(hidden, weight, drawn.token)[0]
    torch.testing.assert_close(drawn.raw_logprob.double(), raw, rtol=2e-6, atol=2e-6)


def test_draws_of_truncated_rows_and_banned_ids():
    hidden, weight, _ = problem(300, seed=8)
    rows, seeds, positions = mixed_rows(), torch.arange(T) * 977, torch.arange(T) % 5
    banned = torch.zeros(T, 300, dtype=torch.bool)
    banned[:, :20] = True
    banned[5, 30:] = True
    for ban in (None, banned):
        drawn = linear_sample(
            hidden, weight, rows=rows, seeds=seeds, positions=positions, banned=ban, raw_logprobs=True,
            backend="triton",
        )  # fmt: skip
        want = linear_sample(
            hidden, weight, rows=rows, seeds=seeds, positions=positions, banned=ban, raw_logprobs=True,
            backend="reference",
        )  # fmt: skip
        assert torch.equal(drawn.token, want.token)
        for name in ("logprob", "raw_logprob"):
            torch.testing.assert_close(getattr(drawn, name), getattr(want, name), rtol=2e-6, atol=4e-6)
        if ban is not None:
            assert not ban.gather(1, drawn.token[:, None]).any()
            scored = linear_logprob(hidden, weight, drawn.token, rows=rows, banned=ban, backend="triton")
            torch.testing.assert_close(scored.logprob, drawn.logprob, rtol=2e-6, atol=4e-6)


def test_greedy_ties_take_the_lowest_id():
    hidden, weight, _ = problem(400, seed=11)
    weight[130:140] = weight[3]
    weight[300:310] = weight[3]
    hidden = torch.sign(weight[3]).expand(T, H).contiguous()
    weight[3] = weight[3] * 3
    weight[130:140], weight[300:310] = weight[3], weight[3]
    seeds = torch.arange(T)
    drawn = linear_sample(
        hidden, weight, rows=make_rows(temperature=0.0), seeds=seeds, positions=seeds, backend="triton"
    )  # fmt: skip
    assert (drawn.token == 3).all()


def test_neighbours_and_strides():
    hidden, weight, targets = problem(150, seed=2)
    wide_hidden, wide_weight = torch.randn(T, 2 * H), torch.randn(150, 2 * H)
    wide_hidden[:, :H], wide_weight[:, :H] = hidden, weight
    out = linear_logprob(wide_hidden[:, :H], wide_weight[:, :H], targets.int(), backend="triton")
    check(out, truths.logprob(hidden, weight, targets))
    hidden[1::2] = torch.nan
    seeds = torch.arange(T)
    poisoned = linear_logprob(hidden.t().contiguous().t(), weight, targets, backend="triton")
    for name in FIELDS:
        assert torch.equal(getattr(poisoned, name)[::2], getattr(out, name)[::2])
        assert getattr(poisoned, name)[1::2].isnan().all()
    drawn = linear_sample(
        hidden, weight, rows=make_rows(truncates=False), seeds=seeds, positions=seeds, backend="triton"
    )  # fmt: skip
    assert drawn.logprob[1::2].isnan().all() and not drawn.logprob[::2].isnan().any()
    assert ((drawn.token >= 0) & (drawn.token < 150)).all()


def test_nothing_to_do():
    hidden, weight, targets = problem(50)
    out = linear_logprob(hidden[:0].requires_grad_(), weight.requires_grad_(), targets[:0], backend="triton")
    assert out.logprob.shape == (0,)
    grad = torch.autograd.grad(out.logprob.sum(), weight)[0]
    assert not grad.any()


def test_what_the_host_does_not_read_gives_nan():
    """On a GPU values are not checked on the host; the kernels refuse them by NaN."""
    from rlalign_kernels.vocab import triton_backend  # imports triton

    hidden, weight, targets = problem(50)
    targets[0], targets[1], targets[2] = 50, -1, -100
    rows = make_rows(temperature=torch.where(torch.arange(T) == 3, -1.0, 0.6), truncates=False)
    rows.top_p[4], rows.top_k[5], rows.min_p[6] = 1.5, 3, 0.1
    out = triton_backend.linear_logprob(
        hidden, weight, None, None, targets, targets != -100, rows, None, None, False
    )  # fmt: skip
    for name in FIELDS:
        values = getattr(out, name)
        assert values[[0, 1, 3, 4, 5, 6]].isnan().all()
        assert values[2] == 0 and values[7:].isfinite().all()
    seeds = torch.arange(T)
    drawn = triton_backend.linear_sample(hidden, weight, None, None, rows, seeds, seeds, False, None)
    assert drawn.logprob.isnan().nonzero().squeeze(1).tolist() == [3, 4, 5, 6]


def test_boxes_have_their_rows_apart():
    from rlalign_kernels.vocab.triton_launches import Head, _product  # imports triton

    hidden, weight, targets = problem(50)
    one = hidden[:1].expand(3, H)[:1]  # contiguous, says torch, with rows 0 apart
    assert one.stride(0) == 0 and one.is_contiguous()
    head = Head.of(weight, None, None)
    assert _product(hidden, head).boxes and not _product(one, head).boxes
    out = linear_logprob(one, weight, targets[:1], backend="triton")
    assert torch.equal(out.logprob, linear_logprob(hidden[:1], weight, targets[:1], backend="triton").logprob)


def test_refusals_name_the_argument():
    hidden, weight, targets = problem(50)
    with pytest.raises(ValueError, match=r"targets\[7\]=50"):
        linear_logprob(hidden, weight, torch.where(torch.arange(T) == 7, 50, targets), backend="triton")
    with pytest.raises(ValueError, match=r"rows\.truncates=False, but row 1"):
        rows = replace(mixed_rows(), truncates=False)
        linear_logprob(hidden, weight, targets, rows=rows, backend="triton")
    with pytest.raises(NotImplementedError, match=r"bfloat16.*interpreter"):
        linear_logprob(hidden.bfloat16(), weight.bfloat16(), targets, backend="triton")
    with pytest.raises(ValueError, match=r"hidden\.dtype=torch\.float64"):
        linear_logprob(hidden.double(), weight.double(), targets, backend="triton")
    with pytest.raises(ValueError, match=r"float16"):
        linear_logprob(hidden.half(), weight.half(), targets, backend="reference")
