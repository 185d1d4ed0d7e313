"""Attention's cases for ``bench_kernels.py``: prefill, backward and paged decode at head dim 128, bfloat16.

Against cuDNN (dense batches of one length), FlashAttention-2 (torch's varlen) and FlexAttention; and beside the chosen
kernels our stock Triton ones, which other GPUs run, with the same bits. Libraries that know no pages get the same keys
as dense or packed rows, which is less work than ours. FLOPs count the causal half.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rlalign_kernels import attention_packed, attention_paged
from rlalign_kernels.attention import schedules
from rlalign_kernels.attention.tile_plan import tile_plan
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlalign.cli.bench_kernels import Case
from rlalign.modeling.torch_attention import varlen_attention

STOCK = "rlalign, stock Triton"
_DIM = 128
_KV_HEADS = 8
_PAGE = 128
_DTYPE = torch.bfloat16
_SCALE = _DIM**-0.5
_HEADS = (16, 32)
_PREFILL = {"8x2048": [2048] * 8, "2x8192": [8192] * 2, "32x512": [512] * 32}
_DECODE = {
    "1x8192": [8192],
    "1x32768": [32768],
    "16x4096": [4096] * 16,
    "128x2048": [2048] * 128,
    "128x8192": [8192] * 128,
    "1x32768 + 63x500": [32768] + [500] * 63,
}


def make_cases(only: str) -> Iterator[Callable[[], Case]]:
    """Cases whose name contains ``only``, each made when it is called: together they would not fit a GPU."""
    rng = random.Random(0)
    prefill = _PREFILL | {"ragged 24": [min(8192, max(16, int(rng.lognormvariate(6.5, 1.0)))) for _ in range(24)]}
    for heads, (shape, lengths) in itertools.product(_HEADS, prefill.items()):
        for kind, make in (("forward", _forward), ("backward", _backward)):
            name = f"{kind} {shape}, {heads}/{_KV_HEADS} heads"
            if only in name:
                yield lambda make=make, name=name, heads=heads, lengths=lengths: make(name, heads, lengths)
    for heads, (shape, lengths) in itertools.product(_HEADS, _DECODE.items()):
        name = f"decode {shape}, {heads}/{_KV_HEADS} heads"
        if only in name:
            yield lambda name=name, heads=heads, lengths=lengths: _decode(name, heads, lengths)


def make_host_cases(only: str) -> Iterator[tuple[str, dict[str, Callable[[], object]]]]:
    """Problems so small that the host's time is all there is; beside torch's own operator, whatever it chooses."""
    heads = _HEADS[0]
    if only in "host time, forward 1x64":
        qkv, cu = _packed(heads, [64])
        dense = [x.view(1, 64, x.shape[1], _DIM).transpose(1, 2) for x in qkv]
        known = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 64, "max_seqlen_k": 64}
        yield (
            "host time, forward 1x64",
            {
                "torch sdpa": lambda: F.scaled_dot_product_attention(*dense, is_causal=True, enable_gqa=True),
                "rlalign": lambda: attention_packed(*qkv, **known, scale=_SCALE, backend="triton"),
            },
        )
    for lengths in ([1024], [2048], [1024] * 16):
        name = f"host time, decode {len(lengths)}x{lengths[0]}"
        if only in name:
            calls = _decode(name, heads, lengths).calls
            dense = [_random(len(lengths), _KV_HEADS, lengths[0], _DIM) for _ in range(2)]
            query = _random(len(lengths), heads, 1, _DIM)
            sdpa = partial(F.scaled_dot_product_attention, query, *dense, enable_gqa=True)
            yield name, {"torch sdpa": sdpa, "rlalign": calls["rlalign"]}


def _stock(qkv: Sequence[torch.Tensor], cu: torch.Tensor, longest: int) -> tuple[tuple[Any, ...], tuple[Any, Any]]:
    """The problem as the triton backend states it, and the schedules that it takes where there is no Hopper."""
    from rlalign_kernels.attention.triton_problem import Keys, Masking, shape_of

    q, k, v = (x.detach() for x in qkv)
    shape = shape_of(q, k, v)
    plan = tile_plan(_DIM, _DIM, _DTYPE, shape.architecture)
    prefill = schedules.prefill_tile(shape, plan)
    problem = (q, Keys(k, v, cu, max_seqlen=longest), cu, Masking(_SCALE, right=0))
    return problem, ((prefill, prefill), (schedules.dq_tile(shape), schedules.dkv_tile(shape)))


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(_DTYPE)


def _offsets(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")


def _packed(heads: int, lengths: Sequence[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    tokens = sum(lengths)
    return [_random(tokens, h, _DIM) for h in (heads, _KV_HEADS, _KV_HEADS)], _offsets(lengths)


def _causal_flops(heads: int, lengths: Sequence[int]) -> float:
    return sum(2.0 * length * length * _DIM * heads for length in lengths)


def _implementations(
    qkv: Sequence[torch.Tensor], cu: torch.Tensor, lengths: Sequence[int]
) -> dict[str, Callable[[], torch.Tensor]]:
    """Causal attention over packed rows; cuDNN and FlexAttention only where all lengths are equal."""
    longest = max(lengths)

    def ours() -> torch.Tensor:
        known = {"max_seqlen_q": longest, "max_seqlen_k": longest, "backend": "triton"}
        return attention_packed(*qkv, cu_seqlens_q=cu, cu_seqlens_k=cu, scale=_SCALE, **known)

    def flash() -> torch.Tensor:
        return varlen_attention(*qkv, cu, cu, longest, longest, scale=_SCALE, window_size=(-1, 0))

    calls = {"rlalign": ours, STOCK: _stock_forward(qkv, cu, longest), "flash-attention 2": flash}
    if len(set(lengths)) > 1:
        return calls
    dense = [x.view(len(lengths), longest, x.shape[1], _DIM).transpose(1, 2) for x in qkv]

    def cudnn() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(*dense, is_causal=True, enable_gqa=True)

    return {"cudnn": cudnn, **calls, "flex": _flex(dense, longest)}


def _stock_forward(qkv: Sequence[torch.Tensor], cu: torch.Tensor, longest: int) -> Callable[[], torch.Tensor]:
    from rlalign_kernels.attention.triton_backend import forward

    problem, (tiles, _) = _stock(qkv, cu, longest)
    return lambda: forward(*problem, max_seqlen_q=longest, tiles=tiles)[0]


def _stock_backward(qkv: Sequence[torch.Tensor], cu: torch.Tensor, longest: int) -> Callable[[], object]:
    from rlalign_kernels.attention.triton_backend import forward
    from rlalign_kernels.attention.triton_gradient import backward

    (q, keys, _, masking), (_, tiles) = _stock(qkv, cu, longest)
    out, lse = forward(q, keys, cu, masking, return_lse=True)
    grad = torch.randn_like(out)
    return lambda: backward(q, keys.k, keys.v, None, out, lse, cu, cu, grad, masking, tiles=tiles)


def _flex(dense: Sequence[torch.Tensor], longest: int) -> Callable[[], torch.Tensor]:
    made = []

    def call() -> torch.Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        if not made:
            mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, longest, longest, device="cuda")
            made.append((torch.compile(flex_attention, dynamic=False), mask))
        compiled, mask = made[0]
        return compiled(*dense, block_mask=mask, enable_gqa=True)

    return call


def _forward(name: str, heads: int, lengths: Sequence[int]) -> Case:
    qkv, cu = _packed(heads, lengths)
    calls = _implementations(qkv, cu, lengths)
    baseline = "cudnn" if "cudnn" in calls else "flash-attention 2"
    return Case(name, baseline, calls, flops=_causal_flops(heads, lengths))


def _backward(name: str, heads: int, lengths: Sequence[int]) -> Case:
    qkv, cu = _packed(heads, lengths)
    for x in qkv:
        x.requires_grad_()

    def backward(forward: Callable[[], torch.Tensor]) -> Callable[[], object]:
        kept = []

        def call() -> object:
            if not kept:
                out = forward()
                kept.append((out, torch.randn_like(out)))
            return torch.autograd.grad(kept[0][0], qkv, kept[0][1], retain_graph=True)

        return call

    calls = {impl: backward(call) for impl, call in _implementations(qkv, cu, lengths).items()}
    calls[STOCK] = _stock_backward(qkv, cu, max(lengths))
    baseline = "cudnn" if "cudnn" in calls else "flash-attention 2"
    return Case(name, baseline, calls, flops=2.5 * _causal_flops(heads, lengths))


def _decode(name: str, heads: int, lengths: Sequence[int]) -> Case:
    """One query per sequence. Bytes: every key and value once."""
    batch, longest = len(lengths), max(lengths)
    pages = [-(-length // _PAGE) for length in lengths]
    k_cache, v_cache = (_random(sum(pages), _PAGE, _KV_HEADS, _DIM) for _ in range(2))
    order = torch.randperm(sum(pages), device="cuda").int()
    tables = torch.zeros(batch, max(pages), dtype=torch.int32, device="cuda")
    start = 0
    for b, count in enumerate(pages):
        tables[b, :count] = order[start : start + count]
        start += count
    q, cu_q = _random(batch, heads, _DIM), _offsets([1] * batch)
    kv_lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")

    def ours() -> torch.Tensor:
        return attention_paged(
            q, k_cache, v_cache, block_tables=tables, cu_seqlens_q=cu_q, kv_lens=kv_lens, scale=_SCALE,
            max_seqlen_q=1, max_seqlen_k=longest, backend="triton",
        )  # fmt: skip

    calls: dict[str, Callable[[], object]] = {"rlalign": ours}
    if len(set(lengths)) == 1 and longest % _PAGE == 0:
        dense = [x.view(batch, longest, _KV_HEADS, _DIM).transpose(1, 2) for x in (k_cache, v_cache)]
        query = q.view(batch, 1, heads, _DIM).transpose(1, 2)

        def cudnn() -> torch.Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return F.scaled_dot_product_attention(query, *dense, enable_gqa=True)

        calls = {"cudnn": cudnn, **calls}
    packed = [x.flatten(0, 1)[: sum(lengths)] for x in (k_cache, v_cache)]
    cu_k = _offsets(lengths)

    def flash() -> torch.Tensor:
        return varlen_attention(q, *packed, cu_q, cu_k, 1, longest, scale=_SCALE, window_size=(-1, -1))

    calls["flash-attention 2"] = flash
    baseline = "cudnn" if "cudnn" in calls else "flash-attention 2"
    num_bytes = 2.0 * sum(lengths) * _KV_HEADS * _DIM * _DTYPE.itemsize
    return Case(name, baseline, calls, num_bytes=num_bytes, graphed=True)
