"""``audit(model)``: what does an aligned model still compute outside our operators?

A probe forward runs under a dispatch mode. Operators of ours are opaque; outside them only data movement and
element-wise arithmetic that IEEE 754 rounds exactly may happen. Anything else, a reduction, a matrix product or a
transcendental function, could round differently in another batch, and is refused by operator and module path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rlalign_kernels import running_operator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from rlalign.modeling.align import HOW_NATIVE
from rlalign.modeling.context import PackedContext
from rlalign.modeling.layers import AlignedGELU, AlignedModule, AlignedSiLU

# Exact whatever the layout: correctly rounded arithmetic, comparisons and data movement.
_EXACT = frozenset(
    """
    add sub rsub mul div neg abs sqrt reciprocal maximum minimum clamp where masked_fill
    eq ne lt le gt ge logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not any all
    embedding index index_select gather arange zeros ones full empty zeros_like ones_like full_like empty_like
    new_zeros new_ones new_empty scalar_tensor lift_fresh
    clone copy _to_copy to contiguous detach alias cat stack chunk split split_with_sizes slice select narrow
    view _unsafe_view reshape expand permute transpose t unsqueeze squeeze flatten unflatten repeat unbind
    constant_pad_nd lift_fresh_copy _local_scalar_dense copy_ add_ mul_ clamp_ zero_ fill_ as_strided
    """.split()
)


class AuditError(ValueError):
    """The model computes something that is not invariant; the message names operator and module."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One operator outside ours: its name, the innermost module that called it, how often."""

    operator: str
    module: str
    count: int

    def __str__(self) -> str:
        return f"{self.operator} in {self.module or 'the model itself'} ({self.count}x)"


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What the probe forward met. ``aligned``: our modules by class name; ``findings``: refused operators."""

    aligned: dict[str, int]
    findings: tuple[Finding, ...]

    @property
    def exact(self) -> bool:
        return not self.findings


class _Watch(TorchDispatchMode):
    """Counts inexact operators outside ours, under the module that is running."""

    def __init__(self) -> None:
        super().__init__()
        self.path: list[str] = []
        self.seen: dict[tuple[str, str], int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if running_operator() is None and name not in _EXACT:
            key = (f"{func.namespace}.{name}", self.path[-1] if self.path else "")
            self.seen[key] = self.seen.get(key, 0) + 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _tracked(model: nn.Module, path: list[str]) -> Iterator[None]:
    """Keep the names of the running modules on ``path``, for the time of one probe."""
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, AlignedSiLU | AlignedGELU):
            continue  # one operator of ours; hooked, it would be computed apart from the gate's product
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: path.append(name), prepend=True))
        handles.append(module.register_forward_hook(lambda *_: path.pop() and None))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def audit(model: PreTrainedModel, *, strict: bool = True) -> AuditReport:
    """Probe an aligned model's decoder with two short packed sequences.

    Returns what was met; with ``strict`` raises AuditError if anything was not exact. The output head is not run:
    log-probs come from ``linear_logprob`` alone, and ``Policy`` checks that they are the model's own.
    """
    watch = _Watch()
    device = model.get_input_embeddings().weight.device
    lengths = (5, 3)
    context = PackedContext(torch.tensor([0, 5, 8], dtype=torch.int32, device=device))
    positions = torch.cat([torch.arange(n, device=device) for n in lengths]).unsqueeze(0)
    tokens = torch.arange(sum(lengths), device=device).unsqueeze(0) % model.config.vocab_size
    with _tracked(model, watch.path), watch:
        model.base_model(input_ids=tokens, position_ids=positions, attention_context=context, use_cache=False)
    findings = tuple(Finding(operator, module, count) for (operator, module), count in sorted(watch.seen.items()))
    report = AuditReport(_count_aligned(model), findings)
    if strict and findings:
        raise AuditError(_why_not(model, findings))
    return report


def _why_not(model: nn.Module, findings: Sequence[Finding]) -> str:
    """The refusal: what was found, in mixtures of experts and elsewhere, and what to do."""
    blocks = [_mixture_around(model, finding.module) for finding in findings]
    inside = [finding for finding, block in zip(findings, blocks, strict=True) if block is not None]
    outside = [finding for finding, block in zip(findings, blocks, strict=True) if block is None]
    parts, advice = [], f"numerics=native takes mixtures whose every layer has attention {HOW_NATIVE}"
    if inside:
        parts.append(
            f"{next(filter(None, blocks))} is a mixture of experts, whose router and experts none of our operators "
            f"computes ({_first(inside)})"
        )
    if outside:
        parts.append(_first(outside))
    if not inside:
        advice = f"Try numerics=native {HOW_NATIVE}, or map the module in rlalign/modeling/align.py"
    return f"{type(model).__name__} is not exact: {'; elsewhere '.join(parts)}. {advice}"


def _first(findings: Sequence[Finding]) -> str:
    return f"{findings[0]}" + (f", and {len(findings) - 1} more" if len(findings) > 1 else "")


def _mixture_around(model: nn.Module, path: str) -> str | None:
    """The innermost mixture of experts that the module at ``path`` is, or lies in; None outside of one."""
    while path:
        module = model.get_submodule(path)
        # the kind: of JetMoE's, which holds its experts without a module named so
        if "experts" in module._modules or type(module).__name__.endswith("MoE"):
            return path
        path = path.rpartition(".")[0]
    return None


def _count_aligned(model: nn.Module) -> dict[str, int]:
    counts: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, AlignedModule):
            kind = type(module).__name__
            counts[kind] = counts.get(kind, 0) + 1
    return counts
