"""Every module's output of two policies on the same tokens, in pairs, a few sites at a time.

Hooks hand out what modules return; a context around the forward's own hands out what attention gets and gives. Both
sides run once per window of sites that fits in the memory allowed. Legend: T rows of a forward, N tokens, F features.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from rlalign.cli.forwards import PADDING, Feed, Forward, forwards
from rlalign.modeling import AttentionCall, AttentionContext, Policy
from rlalign.verifier.bisect import Recording, Site, Tokens
from rlalign.verifier.score import ScoreSettings

# (module path, operator, how often it was called before in this forward)
Key = tuple[str, str, int]
Observer = Callable[[str, str, Sequence[Tensor]], None]
Head = Callable[[Policy, Tensor, Tensor, ScoreSettings], Tensor]
_OPERATORS = (
    ("Embedding", "embedding"), ("RotaryEmbedding", "rotary tables"), ("Linear", "linear"), ("Norm", "norm"),
    ("SiLU", "silu"), ("GELU", "gelu"),
)  # fmt: skip
_LAYER = re.compile(r"\.(\d+)(?:\.|$)")


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two: a policy whose operators are already those of ``settings``, and what it is fed."""

    policy: Policy
    feeds: Sequence[Feed]
    settings: ScoreSettings

    def forwards(self, max_rows: int) -> Iterator[Forward]:
        return forwards(self.policy, self.feeds, self.settings, max_rows)


@dataclass(frozen=True, slots=True)
class Survey:
    """What one forward of a model hands out. sites: (key, features) in the model's order. skipped: outputs that have no
    row per token, and so can't be compared token by token."""

    sites: tuple[tuple[Key, int], ...]
    skipped: tuple[str, ...]


class _Enough(Exception):
    """The window's last site was seen: the rest of this forward is of no use."""


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
    observe: Observer
    names: dict[int, str]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: AttentionCall) -> Tensor:
        name = self.names[call.layer]
        self.observe(name, "rotary query", [query])
        self.observe(name, "rotary key", [key])
        output = self.inner.attend(query, key, value, call)
        self.observe(name, "attention", [output])
        return output


def tokens_of(feeds: Sequence[Feed]) -> Tokens:
    """Sequence, position and id of every canonical row."""
    kept = [feed.canonical for feed in feeds]
    return Tokens(
        sequence=np.repeat(np.arange(len(feeds)), [int(mask.sum()) for mask in kept]),
        position=np.concatenate([np.arange(int(mask.sum())) for mask in kept]),
        token_id=np.concatenate([feed.token_ids[mask] for feed, mask in zip(feeds, kept, strict=True)]),
    )


def recorded_pairs(
    a: Side, b: Side, targets: np.ndarray, head: Head, *, max_bytes: int, max_rows: int
) -> Iterator[tuple[Recording, Recording]]:
    """Pairs of recordings in the model's order, the log-prob of ``targets`` int64 [N] last.

    max_bytes: of one window's recordings; a site larger than that is a window of its own. Raises ValueError if the two
    models do not have the same modules.
    """
    plan = survey(a, max_rows)
    _refuse_other_modules(plan, survey(b, max_rows))
    num_tokens = len(targets)
    for window in _windows(plan, num_tokens, max_bytes):
        last = window.stop == len(plan.sites)
        sides = [_record(side, plan, window, num_tokens, max_rows) for side in (a, b)]
        for order in range(window.start, window.stop):
            key = plan.sites[order][0]
            yield tuple(_recording(order, key, *records.pop(key)) for records, _ in sides)  # type: ignore[misc]
        if last:
            values = [_logprobs(side, hidden, targets, head) for side, (_, hidden) in zip((a, b), sides, strict=True)]
            site = Site(len(plan.sites), None, "log-prob", "head")
            yield tuple(Recording(site, value) for value in values)  # type: ignore[misc]


@torch.no_grad()
def survey(side: Side, max_rows: int) -> Survey:
    """Sites of a model, from its first forward."""
    forward = next(side.forwards(max_rows))
    watch, sites, skipped = _Watch(), [], []

    def observe(module: str, operator: str, outputs: Sequence[Tensor]) -> None:
        key = watch.key(module, operator)
        rows = _per_token(outputs, len(forward.rows))
        if rows is None:
            skipped.append(f"{module} ({operator})")
        else:
            sites.append((key, rows.shape[1]))

    with _observed(side.policy, observe) as names:
        _run(side.policy, forward, observe, names)
    return Survey(tuple(sites), tuple(skipped))


def _windows(plan: Survey, num_tokens: int, max_bytes: int) -> Iterator[range]:
    start, total = 0, 0
    for index, (_, features) in enumerate(plan.sites):
        size = 2 * 4 * num_tokens * features
        if index > start and total + size > max_bytes:
            yield range(start, index)
            start, total = index, 0
        total += size
    yield range(start, len(plan.sites))


@torch.no_grad()
def _record(
    side: Side, plan: Survey, window: range, num_tokens: int, max_rows: int
) -> tuple[dict[Key, tuple[np.ndarray, str]], Tensor | None]:
    """Values float32 [N, F] and dtype of the window's sites, and the last hidden states where it reaches the end."""
    wanted = {plan.sites[index][0] for index in window}
    last = None if window.stop == len(plan.sites) else plan.sites[window.stop - 1][0]
    dtypes = dict.fromkeys(wanted, "float32")
    arrays = {key: np.empty((num_tokens, features), np.float32) for key, features in plan.sites if key in wanted}
    hidden: Tensor | None = None
    for forward in side.forwards(max_rows):
        watch, kept = _Watch(), forward.rows != PADDING

        def observe(
            module: str, operator: str, outputs: Sequence[Tensor], watch=watch, kept=kept, forward=forward
        ) -> None:
            key = watch.key(module, operator)
            if key in wanted:
                rows = _per_token(outputs, len(forward.rows))
                if rows is None or rows.shape[1] != arrays[key].shape[1]:
                    raise ValueError(f"{module} ({operator}): another shape than in the first forward")
                dtypes[key] = str(rows.dtype).removeprefix("torch.")
                arrays[key][forward.rows[kept]] = rows.float().cpu().numpy()[kept]
            if key == last:
                raise _Enough

        with _observed(side.policy, observe) as names:
            output = _run(side.policy, forward, observe, names)
        if output is not None:
            if hidden is None:
                hidden = output.new_empty(num_tokens, output.shape[1])
            hidden[torch.from_numpy(forward.rows[kept])] = output[torch.from_numpy(kept)]
    return {key: (arrays[key], dtypes[key]) for key in arrays}, hidden


def _run(policy: Policy, forward: Forward, observe: Observer, names: dict[int, str]) -> Tensor | None:
    """Last hidden states [T, H]; None if the observer had seen enough before."""
    try:
        return policy.hidden(forward.token_ids, forward.position_ids, _Heard(forward.context, observe, names))
    except _Enough:
        return None


@contextmanager
def _observed(policy: Policy, observe: Observer) -> Iterator[dict[int, str]]:
    """Hooks on the modules for the time of one forward. Yields the attention modules' names by layer."""
    handles, names = [], {}
    for name, module in policy.model.named_modules():
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


def _hook(name: str, operator: str, observe: Observer) -> Callable[[nn.Module, object, object], None]:
    def hook(_module: nn.Module, _args: object, output: object) -> None:
        outputs = list(output) if isinstance(output, tuple) else [output]
        # a layer may return more than what it hands on
        observe(name, operator, outputs[:1] if operator == "residual sum" else outputs)

    return hook


def _operator(name: str, module: nn.Module) -> str | None:
    """What a module computes, by its kind; None for those that only hold others."""
    if re.search(r"\.\d+$", name) and any(True for _ in module.children()):
        return "residual sum"
    if any(True for _ in module.children()):
        return None
    kind = type(module).__name__
    return next((operator for part, operator in reversed(_OPERATORS) if part in kind), kind.lower())


def _per_token(outputs: Sequence[object], num_rows: int) -> Tensor | None:
    """[T, F] of a module's outputs [1, T, …] or [T, …], several side by side; None if they have another shape."""
    parts = []
    for output in outputs:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        if output.dim() >= 2 and output.shape[0] == 1 and output.shape[1] == num_rows:
            output = output[0]
        elif output.dim() == 4 and output.shape[0] == 1 and output.shape[2] == num_rows:
            output = output[0].transpose(0, 1)
        elif output.dim() < 2 or output.shape[0] != num_rows:
            return None
        parts.append(output.reshape(num_rows, -1))
    return torch.cat(parts, dim=1) if parts else None


def _recording(order: int, key: Key, values: np.ndarray, dtype: str) -> Recording:
    module, operator, count = key
    found = _LAYER.search(module)
    name = module if count == 0 else f"{module} (call {count + 1})"
    return Recording(Site(order, int(found[1]) if found else None, name, operator), values, dtype)


def _logprobs(side: Side, hidden: Tensor | None, targets: np.ndarray, head: Head) -> np.ndarray:
    if hidden is None:
        raise RuntimeError("the last window ended before the last hidden states")
    ids = torch.from_numpy(targets).to(hidden.device)
    return head(side.policy, hidden, ids, side.settings).cpu().numpy().reshape(-1, 1)


def _refuse_other_modules(a: Survey, b: Survey) -> None:
    if a.sites != b.sites:
        only = set(a.sites) ^ set(b.sites)
        (module, operator, _), features = sorted(only)[0] if only else a.sites[0]
        raise ValueError(
            f"the two sides do not have the same modules in the same order: {module} ({operator}, {features} features) "
            "is not on both; bisect compares two settings of one architecture"
        )
