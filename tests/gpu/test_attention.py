"""Attention on the GPU: the contract's axes bit for bit.

Three equalities that chain: packed training rows = prefill of any chunking (pages or not) = decode token by token.
"""

from __future__ import annotations

import random

import pytest
import torch
from rlalign_kernels import attention_paged
from support_attention import DEVICE, PROBLEMS, SHORT, Problem, make, offsets, packed, same_bits

NAMES = pytest.mark.parametrize("name", PROBLEMS)
# without causality a chunk is another problem
CAUSAL = pytest.mark.parametrize("name", [n for n, p in PROBLEMS.items() if p.get("settings", {}).get("causal", True)])


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


def test_graph_replay_of_a_mixed_batch_gives_the_eager_bits():
    """Chunks and single tokens together; a slot of the bucket is empty in one replay, another in the next."""
    p = Problem([700, 1500, 33, 2100], heads=(4, 2))
    whole, cache = packed(p), p.cache(64)
    q = torch.zeros(160, 4, 128, dtype=p.dtype, device=DEVICE)
    kv_lens, tables = torch.zeros(4, dtype=torch.int32, device=DEVICE), torch.zeros_like(cache["block_tables"])
    cu = torch.zeros(5, dtype=torch.int32, device=DEVICE)
    fixed = {**cache, "kv_lens": kv_lens, "block_tables": tables, "cu_seqlens_q": cu}

    def call():
        return attention_paged(q, **fixed, max_seqlen_q=100, max_seqlen_k=2304, **p.keywords)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for chunks in ([1, 100, 0, 7], [100, 1, 33, 1], [0, 0, 5, 90]):
        tokens, index = sum(chunks), []
        for b, n in enumerate(chunks):
            kv_lens[b] = p.lengths[b] if n else 0
            tables[b] = cache["block_tables"][b]
            index += range(p.rows(b).stop - n, p.rows(b).stop)
        cu.copy_(offsets(chunks))
        q[:tokens] = p.q[index]
        for x in captured:
            x.fill_(torch.nan)
        graph.replay()
        assert same_bits([x[:tokens] for x in captured], [x[index] for x in whole])


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


@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("known", ["nothing", "queries", "both"])
def test_no_kernel_is_compiled_while_decoding(known, page_size):
    """1,000 steps of growing lengths, over the end of a split, as sequences come and go and page tables widen."""
    from rlalign_kernels.attention.triton_decode import attention_decode_kernel
    from rlalign_kernels.attention.triton_forward import attention_forward_kernel

    kernels = [attention_decode_kernel, attention_forward_kernel]
    if torch.cuda.get_device_capability() == (9, 0):
        from rlalign_kernels.attention.hopper_forward import hopper_forward_kernel

        kernels.append(hopper_forward_kernel)
    p = Problem([1500] * 40, heads=(4, 2))
    cache = p.cache(page_size)

    def compiled() -> int:
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    def step(n: int, many: int) -> None:
        lens = torch.tensor([n, *[n // 2 + 1] * (many - 2), 1], dtype=torch.int32, device=DEVICE)
        # as an engine has it: as many columns as the longest needs
        part = {"block_tables": cache["block_tables"][:many, : -(-n // page_size)].contiguous(), "kv_lens": lens}
        bounds = {"nothing": {}, "queries": {"max_seqlen_q": 1}, "both": {"max_seqlen_q": 1, "max_seqlen_k": n}}[known]
        attention_paged(p.q[:many], **{**cache, **part}, cu_seqlens_q=offsets([1] * many), **bounds, **p.keywords)

    step(400, 20)
    before = compiled()
    assert before > 0
    for n in range(400, 1401):
        step(n, 20 + n % 3 if n % 5 else 2 + n % 39)
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


def test_a_profilers_hook_sees_every_launch_and_a_stream_of_ones_own_is_used():
    """Calls after the first bypass Triton's launcher: see triton_runner."""
    from triton import knobs

    p = make("bf16", SHORT)
    whole, seen = packed(p), []
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        assert same_bits(packed(p), whole)
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    assert len(seen) == 1
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        q = torch.full_like(p.q, torch.nan)
        torch.cuda._sleep(50_000_000)
        late = packed(p, q.copy_(p.q))  # on another stream it would come too early
    torch.cuda.current_stream().wait_stream(stream)
    assert same_bits(late, whole) and len(seen) == 1
