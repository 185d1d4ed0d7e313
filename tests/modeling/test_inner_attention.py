"""Inner attentions as config objects: the same function, GQA, windows and pages at one seam; what they refuse."""

from __future__ import annotations

import gc
import itertools
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rlalign_kernels import attention_packed
from support.models import tiny_model
from torch.nn.attention import varlen

from rlalign.modeling import (
    PackedContext,
    Policy,
    align,
    audit,
    load_policy,
    make_inner_attention,
    save_checkpoint,
    torch_attention,
)
from rlalign.modeling.inner_attention import Invariant, Reference, Sdpa, default_attention, refuse_contradiction
from rlalign.modeling.torch_attention import _BATCHES, Flex, Varlen

CONF = Path(__file__).resolve().parents[2] / "conf" / "attention"
NAMES = sorted(path.stem for path in CONF.glob("*.yaml"))
CLOSE = {"rtol": 0, "atol": 2e-5}
Q_LENS, KV_LENS = (5, 1, 9, 3), (5, 12, 20, 3)


def settings_of(name: str, **options: Any) -> dict[str, Any]:
    return yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8")) | options


def offsets(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def rows(q_heads: int = 4, kv_heads: int = 2, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((sum(Q_LENS), q_heads, 16), (sum(KV_LENS), kv_heads, 16), (sum(KV_LENS), kv_heads, 16))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def fake_varlen_attn(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor,
    max_q: int, max_k: int, *, scale: float, window_size: tuple[int, int], enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """torch's interface on a CPU, head count check included; its kernel needs a GPU."""
    assert enable_gqa or query.shape[1] == key.shape[1], "torch refuses this without enable_gqa"
    assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
    left, right = window_size
    return attention_packed(
        query, key, value, cu_seqlens_q=cu_seq_q, cu_seqlens_k=cu_seq_k, scale=scale, causal=right == 0,
        window=None if left < 0 else left + 1, backend="reference",
    )  # fmt: skip


@pytest.fixture(params=["reference", "sdpa", "flex", "varlen"])
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(varlen, "varlen_attn", fake_varlen_attn)
    options = {"compile": False} if request.param == "flex" else {}
    return make_inner_attention(settings_of(request.param, **options))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("causal", "window", "softcap"), [(True, None, None), (True, 4, None), (True, None, 3.0),
                                                           (False, None, None)])  # fmt: skip
def test_computes_packed_attention(attention, kv_heads, causal, window, softcap):
    q, k, v = rows(kv_heads=kv_heads)
    settings = {"scale": 0.3, "causal": causal, "window": window, "softcap": softcap}
    settings |= {"cu_seqlens_q": offsets(Q_LENS), "cu_seqlens_k": offsets(KV_LENS)}
    if isinstance(attention, Varlen) and softcap is not None:
        with pytest.raises(NotImplementedError, match="softcap"):
            attention.packed(q, k, v, **settings)
        return
    expected = attention_packed(q, k, v, **settings, backend="reference")
    torch.testing.assert_close(attention.packed(q, k, v, **settings), expected, **CLOSE)


def test_computes_paged_attention(attention):
    q, k, v = rows()
    page, tables = 4, torch.full((4, 5), 10**6, dtype=torch.int32)  # unused entries mean nothing
    caches = [torch.full((16, page, 2, 16), torch.nan) for _ in range(2)]
    free = iter(torch.randperm(16, generator=torch.Generator().manual_seed(3)).tolist())
    starts = offsets(KV_LENS)
    for b, length in enumerate(KV_LENS):
        for at in range(0, length, page):
            tables[b, at // page] = new = next(free)
            part = slice(int(starts[b]) + at, int(starts[b]) + min(at + page, length))
            for cache, tensor in zip(caches, (k, v), strict=True):
                cache[new, : part.stop - part.start] = tensor[part]
    settings = {"scale": 0.3, "causal": True, "window": None, "softcap": None, "cu_seqlens_q": offsets(Q_LENS)}
    found = attention.paged(q, *caches, **settings, block_tables=tables, kv_lens=torch.tensor(KV_LENS))
    expected = attention_packed(q, k, v, **settings, cu_seqlens_k=starts, backend="reference")
    torch.testing.assert_close(found, expected, **CLOSE)


def test_gradients(attention):
    inputs = [x.requires_grad_() for x in rows()]
    settings = {"scale": 0.3, "causal": True, "window": None, "softcap": None}
    settings |= {"cu_seqlens_q": offsets(Q_LENS), "cu_seqlens_k": offsets(KV_LENS)}
    cotangent = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    if isinstance(attention, Flex):
        with pytest.raises(NotImplementedError, match="backward on CPU"):  # torch's own word; tests/gpu has the rest
            attention.packed(*inputs, **settings)
        return
    found = torch.autograd.grad(attention.packed(*inputs, **settings), inputs, cotangent)
    expected = torch.autograd.grad(attention_packed(*inputs, **settings, backend="reference"), inputs, cotangent)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


def test_what_is_kept_of_a_batch_goes_with_it():
    attention = Flex(compile=False)
    q, k, v = rows()
    settings = {"scale": 0.3, "causal": True, "window": None, "softcap": None}
    cu_q, cu_k = offsets(Q_LENS), offsets(KV_LENS)
    before = attention.packed(q, k, v, **settings, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    cu_k.copy_(offsets((12, 5, 20, 3)))  # the same tensors, other sequences
    after = attention.packed(q, k, v, **settings, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    assert not torch.allclose(before, after)
    kept = len(_BATCHES)
    del cu_q
    gc.collect()
    assert len(_BATCHES) == kept - 1


def test_pages_are_looked_up_where_the_table_says_now():
    """Lengths that stay what they were: another table, the same one rewritten, and other pages."""
    caches = [torch.randn(4, 8, 2, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    settings = {"scale": 0.3, "causal": True, "window": None, "softcap": None, "cu_seqlens_q": offsets((1,))}
    settings["kv_lens"] = torch.tensor([8], dtype=torch.int32)
    q = rows()[0][:1]
    tables = [torch.tensor([[page, 2]], dtype=torch.int32) for page in (0, 1)]
    seen = []
    for table, first_page, page_size in ((0, 0, 8), (1, 1, 8), (1, 1, 4), (1, 1, 8), (1, 3, 8)):
        if tables[table][0, 0] != first_page:
            tables[table][0, 0] = first_page
        paged = [cache.unflatten(1, (-1, page_size)).flatten(0, 1) for cache in caches]
        call = settings | {"block_tables": tables[table]}
        seen.append(Flex(compile=False).paged(q, *paged, **call))
        torch.testing.assert_close(seen[-1], Reference().paged(q, *paged, **call), **CLOSE)
    assert not any(torch.allclose(seen[0], other) for other in seen[1:])


@torch.inference_mode()
def test_inference_tensors_may_be_written_to():
    """They count no writes, so nothing that follows from them is kept."""
    attention = Flex(compile=False)
    q, k, v = rows()
    settings = {"scale": 0.3, "causal": True, "window": None, "softcap": None, "cu_seqlens_q": offsets(Q_LENS)}
    cu_k = offsets(KV_LENS)
    pages = {"kv_lens": torch.tensor([5], dtype=torch.int32), "block_tables": torch.tensor([[1]])}
    caches = [x[:32].unflatten(0, (2, 16)) for x in (k, v)]
    for lengths, kv_len in ((KV_LENS, 5), ((12, 5, 20, 3), 9)):
        cu_k.copy_(offsets(lengths))
        pages["kv_lens"].fill_(kv_len)
        found, expected = (a.packed(q, k, v, **settings, cu_seqlens_k=cu_k) for a in (attention, Reference()))
        torch.testing.assert_close(found, expected, **CLOSE)
        assert torch_attention._longest(cu_k) == max(lengths)
        one = settings | pages | {"cu_seqlens_q": offsets((1,))}
        found, expected = (a.paged(q[:1], *caches, **one) for a in (attention, Reference()))
        torch.testing.assert_close(found, expected, **CLOSE)


@torch.no_grad()
def test_an_aligned_model_runs_on_it(attention, family):
    if isinstance(attention, Varlen):
        attention = Sdpa()  # varlen's own check refuses a CPU
    model = align(tiny_model(family), backend="native", attention=attention)
    plain = align(tiny_model(family), backend="native")
    policies = [Policy(model), Policy(plain)]
    tokens = torch.randint(97, (20,), generator=torch.Generator().manual_seed(0))
    positions, context = torch.cat([torch.arange(12), torch.arange(8)]), PackedContext(offsets((12, 8)))
    found, expected = (policy.hidden(tokens, positions, context) for policy in policies)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert all(m.rlalign_attention == attention for m in model.modules() if hasattr(m, "layer_idx"))


def test_bounds_that_the_caller_knows_are_not_read_from_the_device(monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", fake_varlen_attn)
    q, k, v = rows()
    settings = {"scale": 0.3, "causal": True, "window": None, "softcap": None}
    settings |= {"cu_seqlens_q": offsets(Q_LENS), "cu_seqlens_k": offsets(KV_LENS)}
    expected = Varlen().packed(q, k, v, **settings)
    monkeypatch.setattr(torch_attention, "_longest", lambda cu_seqlens: pytest.fail("the device was asked"))
    found = Varlen().packed(q, k, v, **settings, max_seqlen_q=max(Q_LENS), max_seqlen_k=max(KV_LENS))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("max_seqlen", [None, 12, 500])
@torch.no_grad()
def test_a_context_hands_its_bound_to_every_layer(max_seqlen):
    seen = []

    class Recording(Reference):
        def packed(self, *tensors, **settings):
            seen.append((settings["max_seqlen_q"], settings["max_seqlen_k"]))
            return super().packed(*tensors, **settings)

    policies = [Policy(align(tiny_model("llama"), backend="reference", attention=a)) for a in (Recording(), None)]
    tokens, positions = torch.arange(20), torch.cat([torch.arange(12), torch.arange(8)])
    seen.clear()  # of the policy's own probes
    found = policies[0].hidden(tokens, positions, PackedContext(offsets((12, 8)), max_seqlen))
    assert seen == [(max_seqlen, max_seqlen)] * len(policies[0].kv_layout)
    assert torch.equal(found, policies[1].hidden(tokens, positions, PackedContext(offsets((12, 8)))))


def test_what_operators_come_with():
    assert [default_attention(name) for name in ("triton", "reference", "native")] == [Invariant(), Reference(), Sdpa()]
    with pytest.raises(ValueError, match="'fast'"):
        default_attention("fast")


def test_only_invariant_attention_beside_invariant_operators(tmp_path):
    for name in NAMES:
        attention = make_inner_attention(settings_of(name))
        refuse_contradiction(attention, "native")
        if name in ("invariant", "reference"):
            refuse_contradiction(attention, "invariant")
        else:
            with pytest.raises(ValueError, match=rf"attention={type(attention).__name__}: .*numerics=invariant"):
                refuse_contradiction(attention, "invariant")
    with pytest.raises(ValueError, match="attention=Sdpa"):
        align(tiny_model("llama"), backend="reference", attention=Sdpa())
    save_checkpoint(tiny_model("llama"), None, tmp_path)
    with pytest.raises(ValueError, match="attention=Flex"):
        load_policy(tmp_path, attention=Flex())
    assert load_policy(tmp_path, numerics="native", attention=Flex(compile=False)).backend == "native"


def test_exact_attention_passes_the_audit():
    assert audit(align(tiny_model("llama"), backend="reference", attention=Reference())).exact
    cheating = type("Cheating", (Sdpa,), {"invariant": True, "packed": lambda self, q, k, v, **_: q.softmax(-1)})
    with pytest.raises(ValueError, match="_softmax"):
        audit(align(tiny_model("llama"), backend="reference", attention=cheating()))


@pytest.mark.parametrize("name", NAMES)
def test_yaml_mirrors_the_dataclass(name):
    settings = settings_of(name)
    attention = make_inner_attention(settings)
    assert attention == type(attention)()
    assert {field.name for field in fields(attention)} | {"_target_"} == settings.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (settings_of("flex", block=1), "block"),
        (settings_of("flex", kernel_options={"BLOCK": 1}), "'BLOCK' is unknown"),
        (settings_of("flex", block_size=0), "block_size=0 is not supported"),
        (settings_of("flex", block_size="wide"), "block_size"),
        (settings_of("reference", dropout=0.1), "dropout"),
        ({"_target_": "rlalign.modeling.inner_attention.Fast"}, "Fast"),
        ({"_target_": "no.such.module.Fast"}, "no.such"),
        ({"_target_": "Fast"}, "Fast"),
        ({"_target_": "torch.nn.Linear"}, "'check'"),
        ({}, "_target_"),
    ],
)
def test_unknown_options_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        make_inner_attention(settings)


def test_what_they_cannot_do_is_refused():
    q, k, v = rows()
    settings = {"scale": 0.3, "causal": True, "window": None, "cu_seqlens_q": offsets(Q_LENS)}
    settings |= {"cu_seqlens_k": offsets(KV_LENS)}
    with pytest.raises(NotImplementedError, match=r"softcap=3\.0"):
        Varlen().packed(q, k, v, **settings, softcap=3.0)
    with pytest.raises(NotImplementedError, match="value_dim=8"):
        Varlen().packed(q, k, v[..., :8], **settings, softcap=None)
    for device, dtype in (("cpu", torch.bfloat16), ("cuda", torch.float32)):
        with pytest.raises(ValueError, match="attention=varlen"):
            Varlen().check(torch.device(device), dtype)
    with pytest.raises(ValueError, match="varlen"):
        align(tiny_model("llama"), backend="native", attention=Varlen())


def test_triton_is_refused_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="attention=reference"):
        Invariant().check(torch.device("cpu"), torch.float32)
    Invariant().check(torch.device("cuda"), torch.float32)


def test_invariant_is_the_triton_operator():
    """On a GPU or in Triton's interpreter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = (x.to(device) for x in rows(q_heads=2, kv_heads=1))
    settings = {"scale": 0.3, "causal": True, "window": None, "softcap": None}
    lengths = {"cu_seqlens_q": offsets(Q_LENS).to(device), "cu_seqlens_k": offsets(KV_LENS).to(device)}
    found = Invariant().packed(q, k, v, **settings, **lengths)
    assert torch.equal(found, attention_packed(q, k, v, **settings, **lengths, backend="triton"))
