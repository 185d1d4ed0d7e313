"""A stand-in for the device: page caches that hold token ids, and a "model" that reads them back.

Every scheduled forward is checked to see exactly its own sequence through its pages, whatever was shared, copied,
evicted or preempted. Free pages and unwritten slots are poisoned after every step.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from rlalign.config import EngineConfig, SamplingParams
from rlalign.engine.block_pool import BlockPool
from rlalign.engine.request import Draw, Request
from rlalign.engine.scheduler import ScheduledStep, Scheduler

VOCAB = 50


def next_token(context: list[int], seed: int) -> int:
    """A draw that depends on the context and the seed only."""
    text = ",".join(map(str, [seed, *context])).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little") % VOCAB


@dataclass
class Simulation:
    """Runs a scheduler to its end; ``finished`` maps (request_id, sample) to the response."""

    config: EngineConfig
    stop_ids: frozenset[int] = frozenset()
    finished: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    steps: list[ScheduledStep] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.config = self.config.on("cpu")
        self.pool = BlockPool(self.config.num_pages, self.config.page_size, prefix_cache=self.config.prefix_cache)
        self.scheduler = Scheduler(self.config, self.pool)
        self.slots: list[int | None] = [None] * (self.config.num_pages * self.config.page_size)
        self.num_arrivals = 0

    def add(self, request_id: str, prompt: list[int], max_length: int = 10_000, **params: object) -> Request:
        request = Request.first_of(
            request_id,
            prompt,
            SamplingParams(**params),
            arrival=self.num_arrivals,
            max_length=max_length,
            stop_ids=self.stop_ids,
        )
        self.num_arrivals += 1
        self.scheduler.add(request)
        return request

    def step(self) -> list[Request]:
        step = self.scheduler.schedule()
        self._check_limits(step)
        self._copy(step)
        draws = [draw for chunk in step.chunks for draw in self._run(chunk)]
        done = self.scheduler.postprocess(step, draws)
        for request in done:
            self.finished[request.request_id, request.sample_index] = request.token_ids[request.prompt_length :]
        self.steps.append(step)
        self._poison()
        return done

    def run(self) -> dict[tuple[str, int], list[int]]:
        while self.scheduler.has_unfinished:
            self.step()
        assert self.pool.num_free == self.config.num_pages, "pages leaked"
        return self.finished

    def _check_limits(self, step: ScheduledStep) -> None:
        assert 0 < step.num_tokens <= self.config.max_batch_tokens
        assert len(step.chunks) <= self.config.max_num_seqs
        assert all(0 < chunk.num_tokens <= self.config.prefill_chunk for chunk in step.chunks)
        written = [page for chunk in step.chunks for page in self._written_pages(chunk)]
        assert len(written) == len(set(written)), "two sequences write the same page"

    def _written_pages(self, chunk) -> list[int]:
        size = self.config.page_size
        return chunk.request.pages[chunk.start // size : (chunk.start + chunk.num_tokens - 1) // size + 1]

    def _copy(self, step: ScheduledStep) -> None:
        size = self.config.page_size
        contents = [self.slots[source * size : (source + 1) * size] for source, _ in step.copies]
        for (_, destination), content in zip(step.copies, contents, strict=True):
            self.slots[destination * size : (destination + 1) * size] = content

    def _run(self, chunk) -> list[Draw]:
        request, end = chunk.request, chunk.start + chunk.num_tokens
        for position in range(chunk.start, end):
            self.slots[self._slot(request, position)] = request.token_ids[position]
        seen = [self.slots[self._slot(request, position)] for position in range(end)]
        assert seen == request.token_ids[:end], f"{request.order} reads others' or stale tokens"
        seeds = [request.seed_of(request.sample_index + index) for index in range(chunk.num_draws)]
        return [Draw(next_token(seen, seed), -1.0) for seed in seeds]

    def _slot(self, request: Request, position: int) -> int:
        page, offset = divmod(position, self.config.page_size)
        return request.pages[page] * self.config.page_size + offset

    def _poison(self) -> None:
        size = self.config.page_size
        for page in range(self.config.num_pages):
            if self.pool.holds_nothing(page):
                self.slots[page * size : (page + 1) * size] = [None] * size
        for request in self.scheduler.running:
            for position in range(request.num_computed, len(request.pages) * size):
                if not self.pool.is_shared(request.pages[position // size]):
                    self.slots[self._slot(request, position)] = None


def expected(prompt: list[int], num_tokens: int, seed: int, stop_ids: frozenset[int] = frozenset()) -> list[int]:
    """The response of one sequence alone, by definition."""
    response: list[int] = []
    while len(response) < num_tokens and not (response and response[-1] in stop_ids):
        response.append(next_token(prompt + response, seed))
    return response
