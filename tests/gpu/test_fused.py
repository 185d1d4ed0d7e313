"""Fused projections against separate ones on the triton backend: the same 32 bits, for any number of rows."""

from __future__ import annotations

import pytest
import torch
from support.models import FAMILIES, tiny_model
from support_qwen import DEVICE, random_qwen

from rlalign.modeling import PackedContext, Policy, align
from rlalign.modeling.layers import AlignedLinear


@torch.no_grad()
def same_bits(fused: Policy, plain: Policy, lengths: tuple[int, ...]) -> None:
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(len(lengths))
    tokens = torch.randint(plain.vocab_size, (sum(lengths),), generator=generator, device=DEVICE)
    positions = torch.cat([torch.arange(n, device=DEVICE) for n in lengths])
    ours, theirs = (p.hidden(tokens, positions, PackedContext(starts, max(lengths))) for p in (fused, plain))
    assert torch.isfinite(ours).all() and ours.abs().max() > 0
    integer = torch.int32 if ours.dtype == torch.float32 else torch.int16
    assert torch.equal(ours.view(integer), theirs.view(integer)), lengths


def test_a_qwen_has_the_bits_of_separate_projections():
    fused, plain = (random_qwen("0.6B", 2) for _ in range(2))
    fused.fuse_projections()
    assert sum(m.rlalign_fused is not None for m in fused.model.modules() if isinstance(m, AlignedLinear)) == 10
    for lengths in ((1,), (3,), (1,) * 16, (17,), (60, 4), (65, 63), (200, 57), (1024,), (900, 1200, 13)):
        same_bits(fused, plain, lengths)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_bits_of_separate_projections(family, dtype):
    fused, plain = (Policy(align(tiny_model(family, dtype).to(DEVICE))) for _ in range(2))
    fused.fuse_projections()
    for lengths in ((1,), (5, 12), (100, 200, 1)):
        same_bits(fused, plain, lengths)
