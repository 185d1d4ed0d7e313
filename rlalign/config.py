"""Every setting of rlalign, as frozen, validated dataclasses. Imports nothing of ours.

The YAML groups under ``conf/`` mirror these classes field by field; an unknown key, a wrong type or a value out of
bounds is a ``pydantic.ValidationError`` (a ``ValueError``) that names the field.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, field_validator, model_validator
from pydantic.dataclasses import dataclass

Numerics = Literal["invariant", "native"]
Dtype = Literal["float32", "bfloat16"]
ScoringDtype = Literal["float32", "bfloat16", "float16"]
"""What log-probs can be judged in; on a CPU float16 is PyTorch's alone (numerics=native)."""

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=False)
# the operators' own bound: rlalign_kernels.rows
LEAST_TEMPERATURE = 1e-5
# of an engine's cache, where nobody says how many
_CACHE_TOKENS = 32_768


@dataclass(frozen=True, config=_STRICT)
class SamplingParams:
    """How one request is sampled. Order of transforms: temperature, top-k, top-p (crossing token kept), min-p.

    ``temperature=0`` is greedy: the lowest id among the maximal logits; its log-prob is the untruncated one at
    temperature 1. Anything else is at least 1e-5. ``top_k=0`` (not -1), ``top_p=1`` and ``min_p=0`` switch a filter
    off. ``seed`` None means 0.
    """

    temperature: float = Field(1.0, ge=0.0, allow_inf_nan=False)
    top_k: int = Field(0, ge=0, lt=2**63)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    min_p: float = Field(0.0, ge=0.0, lt=1.0)
    max_tokens: int = Field(16, ge=1)
    min_tokens: int = Field(0, ge=0)
    n: int = Field(1, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**64)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    raw_logprobs: bool = False
    """Also report log-probs under the untruncated temperature-1 distribution."""

    @field_validator("top_k", mode="before")
    @classmethod
    def _top_k_is_off_at_zero(cls, top_k: Any) -> Any:
        if top_k == -1:
            raise ValueError("top_k=-1 is not supported; 0 switches it off")
        return top_k

    @field_validator("temperature")
    @classmethod
    def _temperature_is_greedy_or_divides(cls, temperature: float) -> float:
        if 0.0 < temperature < LEAST_TEMPERATURE:
            raise ValueError(f"too small to divide logits by: use 0 (greedy) or at least {LEAST_TEMPERATURE}")
        return temperature

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def truncated(self) -> bool:
        """True if the support can be smaller than the vocabulary."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)


@dataclass(frozen=True, config=_STRICT)
class EngineConfig:
    """The rollout engine's schedule, of which nothing may change a token or a bit of its log-prob.

    ``max_model_len`` is the one field that is a limit, not schedule: it decides which prompts are refused, and where a
    response ends. A run's cache must hold the longest request that its settings allow (an error at the start), so that
    ``num_pages`` and ``page_size`` refuse nothing.
    """

    page_size: int | None = Field(None, ge=1)
    """Tokens per page of the cache. None: 128 on a GPU, whose kernels read so many keys at a time, else 16."""
    num_pages: int | None = Field(None, ge=1)
    """None: as many as hold 32,768 tokens."""
    max_batch_tokens: int = Field(1024, ge=1)
    """Tokens (prefill and decode together) that one forward may hold."""
    max_num_seqs: int = Field(256, ge=1)
    prefill_chunk: int = Field(512, ge=1)
    """Most prompt tokens of one sequence in one forward."""
    max_model_len: int | None = Field(None, ge=2)
    """A limit, not schedule: longest prompt + response; None takes the model's own limit, bounded by the cache."""
    prefix_cache: bool = True
    cuda_graphs: Literal["auto"] | bool = "auto"
    """Replay decode steps from CUDA graphs. auto: where they can be captured, which is numerics=invariant on a GPU;
    true refuses to run elsewhere."""

    def on(self, device: str) -> EngineConfig:
        """The same with page_size and num_pages decided for a device's type, "cuda" or another.

        Raises ValueError for CUDA graphs on another.
        """
        if self.cuda_graphs is True and device != "cuda":
            raise ValueError(f"engine.cuda_graphs=true: there are no CUDA graphs on device {device}; use auto or false")
        page_size = self.page_size or (128 if device == "cuda" else 16)
        return replace(self, page_size=page_size, num_pages=self.num_pages or max(1, _CACHE_TOKENS // page_size))


@dataclass(frozen=True, config=_STRICT)
class ModelConfig:
    """The policy: a checkpoint folder, or (``path`` None) a small Qwen3 that is made on the spot."""

    path: Path | None = None
    dtype: Dtype = "float32"
    hidden_size: int = Field(64, ge=16)
    num_layers: int = Field(2, ge=1)
    num_heads: int = Field(4, ge=1)
    num_kv_heads: int = Field(2, ge=1)
    head_dim: int = Field(16, ge=8)
    intermediate_size: int = Field(192, ge=16)
    max_position_embeddings: int = Field(512, ge=16)
    vocab_size: int | None = Field(None, ge=258)
    """Ids of a byte tokenizer that is made with the model; None takes the task's own words, if it has any."""
    warm_start_steps: int = Field(300, ge=0)
    """Supervised steps on the task's demonstrations before RL (recipes/sft.py); only for a model made on the spot."""
    warm_start_lr: float = Field(3e-3, gt=0)
    warm_start_batch: int = Field(64, ge=1)


@dataclass(frozen=True, config=_STRICT)
class TaskConfig:
    """Prompts and their verifiable reward."""

    name: Literal["sort", "gsm8k"] = "sort"
    path: Path | None = None
    """JSONL or parquet file of training prompts; the built-in task makes its own."""
    eval_path: Path | None = None
    reward: str | None = None
    """``FILE.py:function`` replaces the task's own reward."""
    max_prompt_tokens: int = Field(256, ge=1)
    num_train: int | None = Field(None, ge=1)
    """Training prompts; None takes all of the file, 4,096 of the built-in task."""
    num_eval: int = Field(128, ge=1)
    """Held-out prompts; without ``eval_path`` they are taken from ``path``, a tenth of it at most."""
    num_items: int = Field(5, ge=2, le=32)
    """Built-in task only: numbers to sort."""
    max_value: int = Field(9, ge=1)
    """Built-in task only: numbers are 0 ... max_value."""


@dataclass(frozen=True, config=_STRICT)
class AlgorithmConfig:
    """What turns rewards into a gradient."""

    adv_estimator: Literal["grpo", "gae"] = "grpo"
    group_size: int = Field(8, ge=1)
    """Samples per prompt."""
    prompts_per_step: int = Field(32, ge=1)
    normalize_std: bool = True
    """GRPO: divide the group's centred rewards by their standard deviation."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0)
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the k3 estimate of KL to the frozen reference policy; 0 loads no reference."""
    entropy_coef: float = Field(0.0, ge=0)
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    epochs: int = Field(1, ge=1)
    minibatches: int = Field(1, ge=1)
    gamma: float = Field(1.0, gt=0, le=1)
    gae_lambda: float = Field(0.95, ge=0, le=1)
    value_clip: float = Field(0.2, gt=0)
    critic_lr: float = Field(1e-3, gt=0)

    @model_validator(mode="after")
    def _group_can_be_normalized(self) -> AlgorithmConfig:
        if self.adv_estimator == "grpo" and self.group_size < 2:
            raise ValueError(
                "algorithm.group_size=1 leaves no group to normalise over: its advantage is always 0. "
                "Use group_size >= 2, or adv_estimator=gae"
            )
        return self

    @model_validator(mode="after")
    def _batch_can_be_split(self) -> AlgorithmConfig:
        if self.minibatches > (samples := self.prompts_per_step * self.group_size):
            raise ValueError(
                f"algorithm.minibatches={self.minibatches} of prompts_per_step * group_size = {samples} samples: "
                "one would be empty"
            )
        return self


@dataclass(frozen=True, config=_STRICT)
class TrainerConfig:
    """Optimizer and the packing of micro-batches. Packs by config alone, never by arrival order."""

    micro_batch_tokens: int = Field(8192, ge=1)
    gradient_checkpointing: bool = False
    lr: float = Field(1e-3, gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    grad_clip: float = Field(1.0, gt=0)
    warmup_steps: int = Field(0, ge=0)
    schedule: Literal["constant", "cosine"] = "constant"
    min_lr_ratio: float = Field(0.1, ge=0, le=1)


@dataclass(frozen=True, config=_STRICT)
class FaultConfig:
    """A planted fault, to see the verifier catch it. ``kind=none`` plants nothing."""

    kind: Literal["none", "trainer_weight", "kv_page", "position"] = "none"
    step: int = Field(1, ge=1)


@dataclass(frozen=True, config=_STRICT)
class AlertConfig:
    """Above what the tracker sends an alert; None: never. Missing log-probs and other weights always are one."""

    max_abs: float | None = Field(None, ge=0)
    """Of |Δ|. None: any differing bit with numerics=invariant, nothing with native."""
    mean_abs: float | None = Field(None, ge=0)
    k3: float | None = Field(None, ge=0)
    mult_prob_error: float | None = Field(1.05, ge=1)
    """Mean of e^|Δ|."""
    kl: float | None = Field(None, ge=0)
    """Mean over the vocabulary, of the steps in which all logits are compared."""
    wait_seconds: float = Field(3600.0, ge=0)
    """Between two alerts of one kind."""


_Cap = Annotated[float, Field(ge=1.0)]
_Above = Annotated[float, Field(gt=1.0, allow_inf_nan=False)]
_Below = Annotated[float, Field(gt=0.0, lt=1.0)]


@dataclass(frozen=True, config=_STRICT)
class Correction:
    """How the loss makes up for a mismatch (``algorithms/corrections.py``); ρ: train over rollout probability of a
    token. cap: largest weight. reject_beyond: tokens with ρ above it or below 1 over it have weight 0. veto_below: so
    have all tokens of a sequence with a ρ below it. None: never. Within these bounds ρ = 1 has the weight 1."""

    cap: _Cap = 2.0
    reject_beyond: _Above | None = None
    veto_below: _Below | None = None


@dataclass(frozen=True, config=_STRICT)
class AlignConfig:
    """What happens when rollout and trainer disagree."""

    on_mismatch: Literal["auto", "log", "warn", "dump", "halt", "correct"] = "auto"
    """auto: halt when numerics=invariant, log when native. dump and halt leave a step that can be replayed. correct:
    the loss weights every token by min(train/rollout, correction_cap)."""
    correction_cap: _Cap = Field(2.0, allow_inf_nan=False)
    """Largest importance weight of a token; only on_mismatch=correct has any."""
    reject_beyond: _Above | None = None
    """Tokens whose ratio train/rollout is above it, or below 1 over it, are left out of the loss. None: none is."""
    veto_below: _Below | None = None
    """Sequences with a token whose ratio is below it are left out of the loss. None: none is."""
    max_dumps: int = Field(1, ge=0)
    """Replayable steps that a run leaves at most, weights included."""
    worst_tokens: int = Field(10, ge=1)
    full_vocab_every: int = Field(100, ge=0)
    """Steps between comparisons of all logits of a few sequences, the first step included; 0: never."""
    full_vocab_positions: int = Field(16, ge=1)
    """Tokens of which the KL over the vocabulary is taken, where digests differ."""
    bisect_every: int = Field(200, ge=0)
    """Steps between comparisons of every layer's output on them; 0: never."""
    check_sequences: int = Field(8, ge=1)
    """Sequences that these two look at."""
    check_tokens: int = Field(4, ge=1)
    """Most response tokens of each that are decoded once more."""
    alert: AlertConfig = AlertConfig()
    fault: FaultConfig = FaultConfig()

    @property
    def correction(self) -> Correction | None:
        """None unless on_mismatch=correct."""
        if self.on_mismatch != "correct":
            return None
        return Correction(self.correction_cap, self.reject_beyond, self.veto_below)

    @model_validator(mode="after")
    def _rejection_is_a_correction(self) -> AlignConfig:
        given = [name for name in ("reject_beyond", "veto_below") if getattr(self, name) is not None]
        if given and self.on_mismatch != "correct":
            raise ValueError(f"{given[0]}={getattr(self, given[0])} is for on_mismatch=correct, not {self.on_mismatch}")
        return self


@dataclass(frozen=True, config=_STRICT)
class ClusterConfig:
    """Where the actors run."""

    address: str | None = None
    """An existing Ray to join (``auto`` or host:port); None starts a private one."""
    num_rollout_actors: int = Field(1, ge=1)
    threads: int = Field(1, ge=1)
    """CPU threads of every process: part of the plan's fingerprint on CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    peak_tflops: float | None = Field(None, gt=0)
    """TFLOP/s that the trainer's device multiplies at most, which perf/mfu is a share of; None: a known GPU's."""
    weight_transport: Literal["auto", "object_store", "cuda_ipc"] = "auto"
    """How weights reach the engines: Ray's object store in host memory, or the GPU's own memory, read by every process
    on it. auto: the latter where all actors share a GPU and the system lets them; cuda_ipc refuses to run elsewhere."""


@dataclass(frozen=True, config=_STRICT)
class TrackingConfig:
    """wandb. Offline by default: no account, no question."""

    mode: Literal["online", "offline", "disabled"] = "offline"
    project: str = "rlalign"
    name: str | None = None
    media_every: int = Field(10, ge=1)
    """Steps between pictures."""
    aliases: tuple[Literal["verl", "trl", "slime"], ...] = ()
    """Frameworks under whose names wandb gets the same values once more."""


@dataclass(frozen=True, config=_STRICT)
class EvalConfig:
    """Held-out prompts, greedy."""

    every: int = Field(0, ge=0)
    """Steps between evaluations; 0: only before the first and after the last step."""
    num_prompts: int = Field(128, ge=1)


@dataclass(frozen=True, config=_STRICT)
class RunConfig:
    """One run: its length, its seed, its folder."""

    steps: int = Field(60, ge=1)
    seed: int = Field(0, ge=0, lt=2**63)
    dir: Path | None = None
    """The run's folder; None makes runs/<recipe>-<date>-<time>."""
    resume: Path | None = None
    """A run folder to continue from its last checkpoint."""
    save_every: int = Field(20, ge=1)


@dataclass(frozen=True, config=_STRICT)
class Config:
    """A whole run; ``conf/grpo.yaml`` composes it."""

    numerics: Numerics = "invariant"
    attention: dict[str, Any] | None = None
    """The inner attention: ``_target_``, a class of rlalign/modeling, and its options. None: the operators' own."""
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    sampling: SamplingParams = SamplingParams()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    engine: EngineConfig = EngineConfig()
    trainer: TrainerConfig = TrainerConfig()
    align: AlignConfig = AlignConfig()
    cluster: ClusterConfig = ClusterConfig()
    tracking: TrackingConfig = TrackingConfig()
    eval: EvalConfig = EvalConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _fault_can_be_planted(self) -> Config:
        fault = self.align.fault
        if fault.kind != "none" and fault.step > self.run.steps:
            raise ValueError(
                f"align.fault.step={fault.step} comes after the last step, run.steps={self.run.steps}: "
                "nothing would be planted"
            )
        if fault.kind == "kv_page" and self.sampling.max_tokens == 1:
            raise ValueError(
                "align.fault.kind=kv_page with sampling.max_tokens=1: no cached key is ever read, nothing would be "
                "planted. Use max_tokens >= 2, or another kind"
            )
        return self

    @field_validator("attention")
    @classmethod
    def _attention_names_a_class(cls, settings: dict[str, Any] | None) -> dict[str, Any] | None:
        if settings is not None and not isinstance(settings.get("_target_"), str):
            raise ValueError(f"_target_={settings.get('_target_')!r} is no class's name; see conf/attention")
        return settings

    @property
    def halts_on_mismatch(self) -> bool:
        if self.align.on_mismatch == "auto":
            return self.numerics == "invariant"
        return self.align.on_mismatch == "halt"


_CONFIG = TypeAdapter(Config)


def config_from_dict(values: dict[str, Any]) -> Config:
    """Validated config of a plain nested dict. Raises ``pydantic.ValidationError`` naming every bad field."""
    return _CONFIG.validate_python(values)


def config_to_dict(config: Config) -> dict[str, Any]:
    """Plain nested dict (paths as strings) that ``config_from_dict`` takes back."""
    return _CONFIG.dump_python(config, mode="json")
