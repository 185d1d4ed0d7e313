"""Every module's output of two policies on the same tokens, in pairs, a few sites at a time.

Both sides run once per window of sites that fits in the memory allowed; rlalign/modeling/observe.py says what a site
is. Legend: T rows of a forward, N tokens, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlalign.cli.forwards import forwards
from rlalign.modeling import Policy
from rlalign.modeling.feeds import PADDING, Feed, Forward
from rlalign.modeling.observe import Enough, Key, Layout, layer_of, layouts, observed_hidden, per_token
from rlalign.verifier.bisect import Recording, Site, Tokens
from rlalign.verifier.score import ScoreSettings

Head = Callable[[Policy, Tensor, Tensor, ScoreSettings], Tensor]


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
    """What one forward of a model hands out. sites: keys and where their rows are, in the model's order. skipped:
    outputs that have no row per token, and so can't be compared token by token."""

    sites: tuple[tuple[Key, Layout], ...]
    skipped: tuple[str, ...]


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
    plan = survey(a.policy)
    _refuse_other_modules(plan, survey(b.policy))
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


def survey(policy: Policy) -> Survey:
    """Sites of a model."""
    found = layouts(policy)
    sites = tuple((key, layout) for key, layout in found.items() if layout is not None)
    return Survey(sites, tuple(f"{key[0]} ({key[1]})" for key, layout in found.items() if layout is None))


def _windows(plan: Survey, num_tokens: int, max_bytes: int) -> Iterator[range]:
    start, total = 0, 0
    for index, (_, layout) in enumerate(plan.sites):
        size = 2 * 4 * num_tokens * layout.features
        if index > start and total + size > max_bytes:
            yield range(start, index)
            start, total = index, 0
        total += size
    yield range(start, len(plan.sites))


def _record(
    side: Side, plan: Survey, window: range, num_tokens: int, max_rows: int
) -> tuple[dict[Key, tuple[np.ndarray, str]], Tensor | None]:
    """Values float32 [N, F] and dtype of the window's sites, and the last hidden states where it reaches the end."""
    wanted = dict(plan.sites[index] for index in window)
    last = None if window.stop == len(plan.sites) else plan.sites[window.stop - 1][0]
    dtypes = dict.fromkeys(wanted, "float32")
    arrays = {key: np.empty((num_tokens, layout.features), np.float32) for key, layout in wanted.items()}
    hidden: Tensor | None = None
    for forward in side.forwards(max_rows):
        kept = forward.rows != PADDING

        def observe(key: Key, outputs: Sequence[object], kept=kept, forward=forward) -> None:
            if key in wanted:
                rows = per_token(outputs, wanted[key], len(forward.rows))
                if rows is None or rows.shape[1] != wanted[key].features:
                    raise ValueError(f"{key[0]} ({key[1]}): another shape than in the first forward")
                dtypes[key] = str(rows.dtype).removeprefix("torch.")
                arrays[key][forward.rows[kept]] = rows.float().cpu().numpy()[kept]
            if key == last:
                raise Enough

        output = observed_hidden(side.policy, forward, observe)
        if output is not None:
            if hidden is None:
                hidden = output.new_empty(num_tokens, output.shape[1])
            hidden[torch.from_numpy(forward.rows[kept])] = output[torch.from_numpy(kept)]
    return {key: (arrays[key], dtypes[key]) for key in arrays}, hidden


def _recording(order: int, key: Key, values: np.ndarray, dtype: str) -> Recording:
    return Recording(Site.of(order, *key, layer_of(key[0])), values, dtype)


@torch.no_grad()
def _logprobs(side: Side, hidden: Tensor | None, targets: np.ndarray, head: Head) -> np.ndarray:
    if hidden is None:
        raise RuntimeError("the last window ended before the last hidden states")
    ids = torch.from_numpy(targets).to(hidden.device)
    return head(side.policy, hidden, ids, side.settings).cpu().numpy().reshape(-1, 1)


def _refuse_other_modules(a: Survey, b: Survey) -> None:
    if a.sites != b.sites:
        only = set(a.sites) ^ set(b.sites)
        (module, operator, _), layout = min(only, key=lambda site: site[0]) if only else a.sites[0]
        what = f"{module} ({operator}, {layout.features} features)"
        raise ValueError(
            f"the two sides do not have the same modules in the same order: {what} is not on both; bisect compares two "
            "settings of one architecture"
        )
