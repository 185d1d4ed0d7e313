"""The Triton kernels under Triton's interpreter: logic, masking and accuracy. Never bits: its dot is not bit-faithful.

tests/gpu proves the bits. Where there is a GPU the interpreter is off and this file skips.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rlalign_kernels import attention_packed, attention_paged
from rlalign_kernels.launch import Remembered
from rlalign_kernels.reference import truths
from support_kernels import error, interpreted, normal

pytestmark = interpreted

CASES = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": 17},
    "wide window": {"window": 30, "softcap": 3.0},
    "soft cap": {"softcap": 3.0},
    "sinks": {"sinks": True},
}


def offsets(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def make(q_lens, k_lens, heads=(2, 1), dims=(16, 16), dtype=torch.float32):
    q = normal(sum(q_lens), heads[0], dims[0], seed=1, dtype=dtype)
    k = normal(sum(k_lens), heads[1], dims[0], seed=2, dtype=dtype)
    v = normal(sum(k_lens), heads[1], dims[1], seed=3, dtype=dtype)
    return q, k, v


def truth(q, k, v, q_lens, k_lens, *, sinks=None, **settings):
    out, lse = truths.attention(q, k, v, offsets(q_lens), offsets(k_lens), 0.3, **settings)
    if sinks is None:
        return out, lse
    wide = sinks.double()[None]
    return out * torch.sigmoid(lse - wide)[..., None], torch.logaddexp(lse, wide.expand_as(lse))


def settings_of(name, heads=2):
    settings = dict(CASES[name])
    if settings.pop("sinks", False):
        settings["sinks"] = normal(heads, seed=4, dtype=torch.float32)
    return settings


@pytest.mark.parametrize("name", CASES)
def test_packed_forward_and_gradient(name):
    """q_len <, = and > kv_len, no query, no key; every gradient against float64."""
    q_lens, k_lens = [5, 24, 9, 0, 3], [5, 44, 4, 3, 0]
    settings = settings_of(name)
    inputs = [x.requires_grad_() for x in make(q_lens, k_lens)]
    if "sinks" in settings:
        inputs.append(settings["sinks"].requires_grad_())
    cu = {"cu_seqlens_q": offsets(q_lens), "cu_seqlens_k": offsets(k_lens)}
    out, lse = attention_packed(*inputs[:3], **cu, scale=0.3, backend="triton", return_lse=True, **settings)
    exact, exact_lse = truth(*inputs[:3], q_lens, k_lens, **settings)
    assert error(out, exact) < 1e-6
    assert torch.equal(lse.isinf(), exact_lse.isinf())
    assert torch.allclose(lse.double(), exact_lse, atol=1e-5)
    blind = exact_lse.isinf()
    assert blind.any() or "sinks" in settings
    assert not out[blind].any()
    cotangent = normal(*out.shape, seed=5, dtype=torch.float32)
    grads = torch.autograd.grad(out, inputs, cotangent)
    exact_grads = torch.autograd.grad(exact, inputs, cotangent.double())
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        assert error(grad, exact_grad) < 2e-6


@pytest.mark.parametrize(("heads", "dims"), [((6, 2), (24, 40)), ((3, 1), (64, 16)), ((2, 2), (1, 8))])
def test_heads_and_dims_that_need_padding(heads, dims):
    q, k, v = make([30], [30], heads, dims, torch.float16)
    cu = offsets([30])
    out = attention_packed(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, scale=0.3, backend="triton")
    assert error(out, truth(q, k, v, [30], [30])[0]) < 5e-4


def test_only_the_gradients_that_are_needed():
    q, k, v = make([9], [9])
    cu = {"cu_seqlens_q": offsets([9]), "cu_seqlens_k": offsets([9])}
    grads = []
    for wanted in ((0, 1, 2), (0,), (2,)):
        inputs = [x.clone().requires_grad_(i in wanted) for i, x in enumerate((q, k, v))]
        attention_packed(*inputs, **cu, scale=0.3, backend="triton").square().sum().backward()
        assert [x.grad is not None for x in inputs] == [i in wanted for i in range(3)]
        grads.append([x.grad for x in inputs])
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][2], grads[2][2])


@pytest.mark.parametrize("expanded", [(0,), (1,), (0, 1)])
def test_the_gradient_of_a_sum_over_rows_or_heads(expanded, monkeypatch):
    """It comes expanded: strides of 0, which no kernel gets to see."""
    from rlalign_kernels.attention import triton_gradient  # imports triton

    seen, rows_of = [], triton_gradient.rows

    def recording(x):
        rows = rows_of(x)
        seen.append((0 in x.stride(), rows.stride()))
        return rows

    monkeypatch.setattr(triton_gradient, "rows", recording)
    inputs = [x.requires_grad_() for x in make([9, 20], [9, 20])]
    cu = offsets([9, 20])
    weights = normal(16, seed=5, dtype=torch.float32)
    out = attention_packed(*inputs, cu_seqlens_q=cu, cu_seqlens_k=cu, scale=0.3, backend="triton")
    exact, _ = truth(*inputs, [9, 20], [9, 20])
    grads = torch.autograd.grad((out.sum(expanded) * weights).sum(), inputs)
    exact_grads = torch.autograd.grad((exact.sum(expanded) * weights.double()).sum(), inputs)
    assert any(was for was, _ in seen) and not any(0 in strides for _, strides in seen)
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        assert error(grad, exact_grad) < 2e-6


@pytest.mark.parametrize("window", [45, 2**31 - 1, 2**63])
def test_a_window_that_holds_every_key_is_none(window):
    inputs = [x.requires_grad_() for x in make([20, 30], [20, 44])]
    cu = {"cu_seqlens_q": offsets([20, 30]), "cu_seqlens_k": offsets([20, 44]), "scale": 0.3, "backend": "triton"}
    whole, narrow = attention_packed(*inputs, **cu), attention_packed(*inputs, **cu, window=window)
    assert torch.equal(narrow, whole)
    cotangent = normal(*whole.shape, seed=6)
    grads = [torch.autograd.grad(out, inputs, cotangent) for out in (whole, narrow)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_settings_and_bounds_may_be_numpys_or_tensors_and_sinks_anywhere():
    q, k, v = make([20], [20])
    cu = {"cu_seqlens_q": offsets([20]), "cu_seqlens_k": offsets([20]), "backend": "triton"}
    sinks = normal(4, seed=4)
    expected = attention_packed(q, k, v, **cu, scale=0.25, window=7, sinks=sinks[::2].contiguous())
    found = attention_packed(
        q, k, v, **cu, scale=np.float32(0.25), window=np.int64(7), sinks=sinks[::2],
        max_seqlen_q=torch.tensor(20), max_seqlen_k=np.int32(20),
    )  # fmt: skip
    assert torch.equal(found, expected)
    one = attention_packed(q, k, v, **cu, scale=0.25, sinks=sinks[:1].expand(2))
    assert torch.equal(one, attention_packed(q, k, v, **cu, scale=0.25, sinks=sinks[:1].repeat(2)))


def test_inputs_of_any_strides_give_a_contiguous_output():
    """Of one fused projection, and with heads before tokens."""
    q, k, v = normal(20, 4, 16, seed=1, dtype=torch.float32).split((2, 1, 1), dim=1)
    cu = {"cu_seqlens_q": offsets([20]), "cu_seqlens_k": offsets([20]), "scale": 0.3, "backend": "triton"}
    expected = attention_packed(q.contiguous(), k.contiguous(), v.contiguous(), **cu)
    for strided in (q, q.transpose(0, 1).contiguous().transpose(0, 1)):
        assert not strided.is_contiguous()
        out = attention_packed(strided, k, v, **cu)
        assert out.is_contiguous() and torch.equal(out, expected)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_second_derivative_is_refused(backend):
    inputs = [x.requires_grad_() for x in make([5], [5])]
    out = attention_packed(*inputs, cu_seqlens_q=offsets([5]), cu_seqlens_k=offsets([5]), scale=0.3, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (grad.sum() + inputs[0].sum()).backward()


def test_boxes_have_their_rows_apart():
    hopper_backend = pytest.importorskip("rlalign_kernels.attention.hopper_backend")
    rows = normal(4, 2, 16, seed=1)
    assert hopper_backend.in_boxes(rows, rows.repeat(1, 2, 1)[:, :2])
    assert not hopper_backend.in_boxes(rows, rows[:1].expand(4, 2, 16))
    assert not hopper_backend.in_boxes(torch.as_strided(rows, (4, 2, 16), (16, 16, 1)))


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].get("causal", True)])
@pytest.mark.parametrize("bounds", [False, True])
def test_pages(name, bounds):
    """Chunks, single tokens and whole prompts in one batch; unused slots are NaN, unused entries nonsense."""
    q_lens, k_lens, page = [1, 3, 20, 1, 1], [50, 3, 33, 1, 0], 16
    settings = settings_of(name)
    q, k, v = make(q_lens, k_lens)
    k_cache, v_cache = (torch.full((12, page, 1, 16), torch.nan) for _ in range(2))
    tables = torch.full((5, 5), 10**6, dtype=torch.int32)
    pages, start = iter(torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()), 0
    for b, length in enumerate(k_lens):
        for j in range(-(-length // page)):
            tables[b, j] = place = next(pages)
            rows = slice(start + j * page, start + min((j + 1) * page, length))
            k_cache[place, : rows.stop - rows.start], v_cache[place, : rows.stop - rows.start] = k[rows], v[rows]
        start += length
    known = {"max_seqlen_q": 20, "max_seqlen_k": 50} if bounds else {}
    out, lse = attention_paged(
        q, k_cache, v_cache, block_tables=tables, cu_seqlens_q=offsets(q_lens),
        kv_lens=torch.tensor(k_lens, dtype=torch.int32), scale=0.3, backend="triton", return_lse=True,
        **known, **settings,
    )  # fmt: skip
    exact, exact_lse = truth(q, k, v, q_lens, k_lens, **settings)
    assert error(out, exact) < 1e-6
    assert torch.allclose(lse.double(), exact_lse, atol=1e-5)


@pytest.mark.parametrize("apart", [False, True], ids=["one program", "a program each"])
@pytest.mark.parametrize(
    ("q_len", "settings"), [(1, {}), (7, {"window": 200}), (1, {"causal": False, "softcap": 5.0})], ids=str
)
def test_splits_that_meet(q_len, settings, apart, monkeypatch):
    """More keys than one split holds: in one program, and in a program each with the last one merging."""
    from rlalign_kernels.attention import triton_backend

    monkeypatch.setattr(triton_backend, "num_processors", lambda device: 132 if apart else 1)
    monkeypatch.setattr(triton_backend, "_CALLS", Remembered())
    q, k, v = make([q_len, 1], [1100, 0], heads=(2, 1))
    exact, exact_lse = truth(q, k, v, [q_len, 1], [1100, 0], **settings)
    cache = [torch.cat((x, torch.full((1152 - 1100, 1, 16), torch.nan))).view(-1, 64, 1, 16) for x in (k, v)]
    tables = torch.arange(18, dtype=torch.int32)[None].expand(2, 18).contiguous()
    for integers in (torch.int32, torch.int64):  # the counters are as they were
        out, lse = attention_paged(
            q, *cache, block_tables=tables, cu_seqlens_q=offsets([q_len, 1]).to(integers),
            kv_lens=torch.tensor([1100, 0], dtype=integers), scale=0.3, backend="triton", return_lse=True, **settings,
        )  # fmt: skip
        assert error(out, exact) < 1e-6
        assert torch.allclose(lse.double(), exact_lse, atol=1e-5)
    assert all((call.decode is not None) == apart for call in triton_backend._CALLS._found.values())


@pytest.mark.parametrize("bound", [None, 40])
def test_tiles_that_nobody_chose_take_every_row(bound):
    """The chosen tiles tell no lengths above 17 apart; these hold more rows than 17 queries have."""
    from rlalign_kernels.attention.schedules import Tile
    from rlalign_kernels.attention.triton_backend import forward
    from rlalign_kernels.attention.triton_problem import Keys, Masking

    lengths = [40, 3, 21]
    q, k, v = make(lengths, lengths)
    tile = Tile(64, 32, 4, 2)
    cu = offsets(lengths)
    out, _ = forward(q, Keys(k, v, cu), cu, Masking(0.3, right=0), max_seqlen_q=bound, tiles=(tile, tile))
    assert error(out, truth(q, k, v, lengths, lengths)[0]) < 1e-6


def test_a_bound_that_was_too_small_spoils_no_later_call(monkeypatch):
    """The counters of a decode's splits outlive it on a GPU: a call that lied of its lengths must leave them at 0."""
    from rlalign_kernels.attention import triton_backend, triton_problem

    kept = triton_problem.workspace(torch.device("cpu"), 4096, 64)
    monkeypatch.setattr(triton_backend, "num_processors", lambda device: 132)
    monkeypatch.setattr(triton_backend, "workspace", lambda *sizes: kept)
    monkeypatch.setattr(triton_backend, "_CALLS", Remembered())
    q, k, v = make([1], [2112], heads=(2, 1))
    tables = torch.arange(33, dtype=torch.int32)[None]
    exact = truth(q, k, v, [1], [2112])[0]
    for bound in (1100, 2112):
        out = attention_paged(
            q, k.view(33, 64, 1, 16), v.view(33, 64, 1, 16), block_tables=tables, cu_seqlens_q=offsets([1]),
            kv_lens=torch.tensor([2112], dtype=torch.int32), max_seqlen_k=bound, scale=0.3, backend="triton",
        )  # fmt: skip
        assert not kept[1].any()
    assert error(out, exact) < 1e-6


def test_a_sink_at_minus_infinity_is_none():
    """Also for a row without keys, whose log-sum-exp is then -inf: no gradient of it is NaN."""
    q_lens, k_lens = [3, 2], [1, 2]
    inputs = [x.requires_grad_() for x in make(q_lens, k_lens)]
    sinks = torch.tensor([-torch.inf, 0.5], requires_grad=True)
    cu = {"cu_seqlens_q": offsets(q_lens), "cu_seqlens_k": offsets(k_lens)}
    out = attention_packed(*inputs, **cu, scale=0.3, sinks=sinks, backend="triton")
    none = attention_packed(*inputs, **cu, scale=0.3, backend="triton")
    assert error(out[:, 0], none[:, 0].double()) < 1e-6 and not torch.allclose(out[:, 1], none[:, 1])
    grads = torch.autograd.grad(out.square().sum(), [*inputs, sinks])
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[3][0] == 0 != grads[3][1]


def test_neighbours_may_hold_anything():
    lengths = [20, 30, 10]
    q, k, v = make(lengths, lengths)
    cu = {"cu_seqlens_q": offsets(lengths), "cu_seqlens_k": offsets(lengths)}
    rows = slice(20, 50)
    results = []
    for poison in (0.0, torch.nan, torch.inf):
        inputs = [x.clone() for x in (q, k, v)]
        for x in inputs:
            x[: rows.start], x[rows.stop :] = poison, poison
            x.requires_grad_()
        out = attention_packed(*inputs, **cu, scale=0.3, backend="triton")
        out[rows].square().sum().backward()
        results.append([out[rows].detach(), *(x.grad[rows] for x in inputs)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_refusals_name_the_argument():
    q, k, v = make([10], [10])
    run = {"cu_seqlens_q": offsets([10]), "cu_seqlens_k": offsets([10]), "scale": 0.3, "backend": "triton"}
    with pytest.raises(NotImplementedError, match="key_mask"):
        attention_packed(q, k, v, key_mask=torch.ones(10, dtype=torch.bool), **run)
    with pytest.raises(NotImplementedError, match=r"scale=-1\.0"):
        attention_packed(q, k, v, **{**run, "scale": -1.0})
    for changed, message in (
        ({"sinks": torch.zeros(3)}, r"sinks are torch.float32 \(3,\)"),
        ({"sinks": torch.zeros(2, dtype=torch.int32)}, "sinks are torch.int32"),
        ({"softcap": float("inf")}, "softcap=inf"),
        ({"window": 3.0}, "window=3.0"),
        ({"max_seqlen_q": 10.0}, "max_seqlen_q=10.0"),
        ({"cu_seqlens_q": offsets([]), "cu_seqlens_k": offsets([])}, "names no sequence"),
        ({"cu_seqlens_q": torch.zeros(4, dtype=torch.int32)[::2]}, "cu_seqlens_q has strides"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_packed(q, k, v, **run | changed)
    with pytest.raises(NotImplementedError, match=r"bfloat16.*interpreter"):
        attention_packed(q.bfloat16(), k.bfloat16(), v.bfloat16(), **run)
    with pytest.raises(ValueError, match=r"q\.dtype=torch\.float64"):
        attention_packed(q.double(), k.double(), v.double(), **run)
    cache = torch.zeros(4, 24, 1, 16)
    with pytest.raises(NotImplementedError, match="a page of 24 tokens"):
        attention_paged(
            q, cache, cache, block_tables=torch.zeros(1, 1, dtype=torch.int32), cu_seqlens_q=offsets([10]),
            kv_lens=torch.tensor([10]), scale=0.3, backend="triton",
        )  # fmt: skip
