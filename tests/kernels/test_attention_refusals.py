"""What attention can't be called with, in every backend: each message names the argument and its value."""

from __future__ import annotations

import pytest
import torch
from rlalign_kernels import attention_packed, attention_paged
from rlalign_kernels.attention import packed
from support_kernels import interpreted, normal

BACKENDS = ["reference", "native", pytest.param("triton", marks=interpreted)]
SETTINGS = [
    ({"scale": [1]}, r"scale=\[1\]"),
    ({"window": True}, "window=True"),
    ({"causal": None}, "causal=None"),
    ({"causal": "no"}, "causal='no'"),
    ({"causal": [1]}, r"causal=\[1\]"),
    ({"window": [3]}, r"window=\[3\]"),
    ({"softcap": [3.0]}, r"softcap=\[3\.0\]"),
    ({"cu_seqlens_q": [0, 4]}, r"cu_seqlens_q=\[0, 4\]"),
    ({"cu_seqlens_q": None}, "cu_seqlens_q=None"),
    ({"q": [0.0]}, r"q=\[0\.0\]"),
]
BOUNDS = [
    ({"max_seqlen_q": -3}, "max_seqlen_q=-3"),
    ({"max_seqlen_k": -3}, "max_seqlen_k=-3"),
    ({"max_seqlen_k": torch.tensor(-3)}, r"max_seqlen_k=tensor\(-3\)"),
    ({"max_seqlen_q": "x"}, "max_seqlen_q='x'"),
    ({"max_seqlen_q": 4.0}, r"max_seqlen_q=4\.0"),
    ({"max_seqlen_q": True}, "max_seqlen_q=True"),
]


def packed_arguments():
    cu = torch.tensor([0, 4], dtype=torch.int32)
    q, k, v = (normal(4, heads, 16, seed=heads) for heads in (2, 1, 1))
    return {"q": q, "k": k, "v": v, "cu_seqlens_q": cu, "cu_seqlens_k": cu, "scale": 0.3}


def paged_arguments():
    cache = normal(2, 16, 1, 16, seed=3)
    lengths = {"block_tables": torch.tensor([[1]]), "kv_lens": torch.tensor([4])}
    cu = torch.tensor([0, 4], dtype=torch.int32)
    return {
        "q": normal(4, 2, 16, seed=2),
        "k_cache": cache,
        "v_cache": cache,
        "cu_seqlens_q": cu,
        "scale": 0.3,
    } | lengths


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("changed", "message"), [*SETTINGS, *BOUNDS, ({"cu_seqlens_k": [0, 4]}, r"cu_seqlens_k=\[0, 4")]
)
def test_packed(changed, message, backend):
    with pytest.raises(ValueError, match=f"attention.*{message}"):
        attention_packed(**packed_arguments() | changed, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("changed", "message"),
    [*SETTINGS, *BOUNDS, ({"kv_lens": [4]}, r"kv_lens=\[4\]"), ({"block_tables": [[1]]}, r"block_tables=\[\[1\]\]")],
)
def test_paged(changed, message, backend):
    with pytest.raises(ValueError, match=f"attention.*{message}"):
        attention_paged(**paged_arguments() | changed, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_that_hold_nothing(backend):
    cache = torch.zeros(2, 0, 1, 16)
    given = {"k_cache": cache, "v_cache": cache, "kv_lens": torch.tensor([0])}
    with pytest.raises(ValueError, match="pages of 0 tokens"):
        attention_paged(**paged_arguments() | given, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_sequence_is_nothing_to_do(backend):
    none = {"q": torch.zeros(0, 2, 16), "cu_seqlens_q": torch.zeros(1, dtype=torch.int32)}
    tables = {"block_tables": torch.zeros(0, 3, dtype=torch.int32), "kv_lens": torch.zeros(0, dtype=torch.int32)}
    assert attention_paged(**paged_arguments() | none | tables, backend=backend).shape == (0, 2, 16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_a_gradient_where_no_query_has_a_key_is_zero(wanted, backend):
    arguments = packed_arguments() | {
        "cu_seqlens_q": torch.tensor([0, 4, 4], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 0, 4], dtype=torch.int32),
    }
    arguments["q"] = torch.full_like(arguments["q"], torch.nan)
    arguments[wanted] = arguments[wanted].clone().requires_grad_()
    out = attention_packed(**arguments, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), arguments[wanted])
    assert not out.any() and not grad.any()


@interpreted
@pytest.mark.parametrize("attention", [attention_packed, attention_paged])
def test_a_layout_that_is_known_already_refuses_no_less(attention):
    """Decisions are kept for all bounds that come to the same; -3 keys come to as many splits as none."""
    arguments = packed_arguments() if attention is attention_packed else paged_arguments()
    empty = {"q": arguments["q"][:0], "cu_seqlens_q": torch.zeros(2, dtype=torch.int32)}
    attention(**arguments | empty, max_seqlen_k=0, backend="triton")
    with pytest.raises(ValueError, match="max_seqlen_k=-3"):
        attention(**arguments | empty, max_seqlen_k=-3, backend="triton")


def test_an_error_of_ours_is_not_taken_for_a_wrong_argument(monkeypatch):
    monkeypatch.setattr(packed, "check_problem", lambda *problem: problem.no_such_thing)
    with pytest.raises(AttributeError, match="no_such_thing"):
        attention_packed(**packed_arguments(), backend="reference")
