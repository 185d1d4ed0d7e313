"""How a sequence of a dump is scored: every switch that can make two engines' log-probs differ, in one frozen record.

The verifier knows no model. Whoever does passes in a ``Scorer``; rlalign/cli/scoring.py has the one over our policies.
The defaults of ``ScoreSettings`` are the plain case: the model itself, our operators, whole sequences in one forward,
every transform that the dump names. Legend: L response tokens of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Literal, Protocol, get_args

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from rlalign.config import SamplingParams, ScoringDtype
from rlalign.verifier.dumps.record import DumpSequence

Operator = Literal["attention", "linear", "norm", "rotary", "activation", "head"]
Logits = Literal["float32", "bfloat16", "bfloat16_softmax", "float16", "float16_softmax"]
Transform = Literal["temperature", "top_k", "top_p", "min_p"]
OPERATORS: tuple[Operator, ...] = get_args(Operator)
TRANSFORMS: tuple[Transform, ...] = get_args(Transform)
_OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


class UnsupportedSetting(ValueError):
    """A scorer can't serve a setting here (no tokenizer, no second checkpoint, …); the message says why."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ScoreSettings:
    """One way to turn a sequence into log-probs. Hashable: scorers and their callers cache by it.

    Example:
        >>> ScoreSettings(native=OPERATORS) == ScoreSettings(native=reversed(OPERATORS))
        True
    """

    weights: int = Field(0, ge=0)
    """0: the model; n: the n-th of the previous models."""
    cached: tuple[int, ...] = ()
    """Of every sequence, how many first tokens, the prompt's counted, have keys and values of the weights
    ``cached_by``, as after an update in flight. Response tokens that these rows predict are left without a log-prob."""
    cached_by: int = Field(0, ge=0)
    config: tuple[tuple[str, bool | int | float | str | None], ...] = ()
    """Fields of config.json that are replaced, such as ("rms_norm_eps", 1e-5); a dot steps into an object."""
    dtype: ScoringDtype | None = None
    """Of weights and activations; None: the scorer's own."""
    native: frozenset[Operator] = frozenset()
    """Operators that PyTorch computes in place of ours."""
    attention: Literal["reference", "sdpa", "flex"] | None = None
    """The inner attention; None: what ``native`` says."""
    phase: Literal["prefill", "decode"] = "prefill"
    """decode: the response token by token against a cache, as an engine does."""
    batch: Literal["together", "alone"] = "together"
    """Sequences beside each other in one forward, or one by one."""
    chunk: int | None = Field(None, ge=1)
    """Most tokens of a sequence in one forward, against a cache; of its prompt if it is decoded. None: all at once."""
    padding: Literal["none", "left_seen", "middle_seen"] = "none"
    """Padding that attention sees, as without a mask: before the prompt, or between prompt and response."""
    pad_to: int | None = Field(None, ge=1)
    """Tokens of prompt and padding together, of a longer prompt its own; None: the longest prompt's."""
    pad_position: int | None = Field(None, ge=0)
    """Position id of all padding, which the others then don't count; None: they do."""
    position_offset: int = 0
    """Added to every position id."""
    response_position_offset: int = 0
    """Added to the position ids of response tokens only."""
    processed: bool | None = None
    """False: no transform at all; True: those of the sampling parameters; None: as the dump says, else True."""
    ignore: frozenset[Transform] = frozenset()
    """Transforms left out of the log-prob, although the token was sampled with them."""
    temperature: float | None = Field(None, gt=0)
    """In place of the dump's, as are the next three."""
    top_k: int | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    filters_first: bool = False
    """top-k, top-p and min-p at temperature 1, and the temperature after them."""
    slack: float = 0.0
    """Filters keep what they might keep if every probability were wrong by a factor of up to e**slack: their bounds are
    loosened, and what is within ``slack`` of the least likely kept token is kept too. Negative: bounds are tightened,
    so that only what is kept in any case is."""
    logits: Logits = "float32"
    """What logits are rounded to; bfloat16_softmax, float16_softmax: log-softmax and its result too."""
    target_shift: Literal[-1, 0, 1] = 0
    """The token's log-prob is read so many rows later than the row that predicts it."""
    prompt: Literal[
        "as_dumped",
        "without_first",
        "with_bos",
        "without_last",
        "reencoded",
        "chat_template",
        "generation_prompt",
        "next",
        "previous",
    ] = "as_dumped"
    """Another prompt in front of the same response; generation_prompt: with the template's opening of an answer where
    it had none, or without it; next, previous: that of the neighbour in the dump."""
    tokens: Literal["as_dumped", "reencoded"] = "as_dumped"
    """reencoded: the response's ids decoded to text and encoded again, where that gives as many."""

    @property
    def numerics(self) -> str:
        """ "invariant", "native", or "mixed"."""
        return "invariant" if not self.native else "native" if self.native == frozenset(OPERATORS) else "mixed"

    def describe(self) -> str:
        """The switches that are not at their default, as ``name=value``; "plain" if there are none."""
        changed = [(f.name, getattr(self, f.name)) for f in fields(self)]
        shown = [f"{name}={_shown(value)}" for name, value in changed if value != getattr(_PLAIN, name)]
        return ", ".join(shown) or "plain"


_PLAIN = ScoreSettings()


class Scorer(Protocol):
    """Scores sequences. May keep what it loaded or computed between calls, but no result may depend on that."""

    def __call__(self, sequences: Sequence[DumpSequence], settings: ScoreSettings) -> list[np.ndarray]:
        """Log-probs float32 [L] of every sequence, in order; NaN for a token that ``settings`` leave without one.

        The sequences of one call are each other's neighbours where ``settings`` ask for any. Raises UnsupportedSetting.
        """


def is_processed(sequence: DumpSequence, settings: ScoreSettings) -> bool:
    """Whether log-probs are after transforms at all. A dump that does not say is taken to be, as ours are: what other
    formats mean is decided before (dumps/distribution.py)."""
    said = sequence.processed if settings.processed is None else settings.processed
    return True if said is None else said


def named_transforms(sequence: DumpSequence) -> frozenset[Transform]:
    """Transforms that the sequence was sampled with; none of a greedy one."""
    params = sequence.sampling or SamplingParams()
    return frozenset(name for name in TRANSFORMS if not params.greedy and getattr(params, name) != _OFF[name])


def effective_sampling(sequence: DumpSequence, settings: ScoreSettings) -> SamplingParams:
    """The parameters whose transforms the log-probs of ``sequence`` are taken after, under ``settings``.

    Greedy ones (temperature 0) mean the untruncated distribution at temperature 1. A dump without parameters is taken
    to be of temperature 1 with nothing cut off. Without transforms, ``min_tokens`` bans nothing either.
    """
    params, processed = sequence.sampling or SamplingParams(), is_processed(sequence, settings)
    off = TRANSFORMS if not processed else [name for name in TRANSFORMS if name in settings.ignore]
    if not processed:
        params = replace(params, min_tokens=0)
    if not params.greedy:
        params = replace(params, **{name: _OFF[name] for name in off})
    instead = {name: value for name in TRANSFORMS if (value := getattr(settings, name)) is not None}
    if instead:
        params = replace(params, **instead)
    return _loosened(params, math.exp(settings.slack)) if settings.slack else params


def _loosened(params: SamplingParams, factor: float) -> SamplingParams:
    """What ``slack`` means for a mass: its odds. A rank stays, since one more would move the mass of all before it; who
    may have changed places with the last one kept is within ``slack`` of it."""
    return replace(
        params,
        top_p=params.top_p * factor / (params.top_p * factor + (1 - params.top_p)),
        min_p=min(1.0, params.min_p / factor),
    )


def _shown(value: object) -> str:
    if isinstance(value, frozenset):
        return "+".join(sorted(value))
    if isinstance(value, tuple):
        return "+".join(f"{one[0]}:{one[1]}" if isinstance(one, tuple) else str(one) for one in value)
    return str(value)
