"""Attention: the same bits packed or paged, whole or chunked, alone or among others; accuracy; gradients; refusals."""

from __future__ import annotations

import pytest
import torch
from rlalign_kernels import attention_packed, attention_paged
from rlalign_kernels.reference import truths
from support_kernels import error, heavy, normal, same_bits

NAN = float("nan")
SETTINGS = [{}, {"window": 37}, {"softcap": 3.0}, {"causal": False}, {"window": 100, "softcap": 2.0}]
LENGTHS = [1, 5, 64, 65, 130, 200, 17]


def offsets(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def make(lengths, *, heads=(4, 2), dims=(32, 32), dtype=torch.float32, seed=0, data=normal):
    total = sum(lengths)
    return (
        data(total, heads[0], dims[0], seed=seed, dtype=dtype),
        data(total, heads[1], dims[0], seed=seed + 1, dtype=dtype),
        data(total, heads[1], dims[1], seed=seed + 2, dtype=dtype),
    )


def packed(q, k, v, q_lens, k_lens, backend="reference", **settings):
    cu = {"cu_seqlens_q": offsets(q_lens), "cu_seqlens_k": offsets(k_lens)}
    return attention_packed(q, k, v, **cu, scale=0.2, backend=backend, return_lse=True, **settings)


def paged(q, k, v, q_lens, k_lens, *, page_size, seed=0, backend="reference", **settings):
    """The same problem through a fragmented cache whose unused slots and pages are NaN."""
    pages = [-(-n // page_size) for n in k_lens]
    order = torch.randperm(sum(pages) + 5, generator=torch.Generator().manual_seed(seed)).tolist()
    k_cache = torch.full((sum(pages) + 5, page_size, *k.shape[1:]), NAN, dtype=k.dtype)
    v_cache = torch.full((sum(pages) + 5, page_size, *v.shape[1:]), NAN, dtype=v.dtype)
    tables = torch.full((len(k_lens), max(pages) + 1), 10**6, dtype=torch.int32)
    start = 0
    for b, length in enumerate(k_lens):
        for j in range(pages[b]):
            tables[b, j] = page = order.pop()
            rows = slice(start + j * page_size, start + min((j + 1) * page_size, length))
            k_cache[page, : rows.stop - rows.start], v_cache[page, : rows.stop - rows.start] = k[rows], v[rows]
        start += length
    lens = torch.tensor(k_lens, dtype=torch.int32)
    args = {"block_tables": tables, "cu_seqlens_q": offsets(q_lens), "kv_lens": lens, "scale": 0.2}
    return attention_paged(q, k_cache, v_cache, **args, backend=backend, return_lse=True, **settings)


def rows_of(lengths, b):
    cu = offsets(lengths)
    return slice(int(cu[b]), int(cu[b + 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_sequence_alone_and_among_others(settings, dtype):
    q, k, v = make(LENGTHS, dtype=dtype, data=heavy)
    out, lse = packed(q, k, v, LENGTHS, LENGTHS, **settings)
    for b, length in enumerate(LENGTHS):
        rows = rows_of(LENGTHS, b)
        alone, alone_lse = packed(q[rows], k[rows], v[rows], [length], [length], **settings)
        assert same_bits(alone, out[rows])
        assert same_bits(alone_lse, lse[rows])
        others = [x.clone() for x in (q, k, v)]
        for x in others:
            x[: rows.start] = NAN
            x[rows.stop :] = float("inf")
        assert same_bits(packed(*others, LENGTHS, LENGTHS, **settings)[0][rows], out[rows])


@pytest.mark.parametrize("settings", [s for s in SETTINGS if s.get("causal", True)])
@pytest.mark.parametrize(
    ("heads", "dims"), [((4, 2), (32, 32)), ((6, 1), (16, 48)), ((3, 3), (64, 16)), ((2, 1), (8, 8))]
)
def test_any_chunking_and_any_cache_give_the_packed_bits(settings, heads, dims):
    q, k, v = make(LENGTHS, heads=heads, dims=dims, seed=5)
    whole, whole_lse = packed(q, k, v, LENGTHS, LENGTHS, **settings)
    for page_size in (1, 16, 24, 64):
        out, lse = paged(q, k, v, LENGTHS, LENGTHS, page_size=page_size, **settings)
        assert same_bits(out, whole)
        assert same_bits(lse, whole_lse)
    # Mixed batch: every sequence's last rows, of another number in each.
    for last in ([1] * 7, [1, 3, 1, 64, 40, 1, 17]):
        keep = torch.cat([torch.arange(n) >= n - c for n, c in zip(LENGTHS, last, strict=True)])
        assert same_bits(paged(q[keep], k, v, last, LENGTHS, page_size=16, **settings)[0], whole[keep])
        assert same_bits(packed(q[keep], k, v, last, LENGTHS, **settings)[0], whole[keep])


def test_columns_that_no_row_tile_is_free_with_are_filled_up(monkeypatch):
    from rlalign_kernels.reference import attention as reference

    q, k, v = make(LENGTHS, heads=(4, 2), dims=(32, 24), seed=5)
    plain, plain_lse = packed(q, k, v, LENGTHS, LENGTHS)
    known = reference.batch_bases
    monkeypatch.setattr(reference, "batch_bases", lambda depth, width, t: () if width == 25 else known(depth, width, t))
    assert reference.products(32, 24).columns == 32
    whole, whole_lse = packed(q, k, v, LENGTHS, LENGTHS)
    torch.testing.assert_close(whole, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole_lse, plain_lse, rtol=1e-5, atol=1e-6)
    for page_size in (1, 24):
        out, lse = paged(q, k, v, LENGTHS, LENGTHS, page_size=page_size)
        assert same_bits(out, whole) and same_bits(lse, whole_lse)


def test_autocast_rounds_nothing_of_the_reference():
    q, k, cu = normal(33, 4, 32, seed=1), normal(33, 2, 32, seed=2), torch.tensor([0, 33])
    known = {"cu_seqlens_q": cu, "scale": 0.2, "backend": "reference"}
    pages = {"block_tables": torch.tensor([[0]]), "kv_lens": torch.tensor([33])}
    for run in (
        lambda: attention_packed(q, k, k, cu_seqlens_k=cu, **known),
        lambda: attention_paged(q, k[None], k[None], **pages, **known),
    ):
        plain = run()
        with torch.autocast("cpu", torch.bfloat16):
            assert same_bits(run(), plain)


def test_token_by_token_decode_gives_the_prefill_bits():
    q, k, v = make([150], seed=9)
    whole, _ = packed(q, k, v, [150], [150])
    for n in range(1, 151):
        step, _ = paged(q[n - 1 : n], k[:n], v[:n], [1], [n], page_size=16, seed=n)
        assert same_bits(step, whole[n - 1 : n]), n


@pytest.mark.parametrize("batch", [33, 300])
def test_decode_batches_of_any_size(batch):
    lengths = (torch.arange(batch) * 7 % 90 + 1).tolist()
    q, k, v = make(lengths, seed=11)
    last = (offsets(lengths)[1:] - 1).long()
    out, _ = paged(q[last], k, v, [1] * batch, lengths, page_size=16)
    for b in (0, 1, 13, batch - 1):
        rows = rows_of(lengths, b)
        alone, _ = packed(q[rows], k[rows], v[rows], [lengths[b]], [lengths[b]])
        assert same_bits(out[b], alone[-1])


def test_padding_by_key_mask_gives_the_packed_bits():
    """Left padding moves absolute positions, hence is packed away before; right padding is masked or left out."""
    q, k, v = make([40], seed=12)
    alone, _ = packed(q, k, v, [40], [40])
    pads = torch.full((24, 4, 32), NAN)
    q2, k2, v2 = torch.cat((q, pads)), torch.cat((k, pads[:, :2])), torch.cat((v, pads[:, :2]))
    mask = torch.arange(64) < 40
    assert same_bits(packed(q2, k2, v2, [64], [64], key_mask=mask)[0][:40], alone)


@pytest.mark.parametrize("broken", [NAN, float("inf")])
@pytest.mark.parametrize("settings", [{}, {"window": 37}])
def test_a_later_token_of_the_sequence_cannot_reach_back(settings, broken):
    """A row's past is all it may see: a value that is not finite further on must not leak in as 0 * NaN."""
    q, k, v = make([150], seed=14)
    whole, _ = packed(q, k, v, [150], [150], **settings)
    for at in (0, 70, 149):
        damaged = [x.clone() for x in (q, k, v)]
        for x in damaged:
            x[at] = broken
        out, _ = packed(*damaged, [150], [150], **settings)
        assert same_bits(out[:at], whole[:at])
        assert not torch.isfinite(out[at]).any()
        if "window" in settings:
            assert same_bits(out[at + 37 :], whole[at + 37 :])


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_a_row_that_sees_nothing_is_zero(backend):
    q, k, v = make([30], seed=13)
    q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    mask = torch.zeros(30, dtype=torch.bool)
    out, lse = packed(q, k, v, [30], [30], key_mask=mask, backend=backend)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))
    grads = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)
    out, lse = packed(q.detach(), k[:10].detach(), v[:10].detach(), [30], [10], backend=backend)
    assert torch.equal(out[:20], torch.zeros_like(out[:20]))
    assert out[20:].abs().min() > 0
    assert torch.isinf(lse[:20]).all() and torch.isfinite(lse[20:]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", SETTINGS)
def test_as_accurate_as_torch(settings, dtype):
    lengths = [150, 70, 260]
    q, k, v = make(lengths, dtype=dtype, seed=14)
    truth, truth_lse = truths.attention(q, k, v, offsets(lengths), offsets(lengths), 0.2, **settings)
    out, lse = packed(q, k, v, lengths, lengths, **settings)
    cu = offsets(lengths)
    plain = attention_packed(
        q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, scale=0.2, backend="native", return_lse=False, **settings
    )
    assert error(out, truth) <= 1.2 * error(plain, truth)
    assert error(lse, truth_lse) < 1e-6
    assert torch.equal(paged(q, k, v, lengths, lengths, page_size=16, **settings)[0], out)
    assert error(paged(q, k, v, lengths, lengths, page_size=16, backend="native", **settings)[0], truth) < 1e-2


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("settings", [*SETTINGS, {"key_mask": torch.arange(219) % 3 > 0}])
def test_gradients_match_float64(settings, backend):
    q_lens, k_lens = [1, 60, 0, 33, 90], [20, 60, 7, 70, 62]
    inputs = [normal(184, 4, 16, seed=15), normal(219, 2, 16, seed=16), normal(219, 2, 24, seed=17)]
    cotangent = normal(184, 4, 24, seed=18)
    a = [x.clone().requires_grad_() for x in inputs]
    b = [x.double().requires_grad_() for x in inputs]
    out, _ = packed(*a, q_lens, k_lens, backend=backend, **settings)
    truth, _ = truths.attention(*b, offsets(q_lens), offsets(k_lens), 0.2, **settings)
    grads = torch.autograd.grad(out, a, cotangent)
    expected = torch.autograd.grad(truth, b, cotangent.double())
    for grad, want in zip(grads, expected, strict=True):
        assert error(grad, want) < 3e-6
    if backend == "reference":
        out, _ = packed(*a, q_lens, k_lens, **settings)
        again = torch.autograd.grad(out, a, cotangent)
        assert all(same_bits(x, y) for x, y in zip(grads, again, strict=True))


def test_backward_in_several_cuts(monkeypatch):
    from rlalign_kernels.reference import attention_backward

    inputs = [x.requires_grad_() for x in make([90, 50], seed=19)]
    cotangent = normal(140, 4, 32, seed=20)
    whole = torch.autograd.grad(packed(*inputs, [90, 50], [90, 50], window=30)[0], inputs, cotangent)
    monkeypatch.setattr(attention_backward, "MAX_SCORES", 3000)
    cut = torch.autograd.grad(packed(*inputs, [90, 50], [90, 50], window=30)[0], inputs, cotangent)
    for x, y in zip(whole, cut, strict=True):
        assert error(x, y.double()) < 1e-6


def test_refusals_name_the_argument():
    q, k, v = make([10], seed=21)
    cu = offsets([10])
    run = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "scale": 1.0, "backend": "reference"}
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2"):
        attention_packed(q[:, :3], k, v, **run)
    with pytest.raises(NotImplementedError, match="head_dim=300"):
        attention_packed(torch.zeros(10, 2, 300), torch.zeros(10, 2, 300), v, **run)
    with pytest.raises(ValueError, match="window=0"):
        attention_packed(q, k, v, window=0, **run)
    with pytest.raises(ValueError, match="softcap=-1"):
        attention_packed(q, k, v, softcap=-1.0, **run)
    with pytest.raises(ValueError, match="cu_seqlens_q must rise from 0 to 10"):
        attention_packed(q, k, v, **{**run, "cu_seqlens_q": offsets([9])})
    with pytest.raises(ValueError, match="differ in length"):
        attention_packed(q, k, v, **{**run, "cu_seqlens_q": offsets([5, 5])})
    with pytest.raises(ValueError, match=r"k.dtype=torch.bfloat16"):
        attention_packed(q, k.bfloat16(), v, **run)
    with pytest.raises(NotImplementedError, match="sinks are not there with backend='reference'"):
        attention_packed(q, k, v, sinks=torch.zeros(4), **run)
    cache = torch.zeros(4, 16, 2, 32)
    pages = {"cu_seqlens_q": cu, "scale": 1.0, "backend": "reference"}
    one = torch.tensor([10], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"block_tables\[0,0\]=7 is outside"):
        attention_paged(q, cache, cache, block_tables=torch.tensor([[7]]), kv_lens=one, **pages)
    with pytest.raises(ValueError, match=r"kv_lens\[0\]=10 does not fit"):
        attention_paged(q, cache[:, :4], cache[:, :4], block_tables=torch.tensor([[1]]), kv_lens=one, **pages)


@pytest.mark.parametrize("learns", ["q", "k_cache", "v_cache", "sinks"])
@pytest.mark.parametrize("backend", ["reference", "native", "triton"])
def test_pages_have_no_gradient(backend, learns):
    tensors = {"q": torch.zeros(1, 4, 32), "k_cache": torch.zeros(4, 16, 2, 32), "v_cache": torch.zeros(4, 16, 2, 32)}
    tensors |= {"sinks": torch.zeros(4)} if learns == "sinks" else {}
    tensors[learns].requires_grad_()
    one = {"block_tables": torch.tensor([[1]]), "cu_seqlens_q": torch.tensor([0, 1]), "kv_lens": torch.tensor([5])}
    with pytest.raises(NotImplementedError, match="no gradient"):
        attention_paged(**tensors, **one, scale=1.0, backend=backend)
