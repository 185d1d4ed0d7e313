"""One side of the checks that a run makes now and then (rlalign/verifier/periodic.py), beside a policy.

The rollout's side runs excerpts as its engine does: the prompt in chunks, the response token by token, against pages
of a cache of its own. The trainer's runs whole sequences, packed. What leaves a process is a digest per row, and
numbers of the few rows that are asked for. Legend: T rows, N response tokens, F features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
import torch
from rlalign_kernels import linear
from torch import Tensor

from rlalign.config import EngineConfig
from rlalign.modeling import Policy
from rlalign.modeling.feeds import Feed, Forward, canonical_rows, packed_forward, paged_forwards
from rlalign.modeling.observe import Key, Layout, layer_of, layouts, observed_hidden, per_token
from rlalign.verifier.bisect import Recording, Site
from rlalign.verifier.periodic import Excerpt, SiteDigests

What = Literal["logit_digests", "logits_at", "site_digests", "site_values"]
Forwards = Callable[[Policy, Sequence[Feed]], Iterator[Forward]]
# elements of one block: of logits in float32, or of bits as 64-bit integers
_BLOCK = 1 << 24
_WIDTH = 1 << 14


@dataclass(frozen=True)
class Inspector:
    """A ``verifier.periodic.Inspects`` over a policy. forwards: how this side runs sequences."""

    policy: Policy
    forwards: Forwards

    @cached_property
    def layouts(self) -> dict[Key, Layout | None]:
        """``observe.layouts`` of the policy; two forwards, once."""
        return layouts(self.policy)

    @torch.no_grad()
    def logit_digests(self, excerpts: Sequence[Excerpt]) -> np.ndarray:
        """int64 [N]; of logits that the output head sums in float32, whatever the model's dtype."""
        hidden = self._response_hidden(excerpts)
        parts = [digest(self._logits(part)) for part in hidden.split(max(1, _BLOCK // self.policy.vocab_size))]
        return torch.cat(parts).cpu().numpy()

    @torch.no_grad()
    def logits_at(self, excerpts: Sequence[Excerpt], places: Sequence[int]) -> np.ndarray:
        """float32 [len(places), V]."""
        # all rows of the forward and its head, as for the digests: ordinary operators depend on what is beside a row
        hidden = self._response_hidden(excerpts)
        step, wanted = max(1, _BLOCK // self.policy.vocab_size), torch.tensor(places, device=hidden.device)
        parts = []
        for start in range(0, len(hidden), step):
            inside = wanted[(wanted >= start) & (wanted < start + step)]
            if len(inside):
                parts.append(self._logits(hidden[start : start + step])[inside - start].cpu())
        return torch.cat(parts).numpy()

    def site_digests(self, excerpts: Sequence[Excerpt]) -> SiteDigests:
        """Of every output that has a row per token."""
        feeds = _feeds(excerpts)
        num_rows, layout_of = sum(feed.num_rows for feed in feeds), self.layouts
        digests: dict[Key, np.ndarray] = {}
        for forward in self.forwards(self.policy, feeds):
            found: dict[Key, Tensor] = {}

            def observe(key: Key, outputs: Sequence[object], forward=forward, found=found) -> None:
                rows = per_token(outputs, layout_of.get(key), len(forward.rows))
                if rows is not None:
                    found[key] = digest(rows)

            observed_hidden(self.policy, forward, observe)
            for key, rows in zip(found, torch.stack(list(found.values())).cpu().numpy(), strict=True):
                digests.setdefault(key, np.zeros(num_rows, np.int64))[forward.rows] = rows
        sites = tuple(Site.of(order, *key, layer_of(key[0])) for order, key in enumerate(digests))
        return SiteDigests(sites, np.stack(list(digests.values())))

    def site_values(self, excerpts: Sequence[Excerpt], orders: Sequence[int], rows: Sequence[int]) -> list[Recording]:
        """Recordings of ``orders`` (ascending), with a row for each of ``rows`` (ascending)."""
        found: dict[int, list[np.ndarray]] = {order: [] for order in orders}
        kinds: dict[int, tuple[Key, str]] = {}
        seen: list[int] = []
        layout_of = self.layouts
        for forward in self.forwards(self.policy, _feeds(excerpts)):
            places = {int(row): index for index, row in enumerate(forward.rows)}
            inside = [row for row in rows if row in places]
            wanted = torch.tensor([places[row] for row in inside], device=self.policy.device).long()
            seen += inside
            order = 0

            def observe(key: Key, outputs: Sequence[object], wanted=wanted, forward=forward) -> None:
                nonlocal order
                values = per_token(outputs, layout_of.get(key), len(forward.rows))
                if values is None:
                    return
                if order in found and len(wanted):
                    kinds[order] = (key, str(values.dtype).removeprefix("torch."))
                    found[order].append(values[wanted].float().cpu().numpy())
                order += 1

            observed_hidden(self.policy, forward, observe)
        order_of_rows = np.argsort(seen)  # forwards take rows in an order of their own
        return [_recording(order, *kinds[order], found[order], order_of_rows) for order in orders]

    def _response_hidden(self, excerpts: Sequence[Excerpt]) -> Tensor:
        """Hidden states [N, H] of the rows that predict response tokens."""
        feeds = _feeds(excerpts)
        ends = np.cumsum([feed.num_rows for feed in feeds])
        wanted = np.concatenate([
            np.arange(end - len(excerpt.response_ids), end) for end, excerpt in zip(ends, excerpts, strict=True)
        ])  # fmt: skip
        place = np.full(int(ends[-1]), -1)
        place[wanted] = np.arange(len(wanted))
        result: Tensor | None = None
        for forward in self.forwards(self.policy, feeds):
            output = self.policy.hidden(forward.token_ids, forward.position_ids, forward.context)
            if result is None:
                result = output.new_empty(len(wanted), output.shape[1])
            taken = place[forward.rows]
            result[torch.from_numpy(taken[taken >= 0]).to(output.device)] = output[
                torch.from_numpy(np.flatnonzero(taken >= 0)).to(output.device)
            ]
        if result is None:
            raise ValueError("there is no excerpt to run")
        return result

    def _logits(self, hidden: Tensor) -> Tensor:
        """float32 [rows, V], not rounded to the model's dtype: that would hide differences, and add some to the KL."""
        head, rows = self.policy.head, hidden.float()
        parts = []
        for start in range(0, self.policy.vocab_size, _WIDTH):
            block = slice(start, start + _WIDTH)
            bias = None if head.bias is None else head.bias[block].float()
            parts.append(linear(rows, head.weight[block].float(), bias, backend=self.policy.backend))
        logits = torch.cat(parts, dim=1)
        cap = self.policy.softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap


@dataclass(frozen=True, slots=True)
class Inspecting:
    """The same of an actor. ``ask(what, *args)`` asks it at once, and gives what waits for the answer.

    asked: the digests that it computes already, of ``excerpts``: of this very object, not of an equal one.
    """

    ask: Callable[..., Callable[[], Any]]
    excerpts: Sequence[Excerpt] = ()
    asked: Mapping[What, Callable[[], Any]] = field(default_factory=dict)

    def logit_digests(self, excerpts: Sequence[Excerpt]) -> np.ndarray:
        return self._digests("logit_digests", excerpts)

    def logits_at(self, excerpts: Sequence[Excerpt], places: Sequence[int]) -> np.ndarray:
        return self.ask("logits_at", excerpts, places)()

    def site_digests(self, excerpts: Sequence[Excerpt]) -> SiteDigests:
        return self._digests("site_digests", excerpts)

    def site_values(self, excerpts: Sequence[Excerpt], orders: Sequence[int], rows: Sequence[int]) -> list[Recording]:
        return self.ask("site_values", excerpts, orders, rows)()

    def _digests(self, what: What, excerpts: Sequence[Excerpt]) -> Any:
        begun = self.asked.get(what) if excerpts is self.excerpts else None
        return (begun or self.ask(what, excerpts))()


def packed(policy: Policy, feeds: Sequence[Feed]) -> Iterator[Forward]:
    """The trainer's way: all excerpts beside each other, whole."""
    yield packed_forward(policy, list(zip(feeds, canonical_rows(feeds), strict=True)))


def paged(engine: EngineConfig) -> Forwards:
    """The engine's way: prompts in chunks, then a token of each excerpt at a time."""

    def run(policy: Policy, feeds: Sequence[Feed]) -> Iterator[Forward]:
        sized = engine.on(policy.device.type)
        pieces = [
            [*range(0, feed.prompt_length, sized.prefill_chunk), *range(feed.prompt_length, feed.num_rows + 1)]
            for feed in feeds
        ]
        members = list(zip(feeds, canonical_rows(feeds), strict=True))
        yield from paged_forwards(policy, members, pieces, page_size=sized.page_size)

    return run


def digest(rows: Tensor) -> Tensor:
    """One number for all the bits of each row [T, F] of floats: int64 [T].

    A sum of the elements' bits, each times an odd constant of its place, modulo 2**64: integers, so that neither the
    order of summation nor the device reaches it. Rows that differ in one element never share a number; others do by
    accident, with a chance of about 2**-48.
    """
    kind = {4: torch.int32, 2: torch.int16}[rows.element_size()]
    bits, factors = rows.contiguous().view(kind), _factors(rows.shape[1], str(rows.device))
    if bits.numel() <= _BLOCK:
        return (bits * factors).sum(dim=1)
    blocks = bits.split(max(1, _BLOCK // rows.shape[1]))
    return torch.cat([(block * factors).sum(dim=1) for block in blocks])


@lru_cache(maxsize=16)
def _factors(count: int, device: str) -> Tensor:
    """int64 [F], odd: splitmix64 of the place."""
    z = (np.arange(count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64)).to(device)


def _feeds(excerpts: Sequence[Excerpt]) -> list[Feed]:
    found = []
    for excerpt in excerpts:
        ids = np.concatenate([excerpt.prompt_ids, excerpt.response_ids[:-1]]).astype(np.int64)
        count = len(ids)
        found.append(Feed(ids, np.arange(count), np.ones(count, np.bool_), len(excerpt.prompt_ids), excerpt.name))
    return found


def _recording(order: int, key: Key, dtype: str, parts: list[np.ndarray], places: np.ndarray) -> Recording:
    return Recording(Site.of(order, *key, layer_of(key[0])), np.concatenate(parts)[places], dtype)
