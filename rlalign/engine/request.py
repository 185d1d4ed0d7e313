"""One sequence in the engine: its tokens, its pages, its progress. No tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from rlalign.config import SamplingParams
from rlalign.records import FinishReason, derive_seed

if TYPE_CHECKING:
    from rlalign.engine.stopping import StopStringWatcher

# asked at every token of a sequence
_derive_seed = lru_cache(1 << 16)(derive_seed)


@dataclass(frozen=True, slots=True)
class Draw:
    """One sampled token as it comes back from the device."""

    token_id: int
    logprob: float
    raw_logprob: float | None = None


@dataclass(slots=True, eq=False)
class Request:
    """One sample of one request. Sample 0 carries its ``n - 1`` siblings until the first token is drawn.

    token_ids: prompt, then response. num_computed: leading tokens whose keys and values are in ``pages``.
    page_digests: chained digests of the full pages of token_ids, as far as they were needed; they survive preemption
    because tokens are only ever appended. max_length: most tokens, prompt and response together.
    """

    request_id: str
    arrival: int
    params: SamplingParams
    token_ids: list[int]
    max_length: int
    stop_ids: frozenset[int] = frozenset()
    watcher: StopStringWatcher | None = None
    sample_index: int = 0
    num_siblings: int = 0
    prompt_length: int = field(init=False)
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    page_digests: list[bytes] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.prompt_length = len(self.token_ids)

    @classmethod
    def first_of(
        cls,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        arrival: int,
        max_length: int,
        stop_ids: frozenset[int] = frozenset(),
        watcher: StopStringWatcher | None = None,
    ) -> Request:
        """Sample 0 of a request, with its siblings still to come."""
        return cls(
            request_id,
            arrival,
            params,
            list(prompt_ids),
            max_length,
            stop_ids=stop_ids,
            watcher=watcher,
            num_siblings=params.n - 1,
        )

    @property
    def order(self) -> tuple[int, int]:
        """First come, first served; samples of one request by index."""
        return (self.arrival, self.sample_index)

    @property
    def num_pending(self) -> int:
        """Tokens that must still be computed before the next one can be drawn."""
        return len(self.token_ids) - self.num_computed

    @property
    def num_response(self) -> int:
        return len(self.token_ids) - self.prompt_length

    @property
    def num_slots(self) -> int:
        """Sequences that this one stands for: itself and the siblings that it will fork."""
        return 1 + self.num_siblings

    @property
    def banned_ids(self) -> frozenset[int]:
        """Ids that the next draw must not pick: whatever would stop the response before ``min_tokens``."""
        return self.stop_ids if self.num_response < self.params.min_tokens else frozenset()

    def seed_of(self, sample_index: int) -> int:
        """Key of the counter-based generator, unsigned 64 bits."""
        return _derive_seed(self.params.seed or 0, sample_index)

    @property
    def seed(self) -> int:
        return self.seed_of(self.sample_index)

    def split_siblings(self) -> list[Request]:
        """The siblings, with this request's prompt and progress but none of its pages."""
        siblings = [
            Request(
                self.request_id,
                self.arrival,
                self.params,
                list(self.token_ids),
                self.max_length,
                stop_ids=self.stop_ids,
                watcher=None if self.watcher is None else self.watcher.fresh(),
                sample_index=self.sample_index + 1 + index,
                page_digests=list(self.page_digests),
            )
            for index in range(self.num_siblings)
        ]
        self.num_siblings = 0
        return siblings

    def append(self, draw: Draw, batch_size: int) -> None:
        """Take a drawn token and set ``finish_reason`` if it was the last."""
        self.token_ids.append(draw.token_id)
        self.logprobs.append(draw.logprob)
        if self.params.raw_logprobs:
            self.raw_logprobs.append(draw.raw_logprob)
        self.batch_sizes.append(batch_size)
        self.finish_reason = self._reason_to_stop(draw.token_id)

    def _reason_to_stop(self, token_id: int) -> FinishReason | None:
        num_response = self.num_response
        may_stop = num_response >= self.params.min_tokens
        # The watcher sees every token, also those before min_tokens: it decodes incrementally.
        found_text = self.watcher is not None and self.watcher.feed(token_id, may_stop)
        if token_id in self.stop_ids or found_text:
            return "stop"
        if num_response >= self.params.max_tokens or len(self.token_ids) >= self.max_length:
            return "length"
        return None
