"""Attention on the GPU: the contract's axes bit for bit, accuracy against float64, gradients run to run.

Three equalities that chain: packed training rows = prefill of any chunking (pages or not) = decode token by token.
"""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from rlalign_kernels import attention_packed, attention_paged
from rlalign_kernels.reference import truths
from support_attention import DEVICE, Problem, offsets, same_bits

LENGTHS = [1, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 2048, 4095, 4096, 4097]
SHORT = [1, 17, 64, 129, 300, 511]
PROBLEMS = {
    "bf16": {},
    "bf16 group of 5, sinks, window": {"heads": (5, 1), "dims": (80, 80), "sinks": True, "settings": {"window": 128}},
    "bf16 full": {"settings": {"causal": False}},
    "bf16 192/128, soft cap": {"heads": (4, 4), "dims": (192, 128), "settings": {"softcap": 20.0}},
    "fp16 64, window": {"heads": (6, 2), "dims": (64, 64), "dtype": torch.float16, "settings": {"window": 300}},
    "fp16": {"dtype": torch.float16},
    "fp32": {"dims": (64, 64), "dtype": torch.float32},
    "bf16 256": {"heads": (2, 1), "dims": (256, 256)},
}  # fmt: skip
NAMES = pytest.mark.parametrize("name", PROBLEMS)
# without causality a chunk is another problem
CAUSAL = pytest.mark.parametrize("name", [n for n, p in PROBLEMS.items() if p.get("settings", {}).get("causal", True)])


def make(name: str, lengths: list[int] = LENGTHS) -> Problem:
    return Problem(list(lengths), **PROBLEMS[name])


def packed(p: Problem, q=None, k=None, v=None, cu_q=None, cu_k=None, **changed):
    """(out, lse) with outputs that nobody wrote before: the allocator is given NaN to hand out."""
    q, k, v = p.q if q is None else q, p.k if k is None else k, p.v if v is None else v
    poison = [torch.full((q.shape[0], q.shape[1], v.shape[2]), torch.nan, dtype=q.dtype, device=DEVICE)]
    poison.append(torch.full(q.shape[:2], torch.nan, device=DEVICE))
    del poison
    cu = {"cu_seqlens_q": p.cu if cu_q is None else cu_q, "cu_seqlens_k": p.cu if cu_k is None else cu_k}
    return attention_packed(q, k, v, **cu, **{**p.keywords, **changed})


@NAMES
def test_alone_among_others_and_beside_anything(name):
    p = make(name)
    whole = packed(p)
    for b in (0, 3, 7, 12, 15):
        rows, alone = p.rows(b), offsets([p.lengths[b]])
        mine = [x[rows] for x in whole]
        assert same_bits(packed(p, p.q[rows], p.k[rows], p.v[rows], alone, alone), mine)
        for poison in (torch.nan, torch.inf):
            inputs = [x.clone() for x in (p.q, p.k, p.v)]
            for x in inputs:
                x[: rows.start], x[rows.stop :] = poison, poison
            assert same_bits([x[rows] for x in packed(p, *inputs)], mine)
    order = random.Random(0).sample(range(len(p.lengths)), len(p.lengths))
    index = torch.cat([torch.arange(p.rows(b).start, p.rows(b).stop, device=DEVICE) for b in order])
    cu = offsets([p.lengths[b] for b in order])
    assert same_bits(packed(p, p.q[index], p.k[index], p.v[index], cu, cu), [x[index] for x in whole])
    known = {"max_seqlen_q": max(p.lengths), "max_seqlen_k": max(p.lengths)}
    assert same_bits(packed(p, **known), whole)


@CAUSAL
@pytest.mark.parametrize("page", [16, 64, 256])
def test_chunks_pages_and_decode_give_the_packed_bits(name, page):
    p = make(name)
    whole, cache, rng = packed(p), p.cache(page, seed=page), random.Random(page)
    many = len(p.lengths)
    for counts in (p.lengths, [1] * many, [rng.randint(1, 8) for _ in range(many)], [rng.choice((1, 7, 64, 513)) for _ in range(many)]):  # fmt: skip  # noqa: E501
        taken, index = p.last(counts)
        mine = [x[index] for x in whole]
        for known in ({}, {"max_seqlen_q": max(taken), "max_seqlen_k": max(p.lengths)}):
            out = attention_paged(p.q[index], **cache, cu_seqlens_q=offsets(taken), **known, **p.keywords)
            assert same_bits(out, mine)
        assert same_bits(packed(p, q=p.q[index], cu_q=offsets(taken)), mine)
    for b in (0, 7, 13, 17):  # one sequence: a program per split
        end = p.rows(b).stop - 1
        one = {"block_tables": cache["block_tables"][b : b + 1], "kv_lens": cache["kv_lens"][b : b + 1]}
        for known in ({}, {"max_seqlen_q": 1, "max_seqlen_k": p.lengths[b]}):
            out = attention_paged(p.q[end : end + 1], **{**cache, **one}, cu_seqlens_q=offsets([1]), **known, **p.keywords)  # fmt: skip  # noqa: E501
            assert same_bits(out, [x[end : end + 1] for x in whole])


def test_token_by_token_over_a_split_and_a_very_long_sequence():
    p = Problem([32768], heads=(2, 1))
    whole, cache = packed(p), p.cache(128)
    for n in [*range(1, 40), *range(1000, 1050), 2048, 2049, 32767, 32768]:
        one = {**cache, "kv_lens": torch.tensor([n], dtype=torch.int32, device=DEVICE)}
        out = attention_paged(p.q[n - 1 : n], **one, cu_seqlens_q=offsets([1]), max_seqlen_q=1, **p.keywords)
        assert same_bits(out, [x[n - 1 : n] for x in whole]), n


def test_256_sequences_in_any_order():
    rng = random.Random(1)
    p = Problem([rng.randint(1, 900) for _ in range(256)])
    whole, cache = packed(p), p.cache(64)
    taken, index = p.last([1] * 256)
    out = attention_paged(p.q[index], **cache, cu_seqlens_q=offsets(taken), max_seqlen_q=1, **p.keywords)
    assert same_bits(out, [x[index] for x in whole])


def test_graph_replay_with_padded_rows_gives_the_eager_bits():
    """A bucket of 8 rows captured once; batches of 3 and 8, lengths growing; padded rows have no key and give 0."""
    p = Problem([700, 1500, 33, 5, 1024, 90, 2100, 64], heads=(4, 2))
    whole, cache = packed(p), p.cache(64)
    q = torch.zeros(8, 4, 128, dtype=p.dtype, device=DEVICE)
    kv_lens = torch.ones(8, dtype=torch.int32, device=DEVICE)
    tables = torch.zeros_like(cache["block_tables"])
    fixed = {**cache, "kv_lens": kv_lens, "block_tables": tables}
    cu = offsets([1] * 8)

    def call():
        return attention_paged(q, **fixed, cu_seqlens_q=cu, max_seqlen_q=1, max_seqlen_k=2304, **p.keywords)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for members in ([0, 1, 6], list(range(8)), [4]):
        kv_lens.zero_()
        for slot, b in enumerate(members):
            kv_lens[slot], tables[slot] = p.lengths[b], cache["block_tables"][b]
            q[slot] = p.q[p.rows(b).stop - 1]
        for x in captured:
            x.fill_(torch.nan)
        graph.replay()
        ends = [p.rows(b).stop - 1 for b in members]
        assert same_bits([x[: len(members)] for x in captured], [x[ends] for x in whole])
        assert not captured[0][len(members) :].any()
        assert captured[1][len(members) :].isneginf().all()


@NAMES
def test_schedules_of_one_plan_give_one_result(name):
    """Every tile along the rows, warps, stages, descriptors or pointers, and Hopper's own kernel where there is one."""
    from rlalign_kernels.attention import triton_backend as backend
    from rlalign_kernels.attention.schedules import Tile
    from rlalign_kernels.attention.tile_plan import tile_plan

    p = make(name, [*SHORT, 1025, 2300])
    whole = packed(p)
    right = 0 if p.settings.get("causal", True) else None
    left = None if "window" not in p.settings else p.settings["window"] - 1
    masking = backend.Masking(p.keywords["scale"], left, right, p.settings.get("softcap"))
    keys = backend.Keys(p.k, p.v, cu_seqlens=p.cu)
    shape = backend.shape_of(p.q, p.k, p.v)
    kv_tile = tile_plan(*p.dims, p.dtype, shape.architecture).kv_tile
    for block_m, warps, stages, tma in ((16, 4, 1, False), (16, 4, 3, True), (32, 2, 2, False), (64, 4, 1, True), (64, 8, 2, False)):  # fmt: skip  # noqa: E501
        if p.dtype == torch.float32 and block_m > 32:
            continue
        tile = Tile(block_m, kv_tile, warps, stages, tma)
        out = backend.forward(p.q, keys, p.cu, masking, sinks=p.keywords.get("sinks"), return_lse=True, tiles=(tile, tile))  # fmt: skip  # noqa: E501
        assert same_bits(out, whole), tile


@CAUSAL
@pytest.mark.parametrize("page", [16, 128])
def test_schedules_of_decode_give_one_result(name, page, monkeypatch):
    """A program per split or per sequence, pipeline depths, descriptors or pointers, larger tiles of rows."""
    from rlalign_kernels.attention import schedules
    from rlalign_kernels.attention import triton_backend as backend
    from rlalign_kernels.attention.schedules import Tile
    from rlalign_kernels.attention.tile_plan import tile_plan

    p = make(name, [1, 129, 1025, 2300])
    whole, cache, many = packed(p), p.cache(page), len(p.lengths)
    taken, index = p.last([1] * many)
    left = None if "window" not in p.settings else p.settings["window"] - 1
    masking = backend.Masking(p.keywords["scale"], left, 0, p.settings.get("softcap"))
    keys = backend.Keys(cache["k_cache"], cache["v_cache"], None, cache["block_tables"], cache["kv_lens"])
    kv_tile = tile_plan(*p.dims, p.dtype, backend.shape_of(p.q, p.k, p.v).architecture).kv_tile
    for apart in (False, True):
        monkeypatch.setattr(schedules, "splits_apart", lambda *_, apart=apart: apart)
        backend._CALLS = type(backend._CALLS)()
        for block_m, warps, stages, tma in ((16, 4, 1, False), (16, 4, 3, True), (16, 2, 2, True), (32, 4, 2, False)):
            tile = Tile(block_m, kv_tile, warps, stages, tma)
            found = backend.forward(p.q[index], keys, offsets(taken), masking, p.keywords.get("sinks"), 1, True, tiles=(tile, tile))  # fmt: skip  # noqa: E501
            assert same_bits(found, [x[index] for x in whole]), (apart, tile)


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
    cotangent = torch.randn_like(p.q[..., :1]).expand(*p.q.shape[:2], p.dims[1]).contiguous()
    cotangent = cotangent * torch.randn(p.dims[1], device=DEVICE).to(p.dtype)

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
    bound = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}[p.dtype]
    for what, grad, truth in zip((*names, "sinks"), found, torch.autograd.grad(exact, exact_inputs, cotangent.double()), strict=False):  # fmt: skip  # noqa: E501
        assert float((grad.double() - truth).norm() / truth.norm()) < bound, what
    rows = p.rows(3)
    poisoned = [x.clone() for x in (p.q, p.k, p.v)]
    grad = cotangent.clone()
    for x in (*poisoned, grad):
        x[: rows.start], x[rows.stop :] = torch.nan, torch.nan
    beside = gradients(poisoned, grad)
    assert same_bits([x[rows] for x in beside[:3]], [x[rows] for x in found[:3]])


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


@pytest.mark.parametrize("known", [False, True], ids=["bounds unknown", "bounds known"])
def test_no_kernel_is_compiled_while_decoding(known):
    """1,000 steps of growing lengths, over the end of a split, as sequences come and go."""
    from rlalign_kernels.attention.triton_decode import attention_decode_kernel
    from rlalign_kernels.attention.triton_forward import attention_forward_kernel

    p = Problem([1500] * 40, heads=(4, 2))
    cache = p.cache(16)

    def compiled() -> int:
        kernels = (attention_decode_kernel, attention_forward_kernel)
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    def step(n: int, many: int) -> None:
        lens = torch.tensor([n, *[n // 2 + 1] * (many - 2), 1], dtype=torch.int32, device=DEVICE)
        part = {"block_tables": cache["block_tables"][:many], "kv_lens": lens}
        bounds = {"max_seqlen_k": n} if known else {}
        attention_paged(p.q[:many], **{**cache, **part}, cu_seqlens_q=offsets([1] * many), max_seqlen_q=1, **bounds, **p.keywords)  # fmt: skip  # noqa: E501

    step(400, 3)
    before = compiled()
    assert before > 0
    for n in range(400, 1401):
        step(n, 3 if n % 5 else 2 + n % 39)
    assert compiled() == before


def test_unaligned_tensors_and_other_launches_between_give_the_same_bits():
    """A launch is remembered by its layout: pointers off a 16-byte boundary are another kernel, not another result."""
    p = Problem([300, 5, 77], heads=(4, 2))
    whole = packed(p)

    def shifted(x: torch.Tensor) -> torch.Tensor:
        room = torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype, device=DEVICE)
        room[1:] = x.flatten()
        return room[1:].view(x.shape)

    wide = torch.cat([p.cu[:1], p.cu])[1:]  # offsets that begin 4 bytes after a boundary
    assert wide.data_ptr() % 16
    for q, k, v, cu in ((shifted(p.q), p.k, p.v, p.cu), (p.q, shifted(p.k), shifted(p.v), p.cu), (p.q, p.k, p.v, wide)):
        for _ in range(3):
            assert same_bits(packed(p, q, k, v, cu, cu), whole)
        assert same_bits(packed(p), whole)
