"""The start-up probe: once a policy exists, no forward of its model measures anything."""

from __future__ import annotations

import pytest
import torch
from rlalign_kernels import CONFORMANCE, SamplingRows
from support.models import tiny_model

from rlalign.modeling import PackedContext, Policy, align


def _packed(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, PackedContext]:
    positions = torch.cat([torch.arange(length) for length in lengths])
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return positions % 7, positions, PackedContext(cu_seqlens)


@torch.no_grad()
def test_every_operator_is_measured_before_the_first_token() -> None:
    CONFORMANCE.clear()
    policy = Policy(align(tiny_model("qwen3"), backend="reference"))
    measured = set(CONFORMANCE.report())
    assert {name.split(",")[0] for name in measured} == {"elementwise", "gemm", "bmm", "bmm bases"}
    for lengths in ([1], [1] * 30, [3, 20, 40, 70, 1]):
        hidden = policy.hidden(*_packed(lengths))
        count = len(hidden)
        rows = SamplingRows(
            torch.full((count,), 0.7), torch.full((count,), 3), torch.full((count,), 0.9), torch.full((count,), 0.1)
        )
        drawn = policy.sample(hidden, rows, torch.arange(count), torch.arange(count))
        policy.logprobs(hidden, drawn.token, rows)
    assert set(CONFORMANCE.report()) == measured


def test_norms_of_both_kinds_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, tuple[int, ...]]] = []
    monkeypatch.setattr("rlalign.modeling.policy.probe", asked.extend)
    for family in ("qwen3", "phi", "olmo"):
        asked.clear()
        Policy(align(tiny_model(family), backend="reference"))
        sizes = {size for operator, (size, *_) in asked if operator == "rms_norm"}
        assert sizes == {"qwen3": {64, 32}, "phi": {64, 16}, "olmo": {64}}[family]
