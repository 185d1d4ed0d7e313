"""One rollout engine in a process of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlalign_kernels import Fingerprint

from rlalign.actors.faults import kv_page_fault
from rlalign.actors.inspection import Inspector, What, paged
from rlalign.actors.process import device_of, plan_of, policy_settings, set_up, settle
from rlalign.actors.shared_memory import SharedReader, SharedWeights
from rlalign.actors.weight_sync import WeightBundle, unbundle_weights
from rlalign.config import Config, SamplingParams
from rlalign.engine import Engine
from rlalign.modeling import checksum_tensors, load_policy, load_tokenizer
from rlalign.records import Completion

_COUNTERS = (
    "steps", "graph_steps", "prefill_tokens", "decode_tokens", "prefix_hit_tokens", "prefix_query_tokens",
    "preemptions", "mixed_steps",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """One prompt and how it is sampled; its seed makes the result independent of where and when it runs."""

    token_ids: list[int]
    params: SamplingParams


class RolloutActor:
    """Wraps an Engine; ``load`` does what may fail, so that its errors arrive as what they are."""

    def __init__(self, threads: int) -> None:
        set_up(threads)
        self._engine: Engine | None = None
        self._inspector: Inspector | None = None
        self._reader = SharedReader()

    def load(self, config: Config, checkpoint: Path) -> Fingerprint:
        """Load the checkpoint; returns what can change a bit in this process.

        Raises ValueError if the cache can't hold the longest request that the settings allow.
        """
        policy = load_policy(checkpoint, **policy_settings(config))
        check_cache(config, policy.max_positions)
        self._engine = Engine(policy, load_tokenizer(checkpoint), config.engine)
        self._inspector = Inspector(policy, paged(config.engine))
        settle()
        return plan_of(config)

    def load_weights(self, bundle: WeightBundle | SharedWeights) -> str:
        """Take over new weights, checked on arrival; returns the SHA-256, or checksum, of what the engine now holds."""
        device = self.engine.policy.device
        shared = isinstance(bundle, SharedWeights)
        weights = self._reader.read(bundle, device) if shared else unbundle_weights(bundle)
        if bundle.checksum is None:
            self.engine.update_weights(weights, bundle.version, bundle.sha256)
            return self.engine.weights_hash()
        there = {name: weight.to(device) for name, weight in weights.items()}  # a checksum is a GPU's work
        self.engine.update_weights(there, bundle.version, checksum=bundle.checksum)
        return self.engine.weights_checksum()

    def try_memory(self, offered: SharedWeights) -> str | None:
        """Why this process can't read what the trainer's offers; None if it can."""
        try:
            found = checksum_tensors(SharedReader().read(offered, self.engine.policy.device))
        except (RuntimeError, ValueError, OSError) as error:
            return str(error)
        return None if found == offered.checksum else "what it reads there is not what the trainer wrote"

    def generate(
        self, requests: Sequence[RolloutRequest], *, plant_fault: bool = False
    ) -> tuple[list[list[Completion]], dict[str, float]]:
        """Completions of every request in order, and what the engine counted meanwhile."""
        planted = kv_page_fault(self.engine.policy) if plant_fault else contextlib.nullcontext()
        before = self.engine.stats
        with planted:
            completions = self.engine.generate([r.token_ids for r in requests], [r.params for r in requests])
        after = self.engine.stats
        counted = {name: after[name] - before[name] for name in _COUNTERS}
        return completions, counted | {"cache_use_peak": after["cache_use_peak"]}

    def inspect(self, what: What, *args: Any) -> Any:
        """One of the checks of ``inspection.Inspector``, on this engine's weights, the way it runs sequences."""
        if self._inspector is None:
            raise RuntimeError("load() comes first")
        return getattr(self._inspector, what)(*args)

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("load() comes first")
        return self._engine


def check_cache(config: Config, max_positions: int) -> None:
    """Raises ValueError for a cache that would refuse a request: what a run trains on must not depend on its size."""
    engine = config.engine.on(device_of(config))
    wanted = config.task.max_prompt_tokens + config.sampling.max_tokens
    longest = min(engine.max_model_len or max_positions, wanted)
    capacity = engine.num_pages * engine.page_size
    if longest > capacity:
        raise ValueError(
            f"engine.num_pages={engine.num_pages} with page_size={engine.page_size} hold {capacity} tokens, but one "
            f"request may have {longest} (task.max_prompt_tokens + sampling.max_tokens, or the model's limit): it "
            f"needs num_pages={-(-longest // engine.page_size)}"
        )
