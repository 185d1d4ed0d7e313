"""Which tokens of which sequences go into the next forward. No tensors: this file runs without torch.

A request's whole life is schedule → (preempt) → postprocess. Nothing decided here may change a token or a log-prob:
only when it is computed, and beside whom.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from rlalign.config import EngineConfig
from rlalign.engine.block_pool import BlockPool
from rlalign.engine.request import Draw, Request

_BY_ORDER = attrgetter("order")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``start … start + num_tokens`` of one sequence. num_draws > 0 if its last row draws the next token."""

    request: Request
    start: int
    num_tokens: int
    num_draws: int

    @property
    def is_decode(self) -> bool:
        return self.num_tokens == 1 and self.num_draws == 1 and self.start >= self.request.prompt_length


@dataclass(slots=True)
class ScheduledStep:
    """One forward. ``copies`` are (source, destination) pages, copied before it; all sources are read first."""

    chunks: list[Chunk] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


@dataclass(slots=True)
class Counters:
    """Totals since construction."""

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0
    preemptions: int = 0
    page_copies: int = 0
    mixed_steps: int = 0
    max_batch_size: int = 0


class Scheduler:
    """Continuous batching: first come, first served; chunked prefill; preemption by recomputation.

    Sequences that run come before those that wait; both lists are in order of arrival, and nobody overtakes. When
    pages run out, the latest arrival gives up its pages and waits to be recomputed, so the earliest always proceeds.
    """

    def __init__(self, config: EngineConfig, pool: BlockPool) -> None:
        self.config = config
        self.pool = pool
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.counters = Counters()
        self.peak_pages = 0  # most pages that one forward's sequences held, since somebody set this to 0

    @property
    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a request. Its length must have been checked against the cache."""
        insort(self.waiting, request, key=_BY_ORDER)

    def schedule(self) -> ScheduledStep:
        """The next forward: running sequences first, then as many waiting ones as fit. Allocates their pages."""
        step = ScheduledStep()
        preemptions = self.counters.preemptions
        budget = self.config.max_batch_tokens - self._schedule_running(step)
        # Whoever is admitted right after a preemption would take the pages that were just freed for another.
        if self.counters.preemptions == preemptions:
            self._schedule_waiting(step, budget)
        if self.has_unfinished and not step.chunks:
            raise RuntimeError(f"no sequence can proceed: {len(self.waiting)} wait, {self.pool.num_free} pages free")
        self._count(step)
        return step

    def postprocess(self, step: ScheduledStep, draws: Sequence[Draw]) -> list[Request]:
        """Enter the drawn tokens (in order of chunks, then samples); returns what finished, without its pages."""
        finished: list[Request] = []
        upcoming = iter(draws)
        for chunk in step.chunks:
            request = chunk.request
            request.num_computed += chunk.num_tokens
            self._register_filled_pages(request, chunk.start)
            if chunk.num_draws == 0:
                continue
            members = (request, *self._fork(request)) if request.num_siblings else (request,)
            for member in members:
                member.append(next(upcoming), batch_size=len(step.chunks))
                if member.finish_reason is not None:
                    self._remove(member)
                    finished.append(member)
        return finished

    def abort(self, request_id: str) -> list[Request]:
        """Take a request out, all samples; siblings that were not forked yet are split off here."""
        aborted = [request for request in (*self.running, *self.waiting) if request.request_id == request_id]
        for request in list(aborted):
            aborted += request.split_siblings()
            self._remove(request)
        for request in aborted:
            request.finish_reason = "abort"
        return sorted(aborted, key=_BY_ORDER)

    def _schedule_running(self, step: ScheduledStep) -> int:
        """Chunks of the running sequences, in order; returns the tokens they take."""
        taken = 0
        index = 0
        while index < len(self.running) and taken < self.config.max_batch_tokens:
            request = self.running[index]
            num_tokens = min(request.num_pending, self.config.prefill_chunk, self.config.max_batch_tokens - taken)
            if self._has_room(request, num_tokens):
                self._append_chunk(step, request, num_tokens)
            elif self._make_room(request, num_tokens):
                self._add_chunk(step, request, num_tokens)
            else:
                break  # it was the latest arrival itself, and is waiting now
            taken += num_tokens
            index += 1
        return taken

    def _schedule_waiting(self, step: ScheduledStep, budget: int) -> None:
        """Admit from the front of the queue while sequence slots, tokens and pages last."""
        num_slots = sum(request.num_slots for request in self.running)
        while self.waiting and budget > 0:
            request = self.waiting[0]
            # A request with more samples than slots may start alone; its surplus samples wait after the fork.
            if self.running and num_slots + request.num_slots > self.config.max_num_seqs:
                break
            self._take_known_prefix(request)
            num_tokens = min(request.num_pending, self.config.prefill_chunk, budget)
            if self._num_pages_missing(request, num_tokens) > self.pool.num_free:
                self._give_up_pages(request)
                break
            self._count_prefix(request)
            self.waiting.pop(0)
            insort(self.running, request, key=_BY_ORDER)
            self._add_chunk(step, request, num_tokens)
            num_slots += request.num_slots
            budget -= num_tokens

    def _has_room(self, request: Request, num_tokens: int) -> bool:
        """Whether its own pages take the tokens, as in nearly every step of a decode, which this is quick for."""
        begin, size, pages = request.num_computed, self.pool.page_size, request.pages
        return begin + num_tokens <= len(pages) * size and not self.pool.is_shared(pages[begin // size])

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Free the pages that ``num_tokens`` more need by preempting the latest arrivals; False if that is us."""
        while self._num_pages_missing(request, num_tokens) > self.pool.num_free:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._give_up_pages(request)
        insort(self.waiting, request, key=_BY_ORDER)
        self.counters.preemptions += 1

    def _give_up_pages(self, request: Request) -> None:
        self.pool.release(request.pages)
        request.pages = []
        request.num_computed = 0

    def _num_pages_missing(self, request: Request, num_tokens: int) -> int:
        total = self.pool.num_pages_for(request.num_computed + num_tokens)
        return total - len(request.pages) + (self._shared_tail(request) is not None)

    def _shared_tail(self, request: Request) -> int | None:
        """The page that the next token is written to, if others hold it too (as after a fork)."""
        index = request.num_computed // self.pool.page_size
        if index < len(request.pages) and self.pool.is_shared(request.pages[index]):
            return request.pages[index]
        return None

    def _add_chunk(self, step: ScheduledStep, request: Request, num_tokens: int) -> None:
        """Give the sequence its pages (copying a shared one before it is written) and put it into the step."""
        source = self._shared_tail(request)
        pages = self.pool.allocate(self._num_pages_missing(request, num_tokens))
        if source is not None:
            destination = pages.pop(0)
            request.pages[request.num_computed // self.pool.page_size] = destination
            self.pool.release([source])
            step.copies.append((source, destination))
        request.pages += pages
        self._append_chunk(step, request, num_tokens)

    def _append_chunk(self, step: ScheduledStep, request: Request, num_tokens: int) -> None:
        num_draws = request.num_slots if num_tokens == request.num_pending else 0
        step.chunks.append(Chunk(request, request.num_computed, num_tokens, num_draws))

    def _take_known_prefix(self, request: Request) -> None:
        """Start from cached pages; at least the last token is computed, because its row draws the next one."""
        if not self.pool.prefix_cache:
            return
        num_full = (len(request.token_ids) - 1) // self.pool.page_size
        self.pool.extend_digests(request.page_digests, request.token_ids, num_full)
        request.pages = self.pool.match(request.page_digests[:num_full])
        self.pool.retain(request.pages)
        request.num_computed = len(request.pages) * self.pool.page_size

    def _register_filled_pages(self, request: Request, start: int) -> None:
        """Make the pages known that the tokens from ``start`` on have filled."""
        num_full = request.num_computed // self.pool.page_size
        if not self.pool.prefix_cache or num_full == start // self.pool.page_size:
            return
        self.pool.extend_digests(request.page_digests, request.token_ids, num_full)
        for index in range(start // self.pool.page_size, num_full):
            self.pool.register(request.pages[index], request.page_digests[index])

    def _fork(self, request: Request) -> list[Request]:
        """Siblings of a request whose prompt has just been computed. They share its pages while slots last."""
        siblings = request.split_siblings()
        if not siblings:
            return siblings
        num_slots = sum(other.num_slots for other in self.running)
        for sibling in siblings:
            if num_slots < self.config.max_num_seqs:
                sibling.pages = list(request.pages)
                sibling.num_computed = request.num_computed
                self.pool.retain(sibling.pages)
                insort(self.running, sibling, key=_BY_ORDER)
                num_slots += 1
            else:
                insort(self.waiting, sibling, key=_BY_ORDER)
        return siblings

    def _remove(self, request: Request) -> None:
        (self.running if request in self.running else self.waiting).remove(request)
        self._give_up_pages(request)

    def _count_prefix(self, request: Request) -> None:
        self.counters.prefix_hit_tokens += request.num_computed
        self.counters.prefix_query_tokens += len(request.token_ids)

    def _count(self, step: ScheduledStep) -> None:
        num_decode = sum(chunk.is_decode for chunk in step.chunks)
        counters = self.counters
        counters.steps += 1
        counters.decode_tokens += num_decode
        counters.prefill_tokens += step.num_tokens - num_decode
        counters.page_copies += len(step.copies)
        counters.mixed_steps += 0 < num_decode < len(step.chunks)
        counters.max_batch_size = max(counters.max_batch_size, len(step.chunks))
        self.peak_pages = max(self.peak_pages, self.pool.num_pages - self.pool.num_free)
