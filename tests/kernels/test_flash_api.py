"""The FlashAttention-compatible call, under Triton's interpreter."""

from __future__ import annotations

import inspect

import pytest
import torch
from rlalign_kernels import flash_attn_varlen_func
from rlalign_kernels.reference import truths
from support_kernels import error, interpreted, normal

FLASH2 = [
    "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "dropout_p", "softmax_scale",
    "causal", "window_size", "softcap", "alibi_slopes", "deterministic", "return_attn_probs", "block_table",
]  # fmt: skip


def problem(q_lens=(3, 20), k_lens=(9, 20)):
    q = normal(sum(q_lens), 2, 16, seed=1)
    k, v = (normal(sum(k_lens), 1, 16, seed=seed) for seed in (2, 3))
    cu = [torch.tensor([0, lens[0], sum(lens)], dtype=torch.int32) for lens in (q_lens, k_lens)]
    return q, k, v, *cu


def test_arguments_come_in_flash_attentions_order():
    parameters = inspect.signature(flash_attn_varlen_func).parameters
    assert [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == FLASH2
    only = {name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert only == {"page_table", "seqused_k", "cache_seqlens", "return_softmax_lse"}


@interpreted
@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({}, {"causal": False}),
        ({"causal": True}, {"causal": True}),
        ({"causal": True, "window_size": (4, 0)}, {"causal": True, "window": 5}),
        ({"causal": True, "window_size": (4, 4)}, {"causal": True, "window": 5}),
        ({"causal": True, "window_size": (2**31 - 1, 2**31 - 1)}, {"causal": True}),
        ({"causal": True, "window_size": None}, {"causal": True}),
        ({"window_size": (4, -1)}, {"causal": False, "window": 5}),
        ({"window_size": (None, 0), "softcap": 2.0}, {"causal": True, "softcap": 2.0}),
    ],
)
def test_packed_means_what_flash_attention_means(given, meant):
    q, k, v, cu_q, cu_k = problem()
    out, lse, nothing = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 20, 20, return_attn_probs=True, **given)
    exact, exact_lse = truths.attention(q, k, v, cu_q, cu_k, 0.25, **meant)
    assert nothing is None
    assert lse.shape == (2, 23)
    assert error(out, exact) < 1e-6
    assert torch.allclose(lse.t().double(), exact_lse, atol=1e-5)
    alone = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 20, 20, **given)
    both = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 20, 20, return_softmax_lse=True, **given)
    assert torch.equal(alone, out)
    assert len(both) == 2 and torch.equal(both[0], out) and torch.equal(both[1], lse)


@interpreted
def test_pages_under_either_name():
    q, k, v, cu_q, cu_k = problem()
    caches = []
    for x in (k, v):
        cache = torch.full((4, 16, 1, 16), torch.nan)
        cache[2, :9], cache[0], cache[3, :4] = x[:9], x[9:25], x[25:]
        caches.append(cache)
    table = torch.tensor([[2, 99], [0, 3]], dtype=torch.int32)
    used = torch.tensor([9, 20], dtype=torch.int32)
    exact, _ = truths.attention(q, k, v, cu_q, cu_k, 0.25)
    for names in (
        {"block_table": table, "seqused_k": used},
        {"page_table": table, "cache_seqlens": used},
        {"block_table": table},
    ):
        cu = None if len(names) == 2 else cu_k
        out = flash_attn_varlen_func(q, *caches, cu_q, cu, 20, 20, causal=True, **names)
        assert error(out, exact) < 1e-6


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dropout_p": 0.1}, r"dropout_p=0\.1"),
        ({"dropout_p": torch.zeros(2)}, r"dropout_p=tensor"),
        ({"softmax_scale": 0.0}, r"softmax_scale=0\.0"),
        ({"softmax_scale": float("nan")}, "softmax_scale=nan"),
        ({"softmax_scale": torch.ones(1)}, "softmax_scale=tensor"),
        ({"softcap": []}, r"softcap=\[\]"),
        ({"causal": None}, "causal=None"),
        ({"q": None}, "q=None"),
        ({"q": torch.zeros(29, 4, 0), "k": torch.zeros(29, 1, 0)}, "head_dim=0"),
        ({"alibi_slopes": torch.ones(2)}, "alibi_slopes"),
        ({"window_size": (3, 2)}, r"window_size=\(3, 2\)"),
        ({"window_size": (-3, 0)}, r"window_size=\(-3, 0\)"),
        ({"window_size": (1, 2, 3)}, r"window_size=\(1, 2, 3\)"),
        ({"window_size": 3}, "window_size=3 "),
        ({"window_size": ([1], 0)}, r"window_size=\(\[1\], 0\)"),
        ({"window_size": (1.5, 0)}, r"window_size=\(1\.5, 0\)"),
        ({"window_size": (True, 0)}, r"window_size=\(True, 0\)"),
        ({"block_table": torch.ones(2, 1), "cu_seqlens_k": torch.tensor([0.0, 9, 20])}, "cu_seqlens_k is torch.float"),
        ({"block_table": torch.ones(2, 1), "cu_seqlens_k": torch.tensor([0, 20])}, r"cu_seqlens_k \(2,\) on cpu"),
        ({"block_table": torch.ones(2, 1), "cu_seqlens_k": [0, 9, 20]}, r"cu_seqlens_k=\[0, 9, 20\]"),
        ({"seqused_k": torch.ones(2)}, "seqused_k without"),
        ({"block_table": torch.ones(2), "page_table": torch.ones(2)}, "block_table and page_table"),
        ({"cu_seqlens_k": None}, "cu_seqlens_k=None"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(given, message):
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")
    run = dict(zip(names, problem(), strict=True)) | {"max_seqlen_q": 20, "max_seqlen_k": 20}
    with pytest.raises((ValueError, NotImplementedError), match=message):
        flash_attn_varlen_func(**run | given)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window_size", [(1, -5), (-5, -1), (-5, 0)])
def test_a_side_below_minus_one_is_no_window_on_either_side(window_size, causal):
    with pytest.raises(ValueError, match=f"window_size=\\({window_size[0]}, {window_size[1]}\\)"):
        flash_attn_varlen_func(*problem(), 20, 20, window_size=window_size, causal=causal)
