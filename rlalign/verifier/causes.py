"""The causes that ``attribute`` can tell apart: what each one is, how scoring imitates it, and what removes it.

A cause is a change to the way in which a sequence is scored. If scoring in that way gives the log-probs that a dump
reports, the engine (or the pipeline behind it) did just that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rlalign.config import ScoringDtype
from rlalign.verifier.dumps.record import DumpSequence
from rlalign.verifier.score import OPERATORS, Operator, ScoreSettings, is_processed, named_transforms

Kind = Literal["data", "sampling", "weights", "tokens", "positions", "numerics"]


@dataclass(frozen=True, slots=True)
class Way:
    """How one sequence's log-probs come about. before: so many of its first tokens are scored in these other settings.
    shift: they are those of the token so many places later. partner: they are those of this other sequence, by its
    place; None for its own. base: of the logarithm; None for e. grid: what they are rounded to, as ``scores.on_grid``
    names it; None for nothing."""

    settings: ScoreSettings = field(default_factory=ScoreSettings)
    before: tuple[int, ScoreSettings] | None = None
    shift: int = 0
    partner: int | None = None
    base: int | None = None
    grid: str | None = None


@dataclass(frozen=True, slots=True)
class Cause:
    """change: the way of the sequence at a place, with this cause in it. guessed: its value is one of many that were
    tried, so that one beside the truth removes much too: it is believed where most tokens then agree."""

    name: str
    kind: Kind
    what: str
    remedy: str
    change: Callable[[Way, int], Way]
    guessed: bool = False


def setting_cause(name: str, kind: Kind, what: str, remedy: str, *, guessed: bool = False, **values: Any) -> Cause:
    """A cause that is a change of ``ScoreSettings``, by field."""

    def changed(settings: ScoreSettings) -> ScoreSettings:
        merged = dict(values)
        if "ignore" in merged:
            merged["ignore"] = settings.ignore | frozenset(merged["ignore"])
        elif merged.get("processed"):
            merged["ignore"] = frozenset()
        if "config" in merged:
            merged["config"] = (*settings.config, *merged["config"])
        return replace(settings, **merged)

    def change(way: Way, _place: int) -> Way:
        before = None if way.before is None else (way.before[0], changed(way.before[1]))
        return replace(way, settings=changed(way.settings), before=before)

    return Cause(name, kind, what, remedy, change, guessed)


# the engine in 16 bits, with errors of its own
COARSE = ("dtype.bfloat16", "dtype.float16")
# scoring in 16 bits, the engine in float32
FINE = setting_cause(
    "dtype.float32", "numerics", "the engine computes in float32", "one dtype on both sides", dtype="float32"
)
# that frameworks give to padding: cumsum of the mask - 1, clipped at 0 or filled with 0 or 1
PAD_POSITIONS = (0, 1)
ONE_OPERATOR = "operator."
_PROCESSED = "vLLM: logprobs_mode=processed_logprobs; SGLang: leave SGLANG_RETURN_ORIGINAL_LOGPROB unset; or score raw"
_FILTER = "sample with top_p=1, top_k off, min_p=0; or report log-probs after the filters (vLLM: processed_logprobs)"
_PROMPT = "hand the engine's own prompt_token_ids to the trainer; never render or encode a prompt twice"
_POSITIONS = "derive position_ids from the attention mask (cumsum - 1) on both sides"
_MASK = "pass the attention mask with left-padded prompts"
_OURS = "same numerics on both sides (rlalign: numerics=invariant)"


FILTERS = setting_cause(
    "filters", "sampling", "temperature is in the log-probs, top-k, top-p and min-p are not", _FILTER,
    ignore=["top_k", "top_p", "min_p"],
)  # fmt: skip
CHUNKS = setting_cause(
    "chunks", "numerics", "PyTorch's operators, a few tokens at a time against a cache", _OURS,
    native=OPERATORS, chunk=8,
)  # fmt: skip
ONCE = setting_cause(
    "once", "numerics", "PyTorch's operators, whole sequences beside each other in one forward", _OURS,
    native=OPERATORS, phase="prefill", batch="together",
)  # fmt: skip
BATCH = setting_cause(
    "batch", "numerics", "PyTorch's operators, one sequence at a time rather than beside others", _OURS,
    native=OPERATORS, batch="alone",
)  # fmt: skip
DECODE = setting_cause(
    "decode", "numerics", "PyTorch's operators, decoded token by token from a cache rather than in one forward", _OURS,
    native=OPERATORS, phase="decode",
)  # fmt: skip


def sampling_causes() -> list[Cause]:
    """Transforms between logits and log-prob."""
    c = setting_cause
    return [
        c("temperature", "sampling", "the log-probs leave the temperature out", _PROCESSED, ignore=["temperature"]),
        c("top_p", "sampling", "the log-probs are not renormalised over the top-p set, if it was used", _FILTER,
          ignore=["top_p"]),
        c("top_k", "sampling", "the log-probs are not renormalised over the top-k set, if it was used", _FILTER,
          ignore=["top_k"]),
        c("min_p", "sampling", "the log-probs are not renormalised over the min-p set, if it was used", _FILTER,
          ignore=["min_p"]),
        FILTERS,
        c("raw", "sampling", "the log-probs are those of the raw logits, before any transform", _PROCESSED,
          processed=False),
        c("processed", "sampling", "the log-probs are those after all transforms, though they were taken as others",
          "say so (--processed, or a field of the dump), or ask for raw ones (vLLM: logprobs_mode=raw_logprobs)",
          processed=True),
        c("filters_first", "sampling", "top-k, top-p and min-p were taken at temperature 1, the temperature after them",
          "use one order of transforms: temperature, top-k, top-p, min-p", filters_first=True),
    ]  # fmt: skip


def without_effect(sequences: Sequence[DumpSequence], ways: Sequence[Way], cause: Cause) -> str:
    """Why one of ``sampling_causes`` makes no difference to log-probs that are scored in these ways."""
    change = cause.change(Way(), 0).settings
    settings = [way.settings for way in ways]
    taken = {is_processed(sequence, one) for sequence, one in zip(sequences, settings, strict=True)}
    if taken == {change.processed} and not (change.processed and any(one.ignore for one in settings)):
        return f"the log-probs are taken as {'processed' if change.processed else 'raw'} to begin with"
    used = [named_transforms(sequence) for sequence in sequences]
    if change.filters_first:
        with_it = ["temperature" in names and len(names) > 1 for names in used]
    else:
        with_it = [bool(names & (change.ignore or names)) for names in used]
    if not any(with_it):
        it = "both a temperature and a filter" if change.filters_first else "it" if change.ignore else "any transform"
        return f"no sequence of the dump was sampled with {it}"
    if any(is_processed(s, one) for s, one, has in zip(sequences, settings, with_it, strict=True) if has):
        return "the log-probs are taken without it to begin with"
    return "raw log-probs don't depend on it"


def weight_causes(num_previous: int) -> list[Cause]:
    """Older checkpoints, the latest first."""
    return [
        setting_cause(
            f"stale_weights[{n}]", "weights", f"sampled by previous model {n}, not by the model",
            "finish the weight sync before sampling, or score each sample with the version that sampled it "
            "(rlalign: align/policy_age)", weights=n,
        )
        for n in range(1, num_previous + 1)
    ]  # fmt: skip


def token_causes() -> list[Cause]:
    """Other tokens than those that were sampled, or another prompt in front of them."""
    c = setting_cause
    prompts = {
        "with_bos": "the engine put a BOS token in front of the prompt",
        "without_first": "the engine dropped the prompt's first token (such as a second BOS)",
        "without_last": "the engine dropped the prompt's last token",
        "reencoded": "the prompt was decoded and encoded again, to other tokens",
        "chat_template": "the chat template is around the prompt on one side only",
        "generation_prompt": "the template's generation prompt is there on one side only",
        "next": "each response belongs to the prompt of the next sequence",
        "previous": "each response belongs to the prompt of the previous sequence",
    }
    return [
        *(c(f"prompt.{name}", "tokens", what, _PROMPT, prompt=name) for name, what in prompts.items()),
        c("tokenisation", "tokens", "the response was decoded and encoded again, to other tokens",
          "train on the sampled token ids, not on their text (verl: rollout token ids; TRL: completion_ids)",
          tokens="reencoded"),
    ]  # fmt: skip


def position_causes() -> list[Cause]:
    """Which row, which position, which padding."""
    c = setting_cause
    return [
        c("target_shift[+1]", "positions", "each log-prob is read one row too late, from the token's own row",
          "read token i's log-prob from the logits at i - 1", target_shift=1),
        c("target_shift[-1]", "positions", "each log-prob is read one row too early",
          "read token i's log-prob from the logits at i - 1", target_shift=-1),
        c("response_positions[+1]", "positions", "position ids of the response are one too large", _POSITIONS,
          response_position_offset=1),
        c("response_positions[-1]", "positions", "position ids of the response are one too small", _POSITIONS,
          response_position_offset=-1),
        c("positions[+1]", "positions", "all position ids are one too large", _POSITIONS, position_offset=1),
        c("positions[-1]", "positions", "all position ids are one too small", _POSITIONS, position_offset=-1),
        c("padding.left", "positions",
          "padding before the prompt, up to the longest prompt's length, is attended to as if it were text",
          _MASK, padding="left_seen", pad_position=None),
        *(c(f"padding.left.uncounted[{place}]", "positions",
            "padding before the prompt, up to the longest prompt's length, is attended to as if it were text, under "
            f"position ids that don't count it: {place} at all padding", _MASK,
            padding="left_seen", pad_position=place) for place in PAD_POSITIONS),
        c("padding.middle", "positions",
          "padding between prompt and response, up to the longest prompt's length, is attended to as if it were text",
          "pad prompts on the left, or pass the attention mask", padding="middle_seen", pad_position=None),
    ]  # fmt: skip


def numeric_causes(dtype: ScoringDtype, *, decode: bool, native: bool = False) -> list[Cause]:
    """Arithmetic. dtype: what scoring uses. decode: also token by token, which takes a forward per token. native:
    scoring is by PyTorch's operators to begin with, which can only be exchanged for ours all together."""
    c = setting_cause
    # PyTorch's alone computes in it everywhere
    other_dtypes = {"float32": {}, "bfloat16": {}, "float16": {"native": OPERATORS}}
    # a bfloat16 model's logits lose nothing in float16
    logits = ("bfloat16",) if dtype == "bfloat16" else ("bfloat16", "float16")
    operators: dict[Operator, str] = {
        "attention": "attention (PyTorch's SDPA; vLLM: VLLM_ATTENTION_BACKEND, SGLang: --attention-backend)",
        "linear": "matrix products (PyTorch's)",
        "norm": "norms (PyTorch's)",
        "rotary": "rotary tables (PyTorch's)",
        "activation": "activations (PyTorch's)",
        "head": "the output head (PyTorch's)",
    }
    found = [
        *(one for coarse in logits for one in (
            c(f"logits.{coarse}", "numerics", f"logits are rounded to {coarse} before the softmax",
              'float32 logits: vLLM hf_overrides={"head_dtype": "float32"}, SGLang --enable-fp32-lm-head',
              logits=coarse),
            c(f"logits.{coarse}_softmax", "numerics", f"logits and their log-softmax are in {coarse}",
              "convert logits to float32 before log_softmax", logits=f"{coarse}_softmax"))),
        *(c(f"dtype.{other}", "numerics", f"the engine computes in {other}, scoring in {dtype}",
            f"one dtype on both sides (vLLM, SGLang: --dtype {dtype})", dtype=other, **beside)
          for other, beside in other_dtypes.items() if other != dtype),
        *(c(f"{ONE_OPERATOR}{name}", "numerics", f"another implementation of {what}", _OURS, native=[name])
          for name, what in operators.items() if not native),
        other_operators(native),
        BATCH,
    ]  # fmt: skip
    if decode:
        alone = c("decode.alone", "numerics", f"{DECODE.what}, one sequence at a time", _OURS, native=OPERATORS,
                  phase="decode", batch="alone")  # fmt: skip
        found += [DECODE, alone]
    return found


def other_operators(native: bool) -> Cause:
    """All operators by the other implementation: ours if scoring is ``native`` to begin with, else PyTorch's."""
    if native:
        return setting_cause("operators.invariant", "numerics", "rlalign's operators throughout", _OURS, native=())
    return setting_cause("operators.native", "numerics", "PyTorch's operators throughout", _OURS, native=OPERATORS)


def other_orders(native: bool, *, decode: bool) -> list[Cause]:
    """Other orders of summation, the most unlike first: the other implementation; and of PyTorch's operators, where
    ours can't take the model, other shapes, which they sum in another order. The one that scoring has is no other."""
    if not native:
        return [other_operators(native)]
    return [other_operators(native), DECODE if decode else CHUNKS, ONCE, BATCH]
