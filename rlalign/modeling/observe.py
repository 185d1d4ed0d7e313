"""Every module's output of one forward, handed to an observer as it is computed.

Hooks hand out what modules return; a context around the forward's own hands out what attention gets and gives. Which
axis of an output the rows are on is the model's affair (Gemma-3 normalises heads after it has moved them before the
rows), so it is found out once, by ``layouts``. Legend: T rows of a forward, F features.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor, nn

from rlalign.modeling.context import AttentionCall, AttentionContext, PackedContext
from rlalign.modeling.feeds import Forward
from rlalign.modeling.policy import Policy

# (module path, operator, how often it was called before in this forward)
Key = tuple[str, str, int]
Observer = Callable[[Key, Sequence[object]], None]
_Raw = Callable[[str, str, Sequence[object]], None]
_PROBES = (2, 3)
_OPERATORS = (
    ("Embedding", "embedding"), ("RotaryEmbedding", "rotary tables"), ("Linear", "linear"), ("Norm", "norm"),
    ("SiLU", "silu"), ("GELU", "gelu"), ("Router", "router"),
)  # fmt: skip
_EXPERTS = ".experts"
_LAYER = re.compile(r"\.(\d+)(?:\.|$)")


class Enough(Exception):
    """Raised by an observer that has seen what it wants: the rest of the forward is of no use."""


@dataclass(slots=True)
class _Watch:
    """Counts calls within a forward, so that a module that runs twice makes two sites."""

    seen: dict[tuple[str, str], int] = field(default_factory=dict)

    def key(self, module: str, operator: str) -> Key:
        count = self.seen.get((module, operator), 0)
        self.seen[module, operator] = count + 1
        return (module, operator, count)


@dataclass(slots=True)
class _Heard:
    """A context that tells what attention gets and gives."""

    inner: AttentionContext
    observe: _Raw
    names: dict[int, str]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        name = self.names[call.layer]
        self.observe(name, "rotary query", [query])
        self.observe(name, "rotary key", [key])
        output = self.inner.attend(query, key, value, call)
        self.observe(name, "attention", [output])
        return output


@torch.no_grad()
def observed_hidden(policy: Policy, forward: Forward, observe: Observer) -> Tensor | None:
    """Last hidden states [T, H]; None if the observer had seen enough before. ``observe`` gets every output in order.

    A module that runs twice in a forward makes two sites.
    """
    watch = _Watch()

    def numbered(module: str, operator: str, outputs: Sequence[object]) -> None:
        observe(watch.key(module, operator), outputs)

    with _hooked(policy, numbered) as names:
        try:
            context = _Heard(forward.context, numbered, names)
            return policy.hidden(forward.token_ids, forward.position_ids, context)
        except Enough:
            return None


def layer_of(module: str) -> int | None:
    """The decoder layer that a module path lies in; None outside of them."""
    found = _LAYER.search(module)
    return int(found[1]) if found else None


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the rows of a module's outputs are: the axis of each, and how many features they have together."""

    axes: tuple[int, ...]
    features: int


def layouts(policy: Policy) -> dict[Key, Layout | None]:
    """Of every output that a forward hands out, in order; None for those that have no row per token.

    Found by two small forwards: the rows are on the axis that grows with them. The size of one axis would not tell them
    from heads, of which there may be as many.
    """
    small, large = (_shapes(policy, num_rows) for num_rows in _PROBES)
    return {key: _layout(shapes, large.get(key, ())) for key, shapes in small.items()}


def per_token(outputs: Sequence[object], layout: Layout | None, num_rows: int) -> Tensor | None:
    """[T, F] of a module's outputs, several side by side; None if they don't have ``layout``."""
    if layout is None or len(outputs) != len(layout.axes):
        return None
    parts = []
    for output, axis in zip(outputs, layout.axes, strict=True):
        if not isinstance(output, Tensor) or output.dim() <= axis or output.shape[axis] != num_rows:
            return None
        parts.append(output.movedim(axis, 0).reshape(num_rows, -1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _shapes(policy: Policy, num_rows: int) -> dict[Key, tuple[tuple[int, ...], ...]]:
    """Of every output of a forward over that many rows; () in place of what is no tensor of floats."""
    found: dict[Key, tuple[tuple[int, ...], ...]] = {}

    def observe(key: Key, outputs: Sequence[object]) -> None:
        found[key] = tuple(
            tuple(output.shape) if isinstance(output, Tensor) and output.is_floating_point() else ()
            for output in outputs
        )

    ids = torch.zeros(num_rows, dtype=torch.int64, device=policy.device)
    positions = torch.arange(num_rows, device=policy.device)
    context = PackedContext(torch.tensor([0, num_rows], dtype=torch.int32, device=policy.device), num_rows)
    observed_hidden(policy, Forward(ids, positions, context, np.arange(num_rows)), observe)
    return found


def _layout(small: Sequence[Sequence[int]], large: Sequence[Sequence[int]]) -> Layout | None:
    axes = []
    for shapes in zip_longest(small, large, fillvalue=()):
        changed = [(axis, sizes) for axis, sizes in enumerate(zip_longest(*shapes)) if sizes[0] != sizes[1]]
        if len(changed) != 1 or changed[0][1] != _PROBES:
            return None
        axes.append(changed[0][0])
    features = sum(math.prod(shape) // _PROBES[0] for shape in small)
    return Layout(tuple(axes), features) if axes else None


@contextmanager
def _hooked(policy: Policy, observe: _Raw) -> Iterator[dict[int, str]]:
    """Hooks on the modules for the time of one forward. Yields the attention modules' names by layer."""
    handles, names = [], {}
    for name, module in policy.model.named_modules():
        if _EXPERTS + "." in name:
            continue  # a row there is a token at one of its experts, in an order that depends on the others
        if isinstance(getattr(module, "layer_idx", None), int):
            names[module.layer_idx] = name
        operator = _operator(name, module)
        if operator is not None:
            handles.append(module.register_forward_hook(_hook(name, operator, observe)))
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


def _hook(name: str, operator: str, observe: _Raw) -> Callable[[nn.Module, object, object], None]:
    def hook(_module: nn.Module, _args: object, output: object) -> None:
        outputs = list(output) if isinstance(output, tuple) else [output]
        # a layer may return more than what it hands on
        outputs = outputs[:1] if operator == "residual sum" else outputs
        # a router returns the numbers of the chosen experts beside their weights
        floats = [each for each in outputs if isinstance(each, Tensor) and each.is_floating_point()]
        observe(name, operator, floats or outputs)

    return hook


def _operator(name: str, module: nn.Module) -> str | None:
    """What a module computes, by its kind; None for those that only hold others."""
    if name.endswith(_EXPERTS):
        return "experts"
    if re.search(r"\.\d+$", name) and any(True for _ in module.children()):
        return "residual sum"
    if any(True for _ in module.children()):
        return None
    kind = type(module).__name__
    return next((operator for part, operator in reversed(_OPERATORS) if part in kind), kind.lower())
