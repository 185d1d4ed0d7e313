"""One side of a configuration in words that all frameworks share, and what is found when two of them meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Severity = Literal["wrong", "differs", "note"]
"""wrong: other log-probs by far more than rounding. differs: other bits. note: worth knowing, nothing differs yet."""

Name = Literal[
    "model", "tokenizer", "chat_template", "dtype", "logits_dtype", "quantization", "kv_cache_dtype",
    "temperature", "top_p", "top_k", "min_p", "penalties", "logit_edits", "logprobs", "sampling_defaults",
    "numerics", "attention", "chunked_prefill", "prefix_cache", "cuda_graphs", "compile", "fused_kernels",
    "speculative",
    "tensor_parallel", "pipeline_parallel", "sequence_parallel", "expert_parallel",
    "max_length", "rope_scaling", "rope_theta", "model_overrides", "lora",
    "updates_per_sync", "staleness", "correction", "seed",
]  # fmt: skip
NAMES: tuple[Name, ...] = get_args(Name)

# the identity of each transform of the sampling distribution
OFF: Mapping[str, float] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
# what a request says
SAMPLING: tuple[Name, ...] = ("temperature", "top_p", "top_k", "min_p", "penalties", "logit_edits")


@dataclass(frozen=True, slots=True)
class Setting:
    """A value and where it is from: ``key`` of the file, or a framework's default."""

    value: Any
    key: str
    is_default: bool = False

    def __str__(self) -> str:
        text = (", ".join(self.value) or "none") if isinstance(self.value, tuple) else str(self.value)
        return f"{text} (default)" if self.is_default else text


@dataclass(frozen=True, slots=True)
class Side:
    """What a file says of one side. settings: only those that it states, or whose default is known.

    name: file and framework, for people. not_judged: keys that no rule looks at, listed because they may matter.
    harmless: keys that are known to change no log-prob. known: keys that a table has and the file hasn't, one of which
    a misspelt one may mean. sends: its requests name all sampling parameters, so that no default of the engine counts.
    """

    name: str
    settings: Mapping[Name, Setting]
    not_judged: tuple[str, ...] = ()
    harmless: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    sends: bool = False

    def get(self, name: Name) -> Any:
        """The value, None where the side doesn't say."""
        setting = self.settings.get(name)
        return None if setting is None else setting.value

    def show(self, name: Name) -> str:
        setting = self.settings.get(name)
        return "not stated" if setting is None else str(setting)

    def key(self, name: Name) -> str | None:
        setting = self.settings.get(name)
        return None if setting is None else setting.key


@dataclass(frozen=True, slots=True)
class Finding:
    """One reason for log-probs to differ. rollout, train: both values as text. remedy: what to set, and where."""

    severity: Severity
    setting: Name
    rollout: str
    train: str
    why: str
    remedy: str
    keys: tuple[str, ...] = field(default=())
