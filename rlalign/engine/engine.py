"""The rollout engine: requests in, completions out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from operator import index
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from rlalign.config import EngineConfig, SamplingParams
from rlalign.engine.batch_inputs import forward_inputs, sampling_inputs
from rlalign.engine.block_pool import BlockPool
from rlalign.engine.graphs import DecodeGraphs, uses_graphs
from rlalign.engine.request import Draw, Request
from rlalign.engine.runner import Runner
from rlalign.engine.sampler import sample
from rlalign.engine.scheduler import ScheduledStep, Scheduler
from rlalign.engine.stopping import StopStringWatcher, decode_text, stop_ids
from rlalign.modeling import Policy, as_policy, checksum_tensors, eos_ids, hash_tensors
from rlalign.records import Completion, FinishReason

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompt = str | Sequence[int]


class Engine:
    """Continuous batching over a paged cache, for one policy.

    Tokens in, tokens out; with a tokenizer also text. ``generate`` serves whole batches; ``add``, ``step`` and
    ``abort`` below it serve a stream. Which tokens come out depends on weights, prompt, sampling parameters and seed
    alone: never on ``EngineConfig``, on the other requests, or on what happened before.

    Example:
        >>> engine = Engine(model, tokenizer, EngineConfig())
        >>> [[completion]] = engine.generate(["1+1="], SamplingParams(max_tokens=4, seed=7))
    """

    def __init__(
        self,
        model: Policy | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        config: EngineConfig | None = None,
        *,
        weights_version: int = 0,
    ) -> None:
        """model: a policy, or a Hugging Face decoder, which is aligned **in place** if it wasn't before.

        Such a model is shared, not copied, and takes packed or paged rows from then on: its own ``forward`` and
        ``generate`` need an attention context. ``align(model, backend="native")`` beforehand keeps PyTorch's operators.
        Raises TypeError for any other model, AuditError for one that can't be made exact, ValueError if the cache
        can't hold one request of ``max_model_len``, or the model can't, and for CUDA graphs that can't be captured.
        """
        self.policy = policy = as_policy(model)
        self.tokenizer = tokenizer
        self.config = (config or EngineConfig()).on(policy.device.type)
        self.weights_version = weights_version
        self.max_length = _max_length(self.config, policy)
        self._eos = eos_ids(tokenizer, policy.model)
        self._pool = BlockPool(
            self.config.num_pages,
            self.config.page_size,
            prefix_cache=self.config.prefix_cache,
            weights_version=weights_version,
        )
        self._scheduler = Scheduler(self.config, self._pool)
        graphs = uses_graphs(self.config.cuda_graphs, policy)
        # one page more than the pool knows, for the padded rows of graphs
        self._runner = Runner(policy, self.config.num_pages + graphs, self.config.page_size)
        policy.fuse_projections()  # before anything remembers where the weights are
        self._graphs = self._make_graphs() if graphs else None
        self._num_arrivals = 0
        self._num_open: dict[str, int] = {}  # samples of each request that step() has not returned yet
        self._ready: list[Completion] = []  # failed and aborted ones, returned by the next step()

    @property
    def has_unfinished(self) -> bool:
        """True while a later ``step`` has something to do or to return."""
        return bool(self._num_open)

    def weights_hash(self) -> str:
        """SHA-256 of the weights as they are now (names, dtypes, shapes, bytes)."""
        return self.policy.weights_hash()

    def weights_checksum(self) -> str:
        """Of the weights as they are now, computed where they are: modeling/checksum.py."""
        return checksum_tensors(self.policy.named_weights())

    @property
    def stats(self) -> dict[str, float]:
        """Totals since construction (steps, tokens, prefix hits, preemptions, …) and the present state of the cache.

        ``graph_steps``: those of the steps that a CUDA graph replayed.
        ``cache_use_peak``: largest share of pages in use at once, since ``generate`` was last called.
        """
        pool, counters = self._pool, self._scheduler.counters
        return {
            **asdict(counters),
            "graph_steps": 0 if self._graphs is None else self._graphs.num_replayed_steps,
            "evictions": pool.num_evictions,
            "prefix_hit_rate": counters.prefix_hit_tokens / max(1, counters.prefix_query_tokens),
            "running": len(self._scheduler.running),
            "waiting": len(self._scheduler.waiting),
            "pages_used": pool.num_pages - pool.num_free,
            "pages_known": pool.num_known,
            "cache_use": 1.0 - pool.num_free / pool.num_pages,
            "cache_use_peak": self._scheduler.peak_pages / pool.num_pages,
        }

    def add(self, request_id: str, prompt: Prompt, params: SamplingParams) -> None:
        """Queue one request. A prompt that can't be served comes back from ``step`` with finish_reason "error".

        Raises ValueError for a request_id in use, and for parameters that this engine can't follow.
        """
        if request_id in self._num_open:
            raise ValueError(f"request_id={request_id!r} is unfinished: ids must be unique among unfinished requests")
        stops = stop_ids(params, self._eos, self.policy.vocab_size)
        watcher = StopStringWatcher(self.tokenizer, params.stop) if params.stop else None
        prompt_ids = self._token_ids(prompt)
        self._num_open[request_id] = params.n
        request = Request.first_of(
            request_id,
            prompt_ids,
            params,
            arrival=self._num_arrivals,
            max_length=self.max_length,
            stop_ids=stops,
            watcher=watcher,
        )
        self._num_arrivals += 1
        if problem := self._problem_with(prompt_ids, params):
            self._ready += [self._completion(r, "error", problem) for r in (request, *request.split_siblings())]
        else:
            self._scheduler.add(request)

    def step(self) -> list[Completion]:
        """One forward over whatever fits; returns what finished. Without unfinished requests it does nothing.

        Raises FloatingPointError naming request and position if a log-prob is not finite; that request then still
        waits for its token and can be aborted.
        """
        finished = self._ready
        self._ready = []
        if self._scheduler.has_unfinished:
            finished = finished + self._forward()
        for completion in finished:
            self._close(completion.request_id)
        return finished

    def abort(self, request_id: str) -> None:
        """Stop a request; ``step`` returns its samples, as far as they came, with finish_reason "abort".

        Raises ValueError if there is no such unfinished request.
        """
        if request_id not in self._num_open:
            raise ValueError(f"request_id={request_id!r}: no such unfinished request")
        self._ready += [self._completion(request, "abort") for request in self._scheduler.abort(request_id)]

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[list[Completion]]:
        """``params.n`` completions of every prompt, in order. Requests are named "0", "1", … by their prompt.

        Raises ValueError while other requests are unfinished, for a list of params of another length, and what
        ``add`` and ``step`` raise; the batch is dropped then.
        """
        if isinstance(prompts, str):
            raise ValueError(f"prompts={prompts!r}: a list of prompts is expected, not one string")
        if len(prompts) and (prompts[0] is None or (not isinstance(prompts[0], str) and np.ndim(prompts[0]) == 0)):
            raise ValueError(
                f"prompts={prompts!r}: a list of prompts is expected, not one prompt's token ids, nor None"
            )
        if self.has_unfinished:
            raise ValueError(f"{len(self._num_open)} requests are unfinished: finish or abort them before generate()")
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(each)} sampling params for {len(prompts)} prompts: give one, or one for each")
        results: list[list[Completion]] = [[] for _ in prompts]
        self._scheduler.peak_pages = 0
        try:
            for number, (prompt, its_params) in enumerate(zip(prompts, each, strict=True)):
                self.add(str(number), prompt, its_params)
            while self.has_unfinished:
                for completion in self.step():
                    results[int(completion.request_id)].append(completion)
        except BaseException:
            self._drop_everything()
            raise
        return [sorted(completions, key=lambda c: c.sample_index) for completions in results]

    def update_weights(
        self, weights: Mapping[str, Tensor], version: int, sha256: str | None = None, *, checksum: str | None = None
    ) -> None:
        """Load ``weights`` in place under a new version, and forget every cached prefix.

        sha256, checksum: what ``weights_hash()`` or ``weights_checksum()`` must be afterwards; they are checked on what
        arrived, before anything is changed.
        Raises RuntimeError while requests are unfinished, ValueError for another hash, checksum, name, shape or dtype.
        """
        if self.has_unfinished:
            raise RuntimeError(f"{len(self._num_open)} requests are unfinished: their tokens would mix two weights")
        if sha256 is not None and (arrived := hash_tensors(weights)) != sha256:
            raise ValueError(f"weights version {version} arrived damaged: their SHA-256 is {arrived}, not {sha256}")
        if checksum is not None and (arrived := checksum_tensors(weights)) != checksum:
            raise ValueError(f"weights version {version} arrived damaged: their checksum is {arrived}, not {checksum}")
        self.policy.load_weights(weights)
        if self._graphs is not None:
            self._graphs.weights_changed()
        self.weights_version = version
        self._pool.reset(version)

    def _forward(self) -> list[Completion]:
        step = self._scheduler.schedule()
        draws = self._draw(step)
        return [self._completion(request) for request in self._scheduler.postprocess(step, draws)]

    def _draw(self, step: ScheduledStep) -> list[Draw]:
        if self._graphs is not None and self._graphs.takes(step):
            return self._graphs.draw(step)
        device = self.policy.device
        hidden = self._runner.forward(forward_inputs(step, self.config.page_size, device))
        rows = sampling_inputs(step, self.policy.vocab_size, device)
        return [] if rows is None else sample(self.policy, hidden, rows)

    def _make_graphs(self) -> DecodeGraphs:
        config = self.config
        limits = {"max_num_seqs": config.max_num_seqs, "max_length": self.max_length}
        return DecodeGraphs(self._runner, spare_page=config.num_pages, **limits)

    def _token_ids(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return [index(token_id) for token_id in prompt]
        if self.tokenizer is None:
            raise ValueError("a prompt is text but the engine has no tokenizer: pass token ids")
        return list(self.tokenizer.encode(prompt))

    def _problem_with(self, prompt_ids: list[int], params: SamplingParams) -> str | None:
        """Why this prompt can't be served, or None."""
        if not prompt_ids:
            return "the prompt is empty"
        vocab_size = self.policy.vocab_size
        if outside := [token_id for token_id in prompt_ids if not 0 <= token_id < vocab_size]:
            return f"prompt token id {outside[0]} is out of range: the vocabulary has ids 0 … {vocab_size - 1}"
        if len(prompt_ids) >= self.max_length:
            return (
                f"the prompt has {len(prompt_ids)} tokens: prompt and response together may have {self.max_length}, "
                "at least one of them a response"
                + (self.policy.length_note if self.max_length == self.policy.max_positions else "")
            )
        # A cache smaller than the model's limit must not shorten a response: its size is schedule.
        total = len(prompt_ids) + params.max_tokens
        if self.max_length < self._model_limit and total > self.max_length:
            return (
                f"prompt and max_tokens are {total} tokens, the cache holds {self.max_length} "
                f"(num_pages={self.config.num_pages}, page_size={self.config.page_size}): raise num_pages"
            )
        return None

    @property
    def _model_limit(self) -> int:
        return self.config.max_model_len or self.policy.max_positions

    def _completion(self, request: Request, reason: FinishReason | None = None, error: str | None = None) -> Completion:
        response = request.token_ids[request.prompt_length :]
        return Completion(
            request_id=request.request_id,
            sample_index=request.sample_index,
            prompt_ids=np.array(request.token_ids[: request.prompt_length], dtype=np.int64),
            token_ids=np.array(response, dtype=np.int64),
            logprobs=np.array(request.logprobs, dtype=np.float32),
            raw_logprobs=np.array(request.raw_logprobs, dtype=np.float32) if request.params.raw_logprobs else None,
            batch_sizes=np.array(request.batch_sizes, dtype=np.int32),
            seed=request.seed,
            weights_version=self.weights_version,
            finish_reason=reason or request.finish_reason,
            text=self._text(request, response),
            error=error,
        )

    def _text(self, request: Request, response: list[int]) -> str | None:
        if self.tokenizer is None:
            return None
        if request.watcher is not None and request.watcher.found:
            return request.watcher.text
        return decode_text(self.tokenizer, response)

    def _close(self, request_id: str) -> None:
        self._num_open[request_id] -= 1
        if self._num_open[request_id] == 0:
            del self._num_open[request_id]

    def _drop_everything(self) -> None:
        for request_id in list(self._num_open):
            self._scheduler.abort(request_id)
        self._num_open.clear()
        self._ready.clear()


def _max_length(config: EngineConfig, policy: Policy) -> int:
    """Most tokens of prompt and response together."""
    capacity, max_positions = config.num_pages * config.page_size, policy.max_positions
    limit = config.max_model_len
    if limit is None:
        return min(max_positions, capacity)
    if limit > max_positions:
        raise ValueError(f"engine.max_model_len={limit}: the model has {max_positions} positions{policy.length_note}")
    if limit > capacity:
        needed = -(-limit // config.page_size)
        raise ValueError(
            f"num_pages={config.num_pages} with page_size={config.page_size} hold {capacity} tokens, but one request "
            f"of max_model_len={limit} needs num_pages={needed}"
        )
    return limit
