"""Starts the actors, hands out requests, keeps weights in step, and puts a lost rollout actor back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from rlalign_kernels import Fingerprint

from rlalign.actors.cluster import (
    ActorDied,
    Remote,
    cluster,
    fetch,
    fetch_named,
    start_actor,
    stop_actor,
    wait_started,
)
from rlalign.actors.inspection import Inspecting, What
from rlalign.actors.process import device_of
from rlalign.actors.rollout_actor import RolloutActor, RolloutRequest, check_cache
from rlalign.actors.trainer_actor import TrainerActor
from rlalign.actors.weight_sync import Transport, unbundle_weights
from rlalign.config import Config, SamplingParams
from rlalign.modeling import hash_tensors
from rlalign.records import Completion, Prompt, Sample, derive_seed
from rlalign.verifier.periodic import Excerpt

_LOG = logging.getLogger(__name__)
# deaths of one actor within one rollout: beyond that it isn't an accident
_MAX_RESTARTS = 3
_TRAINER = "the trainer actor"


@dataclass(frozen=True, slots=True)
class Rollout:
    """samples: finished ones, in order of key. failed: one line per request that could not be served.

    stats: what the engines counted during this rollout.
    """

    samples: list[Sample]
    failed: list[str]
    stats: dict[str, float]


class Controller:
    """One trainer actor and any number of rollout actors, as a context manager.

    Processes start when it is entered and import their libraries in the background; ``load`` gives them a model.

    Example:
        >>> with Controller(config) as actors:
        ...     actors.load(checkpoint)
        ...     actors.sync_weights()
        ...     rollout = actors.generate(prompts, step=1)
    """

    def __init__(self, config: Config) -> None:
        """Raises ValueError for a GPU that isn't there, and for settings that can't work or aren't a run's."""
        if config.sampling.n != 1 or config.sampling.seed is not None or config.sampling.raw_logprobs:
            raise ValueError(
                "sampling.n, sampling.seed and sampling.raw_logprobs are not settings of a run: samples per prompt are "
                "algorithm.group_size, and seeds follow from run.seed"
            )
        if config.model.path is None:  # a model that is there says what it allows when it is loaded
            check_cache(config, config.model.max_position_embeddings)
        # decided once, here: every actor computes on the same kind of device
        self.device = device_of(config)
        self.config = replace(config, cluster=replace(config.cluster, device=self.device))
        if config.cluster.weight_transport == "cuda_ipc" and self.device != "cuda":
            raise ValueError(
                f"cluster.weight_transport=cuda_ipc: the actors compute on device {self.device}; "
                "use auto or object_store"
            )
        self.num_restarts = 0
        self.weights_version = 0
        self.trainer_version = 0
        self.weight_transport: Transport = "object_store"
        self.weights_equal = True
        self.plan: Fingerprint | None = None
        self._checkpoint: Path | None = None
        self._weights: Any = None
        self._weights_digest: str | None = None
        self._rollouts: list[Any] = []
        self._exit = ExitStack()

    def __enter__(self) -> Controller:
        with ExitStack() as entering:
            entering.enter_context(cluster(self.config.cluster))
            self._trainer_handle = self._start(TrainerActor)
            entering.callback(stop_actor, self._trainer_handle)
            # whoever is in the list by then: some, if one fails to start; others, once some have been replaced
            self._rollouts = []
            entering.callback(lambda: [stop_actor(handle) for handle in self._rollouts])
            for _ in range(self.config.cluster.num_rollout_actors):
                self._rollouts.append(self._start(RolloutActor))
            self._exit = entering.pop_all()
        self.trainer = Remote(self._trainer_handle, _TRAINER)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()

    def load(self, checkpoint: Path) -> None:
        """Load the checkpoint everywhere and compare plans. Raises RuntimeError naming the fields that differ.

        Every actor reads the folder itself, by its absolute path. Raises ValueError for actors that don't start, and
        for cluster.weight_transport=cuda_ipc where they can't share memory.
        """
        config = self.config
        updates = config.run.steps * config.algorithm.epochs * config.algorithm.minibatches
        self._checkpoint = checkpoint.absolute()
        names = [_TRAINER, *(_rollout(index) for index in range(len(self._rollouts)))]
        wait_started(dict(zip(names, [self._trainer_handle, *self._rollouts], strict=True)))
        loading = [
            self._trainer_handle.load.remote(config, self._checkpoint, updates),
            *(handle.load.remote(config, self._checkpoint) for handle in self._rollouts),
        ]
        self.plan, *others = [fetch_named(one, name) for name, one in zip(names, loading, strict=True)]
        for index, plan in enumerate(others):
            self._check_plan(plan, index)
        self.weight_transport = self._choose_transport()

    def sync_weights(self) -> None:
        """Give the trainer's weights to every engine; each checks their hash, or checksum, on arrival.

        They go from process to process; this one only holds a reference to them, or to where they are.
        """
        self._weights, reference = self._trainer_handle.weights.options(num_returns=2).remote(self.weight_transport)
        version, digest = self.trainer.wait_for(reference)
        pending = [handle.load_weights.remote(self._weights) for handle in self._rollouts]
        held = [self._call(i, "load_weights", self._weights, pending=one) for i, one in enumerate(pending)]
        self.weights_version, self.weights_equal = version, all(other == digest for other in held)
        self._weights_digest = digest

    @property
    def weights_sha256(self) -> str | None:
        """SHA-256 of the weights that were synced last, None before the first time."""
        if self._weights_digest is None or self.device != "cuda":
            return self._weights_digest
        # a GPU's actors compared checksums; a SHA-256 takes seconds, and is computed when somebody asks
        if self.weight_transport == "cuda_ipc":
            return self.trainer.shared_sha256()
        return hash_tensors(unbundle_weights(fetch(self._weights)))

    def begin_batch(self, samples: Sequence[Sample]) -> None:
        """Hand the samples to the trainer, which says what version its weights are."""
        self.trainer_version = self.trainer.begin_batch(samples)

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        step: int,
        sampling: SamplingParams | None = None,
        plant_fault: bool = False,
    ) -> Rollout:
        """Sample every prompt, ``algorithm.group_size`` times unless ``sampling`` says otherwise.

        Which actor serves a prompt, and whether it died on the way, reaches no token: seeds are hashes of
        (run seed, step, prompt).
        """
        params = sampling or replace(self.config.sampling, n=self.config.algorithm.group_size)
        each = [replace(params, seed=derive_seed(self.config.run.seed, step, p.prompt_id)) for p in prompts]
        requests = [
            RolloutRequest(prompt.token_ids.tolist(), its_params)
            for prompt, its_params in zip(prompts, each, strict=True)
        ]
        num_shards = min(len(self._rollouts), len(requests))
        shards = [requests[index::num_shards] for index in range(num_shards)]
        faults = [{"plant_fault": plant_fault and index == 0} for index in range(num_shards)]
        pending = [self._rollouts[i].generate.remote(shards[i], **faults[i]) for i in range(num_shards)]
        groups: list[list[Completion]] = [[] for _ in prompts]
        stats: list[dict[str, float]] = []
        for index, (shard, one) in enumerate(zip(shards, pending, strict=True)):
            groups[index::num_shards], its_stats = self._call(index, "generate", shard, pending=one, **faults[index])
            stats.append(its_stats)
        return _collect(prompts, groups, each, stats, step=step)

    def inspectors(
        self, step: int, wanted: Sequence[What], excerpts: Sequence[Excerpt]
    ) -> tuple[Inspecting, Inspecting]:
        """Both sides, (rollout, trainer), for the checks of rlalign/verifier/periodic.py; engines take turns.

        wanted: the digests that follow; both sides begin with them at once, so that neither waits for the other.
        """
        index = derive_seed(self.config.run.seed, step) % len(self._rollouts)

        def ask_rollout(*args: Any) -> Callable[[], Any]:
            handle = self._rollouts[index]
            asked = handle.inspect.remote(*args)

            def wait() -> Any:
                here = self._rollouts[index]  # another one if it died over an earlier call
                pending = asked if here is handle else here.inspect.remote(*args)
                return self._call(index, "inspect", *args, pending=pending)

            return wait

        def ask_trainer(*args: Any) -> Callable[[], Any]:
            return partial(self.trainer.wait_for, self._trainer_handle.inspect.remote(*args))

        rollout, train = (
            Inspecting(ask, excerpts, {what: ask(what, excerpts) for what in wanted})
            for ask in (ask_rollout, ask_trainer)
        )
        return rollout, train

    def facts(self) -> dict[str, Any]:
        """What a summary should say about plan, schedules and accidents, JSON-ready."""
        plan = self.plan.fields if self.plan else {}
        return {
            "plan_fingerprint": self.plan.sha256 if self.plan else None,
            "plan": dict(plan),
            "schedules": self.trainer.conformance(),
            "compute": self.trainer.compute(),
            "rollout_restarts": self.num_restarts,
            "weight_transport": self.weight_transport,
        }

    def _choose_transport(self) -> Transport:
        """The setting's, or with auto the fastest that works here; says so where that is not what a GPU allows."""
        wanted = self.config.cluster.weight_transport
        if wanted == "object_store" or self.device != "cuda":
            return "object_store"
        reason = self._why_not_shared()
        if reason is None:
            return "cuda_ipc"
        if wanted == "cuda_ipc":
            raise ValueError(f"cluster.weight_transport=cuda_ipc: {reason}; use auto or object_store")
        _LOG.warning("weights go through host memory, for GPU memory can't be shared: %s", reason)
        return "object_store"

    def _why_not_shared(self) -> str | None:
        """Tries it, with a little memory of the trainer's process."""
        offered = self.trainer.offer_memory()
        if isinstance(offered, str):
            return offered
        for index, handle in enumerate(self._rollouts):
            if reason := fetch_named(handle.try_memory.remote(offered), _rollout(index)):
                return f"{_rollout(index)}: {reason}"
        return None

    def _start(self, cls: type) -> Any:
        cluster = self.config.cluster
        share = gpu_share(1 + cluster.num_rollout_actors) if self.device == "cuda" else 0.0
        return start_actor(cls, cluster, cluster.threads, num_gpus=share)

    def _call(self, index: int, method: str, *args: Any, pending: Any, **kwargs: Any) -> Any:
        """The result of ``pending``, a call on a rollout actor; if its process dies, a new one makes the call again."""
        for attempt in range(1 + _MAX_RESTARTS):
            try:
                if attempt > 0:
                    self._restart(index)
                    pending = getattr(self._rollouts[index], method).remote(*args, **kwargs)
                return fetch(pending)
            except ActorDied as error:
                died = error
                _LOG.warning("%s died: it is restarted, and its requests run again", _rollout(index))
        raise RuntimeError(f"{_rollout(index)} died {1 + _MAX_RESTARTS} times over the same call") from died

    def _restart(self, index: int) -> None:
        """A new process with the weights that the others hold."""
        stop_actor(self._rollouts[index])
        self._rollouts[index] = handle = self._start(RolloutActor)
        self.num_restarts += 1
        wait_started({_rollout(index): handle})
        self._check_plan(fetch(handle.load.remote(self.config, self._checkpoint)), index)
        if self._weights is not None:
            fetch(handle.load_weights.remote(self._weights))

    def _check_plan(self, plan: Fingerprint, index: int) -> None:
        assert_same = self.config.numerics == "invariant"
        if assert_same and (fields := self.plan.difference(plan)):
            raise RuntimeError(
                f"the trainer and {_rollout(index)} would not compute the same bits: {'; '.join(fields)}"
            )


def gpu_share(num_actors: int) -> float:
    """What each of ``num_actors`` asks of one GPU. Ray counts in ten-thousandths: rounded up, the last would wait."""
    return 10_000 // num_actors / 10_000


def _rollout(index: int) -> str:
    return f"rollout actor {index}"


def _collect(
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[Completion]],
    params: Sequence[SamplingParams],
    stats: Sequence[Mapping[str, float]],
    *,
    step: int,
) -> Rollout:
    samples = [
        Sample(step=step, prompt=prompt, completion=completion, sampling=its_params)
        for prompt, completions, its_params in zip(prompts, groups, params, strict=True)
        for completion in completions
    ]
    served = sorted((s for s in samples if s.completion.error is None), key=lambda sample: sample.key)
    failed = [f"prompt {s.prompt.prompt_id}: {s.completion.error}" for s in samples if s.completion.error is not None]
    return Rollout(served, list(dict.fromkeys(failed)), _merge(stats))


def _merge(stats: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Sums over the engines and the ratios that follow from them; of the peaks, the highest."""
    total = {name: float(sum(one[name] for one in stats)) for name in stats[0] if not name.endswith("_peak")}
    peaks = {name: max(one[name] for one in stats) for name in stats[0] if name.endswith("_peak")}
    hits, asked = total.pop("prefix_hit_tokens"), total.pop("prefix_query_tokens")
    rows = total["decode_tokens"] + total["prefill_tokens"]
    return {
        **{f"engine/{name}": value for name, value in (total | peaks).items()},
        "engine/prefix_hit_rate": hits / max(1.0, asked),
        "engine/tokens_per_forward": rows / max(1.0, total["steps"]),
    }
