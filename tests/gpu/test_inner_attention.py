"""Inner attentions that need a GPU: torch's varlen and compiled FlexAttention, and our kernels behind the same seam."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
from rlalign_kernels import attention_packed, attention_paged
from support.models import tiny_model
from torch.nn.attention.varlen import varlen_attn

from rlalign.modeling import PackedContext, Policy, align, make_inner_attention
from rlalign.modeling.inner_attention import Invariant, Sdpa
from rlalign.modeling.torch_attention import Flex, Varlen

Q_LENS, KV_LENS = (65, 1, 130, 3), (65, 200, 300, 3)
PAGE = 16
ATTENTIONS = {
    "invariant": Invariant(),
    "varlen": Varlen(),
    "flex": Flex(),
    "flex, kernel options": Flex(kernel_options={"BLOCK_M": 64, "BLOCK_N": 64}),
}
EACH = pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
CLOSE = {"rtol": 2e-2, "atol": 2e-2}


def offsets(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")


def rows(kv_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(Q_LENS), 8, 64), (sum(KV_LENS), kv_heads, 64), (sum(KV_LENS), kv_heads, 64))
    return [torch.randn(shape, generator=generator).to("cuda", torch.bfloat16) for shape in shapes]


def settings(**changed: Any) -> dict[str, Any]:
    lengths = {"cu_seqlens_q": offsets(Q_LENS), "cu_seqlens_k": offsets(KV_LENS)}
    return lengths | {"scale": 0.125, "causal": True, "window": None, "softcap": None} | changed


@EACH
@pytest.mark.parametrize("kv_heads", [8, 2, 1])
@pytest.mark.parametrize("changed", [{}, {"window": 40}, {"causal": False}], ids=["causal", "window", "full"])
def test_computes_packed_attention(attention, kv_heads, changed):
    inputs = [x.requires_grad_() for x in rows(kv_heads)]
    keywords = settings(**changed)
    found = attention.packed(*inputs, **keywords)
    wide = [x.detach().float().requires_grad_() for x in inputs]
    expected = attention_packed(*wide, **keywords, backend="native")
    torch.testing.assert_close(found.float(), expected, **CLOSE)
    cotangent = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).cuda()
    mine = torch.autograd.grad(found, inputs, cotangent.to(found))
    theirs = torch.autograd.grad(expected, wide, cotangent)
    for ours, truth in zip(mine, theirs, strict=True):
        assert (ours.float() - truth).norm() / truth.norm() < 2e-2


@torch.no_grad()
@EACH
def test_computes_paged_attention(attention):
    q, k, v = rows(kv_heads=2)
    pages = [-(-n // PAGE) for n in KV_LENS]
    order = torch.randperm(sum(pages) + 5, generator=torch.Generator().manual_seed(3)).tolist()
    tables = torch.zeros(len(KV_LENS), max(pages), dtype=torch.int32)
    caches = [torch.full((len(order), PAGE, 2, 64), torch.nan, dtype=k.dtype, device="cuda") for _ in range(2)]
    starts = offsets(KV_LENS).tolist()
    for b, length in enumerate(KV_LENS):
        for at in range(0, length, PAGE):
            tables[b, at // PAGE] = page = order.pop()
            part = slice(starts[b] + at, starts[b] + min(at + PAGE, length))
            for cache, tensor in zip(caches, (k, v), strict=True):
                cache[page, : part.stop - part.start] = tensor[part]
    keywords = settings()
    expected = attention.packed(q, k, v, **keywords)
    del keywords["cu_seqlens_k"]
    kv_lens = torch.tensor(KV_LENS, dtype=torch.int32, device="cuda")
    found = attention.paged(q, *caches, **keywords, block_tables=tables.cuda(), kv_lens=kv_lens)
    torch.testing.assert_close(found, expected, **CLOSE)
    if attention.invariant:
        assert torch.equal(found, expected)
        direct = attention_paged(
            q, *caches, **keywords, block_tables=tables.cuda(), kv_lens=kv_lens, backend="triton"
        )  # fmt: skip
        assert torch.equal(found, direct)


def test_varlen_needs_its_flag_for_grouped_heads():
    """Why Varlen passes enable_gqa where torch has it (from 2.12 on)."""
    q, k, v = rows(kv_heads=2)
    cu_q, cu_k = offsets(Q_LENS), offsets(KV_LENS)
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        with pytest.raises((ValueError, RuntimeError)):
            varlen_attn(q, k, v, cu_q, cu_k, max(Q_LENS), max(KV_LENS), scale=0.125, window_size=(-1, 0))
    torch.testing.assert_close(
        Varlen().packed(q, k, v, **settings()).float(),
        attention_packed(*(x.float() for x in (q, k, v)), **settings(), backend="native"),
        **CLOSE,
    )


def test_flex_soft_cap():
    q, k, v = rows(kv_heads=2)
    expected = attention_packed(*(x.float() for x in (q, k, v)), **settings(softcap=2.0), backend="native")
    torch.testing.assert_close(Flex().packed(q, k, v, **settings(softcap=2.0)).float(), expected, **CLOSE)


@torch.no_grad()
@EACH
def test_an_aligned_model_runs_on_it(attention):
    """Head dims of a tiny model: 16 is FlexAttention's least."""
    tokens = torch.randint(97, (200,), generator=torch.Generator().manual_seed(0)).cuda()
    positions = torch.cat([torch.arange(120), torch.arange(80)]).cuda()
    context = PackedContext(offsets((120, 80)))
    found, expected = (
        Policy(align(tiny_model("qwen3", torch.bfloat16).cuda(), backend="native", attention=one)).hidden(
            tokens, positions, context
        )
        for one in (attention, Sdpa())
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0.15)


def test_settings_make_them():
    made = make_inner_attention({"_target_": "rlalign.modeling.inner_attention.Invariant"})
    made.check(torch.device("cuda"), torch.bfloat16)
    Varlen().check(torch.device("cuda"), torch.bfloat16)
