"""Decode steps from CUDA graphs: a step costs the host one copy and two launches, instead of every kernel's launch.

A bucket (buckets.py) has one graph of the model's forward and, for rows without filters or bans, one of the draw. It is
made when the first step of that bucket comes: that step runs as it is, on the bucket's own tensors, which also compiles
its kernels, and is captured right after. So nothing is made that a run does not need, and nothing at the start.
Which steps come from graphs is schedule: the same kernels run on the same rows, and a row's bits are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import numpy as np
import torch
from rlalign_kernels import SampleOutput, SamplingRows
from torch import Tensor

from rlalign.engine.batch_inputs import (
    ForwardInputs,
    as_sampling_inputs,
    draw_arrays,
    forward_arrays,
    origins_of,
    page_copies,
)
from rlalign.engine.buckets import Bucket, bucket_of, decodes_only, padded_forward, padded_sampling
from rlalign.engine.request import Draw
from rlalign.engine.runner import Runner
from rlalign.engine.sampler import draws_of, sample
from rlalign.engine.scheduler import ScheduledStep
from rlalign.engine.transfer import pack, to_device, unpack
from rlalign.modeling import Policy


class Replayable(Protocol):
    """The part of torch.cuda.CUDAGraph that is needed here."""

    def replay(self) -> None: ...


def uses_graphs(setting: bool | Literal["auto"], policy: Policy) -> bool:
    """Whether an engine captures this policy. Raises ValueError where that is asked for and can't be."""
    reason = policy.why_not_captured()
    if setting is True and reason is not None:
        raise ValueError(f"engine.cuda_graphs=true: {reason}; use auto or false")
    return setting is not False and reason is None


class DecodeGraphs:
    """The graphs of one engine, by bucket. They share one pool of memory, since no two of them run at once."""

    def __init__(self, runner: Runner, *, spare_page: int, max_num_seqs: int, max_length: int) -> None:
        """spare_page: one of the runner's that no sequence is ever given; padded rows write to it."""
        self.num_replayed_steps = 0
        self._runner, self._policy = runner, runner.policy
        self._spare_page = spare_page
        self._limits = {"max_num_seqs": max_num_seqs, "max_length": max_length}
        self._steps: dict[Bucket, _StepGraph] = {}
        self._capture = Capture(runner.policy.device)
        self._weights: list[Tensor] = []
        self._places: list[int] = []

    def takes(self, step: ScheduledStep) -> bool:
        """Whether ``draw`` serves this step. A policy that somebody listens in on runs for them to hear."""
        return decodes_only(step) and "hidden" not in vars(self._policy)

    @torch.no_grad()
    def draw(self, step: ScheduledStep) -> list[Draw]:
        """One draw per chunk of a step that it ``takes``. Raises what ``sampler.draws_of`` raises."""
        policy, num_rows, size = self._policy, len(step.chunks), self._runner.page_size
        self._forget_graphs_of_moved_weights()
        arrays, origins = forward_arrays(step, size), origins_of(step)
        draws = draw_arrays(origins)
        bucket = bucket_of(num_rows, int(arrays["kv_lens"].max()), **self._limits)
        padded = padded_forward(arrays, bucket, page_size=size, spare_page=self._spare_page)
        padded |= padded_sampling(draws, bucket.num_rows)
        graph = self._steps.get(bucket)
        if graph is None:
            graph = self._steps[bucket] = _StepGraph(self._runner, bucket, padded, self._capture)
        if step.copies:
            copies = {"page_copies": page_copies(step)}
            self._runner.copy_pages(to_device(copies, policy.device)["page_copies"])
        graph.take(padded)
        self.num_replayed_steps += graph.forward()
        bans = to_device({"bans": draws["bans"]}, policy.device) if draws["bans"].size else {"bans": _NO_BANS}
        moved = {name: graph.inputs[name][:num_rows] for name in draws if name != "bans"} | bans
        inputs = as_sampling_inputs(origins, draws, moved, policy.vocab_size)
        if inputs.rows.truncates or inputs.banned is not None or inputs.raw_logprobs:
            return sample(policy, graph.hidden[:num_rows], inputs)
        graph.draw()
        return draws_of(SampleOutput(graph.token[:num_rows], graph.logprob[:num_rows]), inputs)

    def weights_changed(self) -> None:
        """Look anew at where the weights are; graphs that read them elsewhere are forgotten. In place is no change."""
        if [*map(id, _tensors_of(self._policy))] != [*map(id, self._weights)]:
            self._forget()

    def _forget_graphs_of_moved_weights(self) -> None:
        """A graph has the addresses of what it reads: a parameter that was given other memory would be missed."""
        if self._places != [x.data_ptr() for x in self._weights] or not self._weights:
            self._forget()

    def _forget(self) -> None:
        self._steps.clear()
        self._capture = Capture(self._policy.device)  # a pool whose graphs are gone is no place for new ones
        self._weights = _tensors_of(self._policy)
        self._places = [x.data_ptr() for x in self._weights]


class _StepGraph:
    """One bucket: tensors that stay where they are, what is computed between them, and its graphs."""

    def __init__(self, runner: Runner, bucket: Bucket, arrays: Mapping[str, np.ndarray], capture: Capture) -> None:
        policy = runner.policy
        self._runner, self._bucket, self._capture = runner, bucket, capture
        self._buffer = torch.empty_like(pack(arrays, pinned=False), device=policy.device)
        self.inputs = unpack(self._buffer, arrays)
        rows = {"device": policy.device}
        self.hidden = torch.empty(bucket.num_rows, policy.head.weight.shape[1], dtype=policy.dtype, **rows)
        self.token = torch.empty(bucket.num_rows, dtype=torch.int64, **rows)
        self.logprob = torch.empty(bucket.num_rows, dtype=torch.float32, **rows)
        self._graphs: dict[str, Replayable] = {}

    def take(self, arrays: Mapping[str, np.ndarray]) -> None:
        """A step's numbers into ``inputs``."""
        pinned = self._buffer.device.type == "cuda"
        self._buffer.copy_(pack(arrays, pinned=pinned), non_blocking=pinned)

    def forward(self) -> bool:
        """Fill ``hidden`` from ``inputs``; True if a graph did."""
        return self._run("forward", self._forward)

    def draw(self) -> bool:
        """Fill ``token`` and ``logprob`` from ``hidden``; True if a graph did. For rows without a filter."""
        return self._run("draw", self._draw)

    def _run(self, name: str, body: Callable[[], None]) -> bool:
        if graph := self._graphs.get(name):
            graph.replay()
            return True
        body()
        self._graphs[name] = self._capture(body, f"{name} of {self._bucket.num_rows} rows")
        return False

    def _forward(self) -> None:
        names = ForwardInputs.__dataclass_fields__.keys() & self.inputs.keys()
        inputs = ForwardInputs(
            **{name: self.inputs[name] for name in names}, max_seqlen_q=1, max_seqlen_k=self._bucket.max_length
        )
        self.hidden.copy_(self._runner.all_rows(inputs))

    def _draw(self) -> None:
        settings = {name: self.inputs[name] for name in ("temperature", "top_k", "top_p", "min_p")}
        rows = SamplingRows(**settings, truncates=False)
        output = self._runner.policy.sample(self.hidden, rows, self.inputs["seeds"], self.inputs["positions"])
        self.token.copy_(output.token)
        self.logprob.copy_(output.logprob)


class Capture:
    """Makes graphs on one device, in one pool, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: object | None = None
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, body: Callable[[], None], what: str) -> Replayable:
        """A graph of ``body``, which has run before, so that no kernel is compiled or loaded meanwhile.

        Raises RuntimeError where the body does what can't be captured, such as waiting for the device.
        """
        with torch.cuda.device(self._device):
            if self._pool is None:
                self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self._device)
            graph, outside = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            try:
                # other threads may go on using the GPU
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    body()
            except RuntimeError as error:
                torch.cuda.set_stream(outside)  # a capture that failed leaves its own
                raise RuntimeError(
                    f"a decode step can't be captured in a CUDA graph ({what}): {error}; "
                    "engine.cuda_graphs=false runs every step eagerly"
                ) from error
        return graph


_NO_BANS = torch.zeros(2, 0, dtype=torch.int64)


def _tensors_of(policy: Policy) -> list[Tensor]:
    return [*policy.model.parameters(), *policy.model.buffers()]
