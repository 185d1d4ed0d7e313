"""What makes two sides' log-probs differ: one small rule per cause, in the order in which people should look at them.

A rule speaks only of what both sides state (or whose default is known); what neither rule nor default covers is listed
by ``not_stated``, so that silence is never mistaken for agreement.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from rlalign.verifier.preflight.side import NAMES, OFF, Finding, Name, Severity, Side

_ROPE: tuple[Name, ...] = ("rope_scaling", "rope_theta")
Rule = Callable[[Side, Side], Iterator[Finding]]


def check(rollout: Side, train: Side) -> list[Finding]:
    """All findings, wrong ones first, otherwise in the rules' order."""
    order: tuple[Severity, ...] = ("wrong", "differs", "note")
    found = [finding for rule in RULES for finding in rule(rollout, train)]
    return sorted(found, key=lambda finding: order.index(finding.severity))


def not_stated(rollout: Side, train: Side) -> list[tuple[Name, str]]:
    """(setting, who doesn't state it) of those that were therefore not compared."""
    if rollout is train:  # one value for both: whatever it is, it is the same
        return []
    missing = []
    for name in _COMPARED:
        silent = [role for role, side in (("rollout", rollout), ("train", train)) if side.get(name) is None]
        if silent:
            missing.append((name, " and ".join(silent)))
    return missing


def _same_bits(rollout: Side, train: Side) -> bool:
    """True if both sides run the same operators, in one order of sums whatever the batch: ours."""
    return rollout.get("numerics") == train.get("numerics") and "rlalign" in str(rollout.get("numerics"))


def _finding(severity: Severity, name: Name, rollout: Side, train: Side, why: str, remedy: str) -> Finding:
    keys = tuple(key for key in (rollout.key(name), train.key(name)) if key)
    return Finding(severity, name, rollout.show(name), train.show(name), why, remedy, keys)


def _equal(name: Name, severity: Severity, why: str, remedy: str) -> Rule:
    """Both sides must say the same; silent if one says nothing."""

    def rule(rollout: Side, train: Side) -> Iterator[Finding]:
        sides = rollout.get(name), train.get(name)
        if None not in sides and sides[0] != sides[1]:
            yield _finding(severity, name, rollout, train, why, remedy)

    return rule


def _only_off(name: Name, severity: Severity, why: str, remedy: str, *, schedule: bool = False) -> Rule:
    """The setting should be off on either side. schedule: it changes nothing where the rollout is batch-invariant."""

    def rule(rollout: Side, train: Side) -> Iterator[Finding]:
        if _same_bits(rollout, train) or (schedule and rollout.get("numerics") not in (None, "native")):
            return
        if any(side.get(name) not in (None, False) for side in (rollout, train)):
            yield _finding(severity, name, rollout, train, why, remedy)

    return rule


def _quantization(rollout: Side, train: Side) -> Iterator[Finding]:
    if (rollout.get("quantization") or None) != (train.get("quantization") or None):
        why = "one side computes with rounded weights: another model, by far more than rounding of sums"
        yield _finding("wrong", "quantization", rollout, train, why, "the same weights on both sides; no quantization")
    if (cache := rollout.get("kv_cache_dtype")) not in (None, "auto", rollout.get("dtype")):
        why = f"keys and values are rounded to {cache} in the cache, but never in the trainer's forward"
        yield _finding("wrong", "kv_cache_dtype", rollout, train, why, "kv_cache_dtype: auto")


def _model_overrides(rollout: Side, train: Side) -> Iterator[Finding]:
    """Fields of config.json that the engine alone changes, and RoPE's that either does; what else only the trainer
    changes is listed as not judged."""
    ours, rope = _rope_fields(rollout) | _config_fields(rollout.get("model_overrides")), _rope_fields(train)
    theirs = rope | _config_fields(train.get("model_overrides"))
    differing = [name for name in ours | rope if ours.get(name) != theirs.get(name)]
    if not differing:
        return
    # the head's dtype is no other model: it only rounds logits elsewhere
    only_head = differing == ["head_dtype"]
    changes, other = ("engine", "trainer") if ours.keys() & set(differing) else ("trainer", "engine")
    why = (
        "the engine's head computes in another precision than the checkpoint's config.json says"
        if only_head
        else f"the {changes} runs another model than the checkpoint's config.json: {', '.join(differing)}"
    )
    remedy = f"the same overrides in the {other}, or none"
    shown = [", ".join(f"{name}={fields[name]}" for name in differing if name in fields) for fields in (ours, theirs)]
    keys = [side.key(name) for name in ("model_overrides", *_ROPE) for side in (rollout, train)]
    yield Finding("note" if only_head else "wrong", "model_overrides", shown[0] or "not stated",
                  shown[1] or "not stated", why, remedy, tuple(key for key in keys if key))  # fmt: skip


def _rope_fields(side: Side) -> dict[str, Any]:
    """Those that a side names as settings of their own."""
    stated = {name: value for name in _ROPE if (value := side.get(name)) is not None}
    return _config_fields(stated)


def _config_fields(overrides: Any) -> dict[str, Any]:
    """Flat fields of overrides, an object or its JSON; RoPE's by one name, whichever object a version keeps them in."""
    if isinstance(overrides, str):
        try:
            overrides = json.loads(overrides)
        except ValueError:
            return {overrides: None}  # a callable's name, for one: nothing equals it
    fields: dict[str, Any] = {}
    for name, value in (overrides or {}).items():
        value = _parsed(value)
        if isinstance(value, dict) and value:
            rope = name in ("rope_scaling", "rope_parameters")
            fields |= {key if rope else f"{name}.{key}": inner for key, inner in _config_fields(value).items()}
        else:
            name = name.removeprefix("rope_scaling.").removeprefix("rope_parameters.")
            fields["rope_type" if name == "type" else name] = value
    if fields.get("rope_type") == "default":
        del fields["rope_type"]  # which is what none says too
    return fields


def _parsed(value: Any) -> Any:
    """A value that was written as text: YAML reads 5e6 as such, and a command line all of them."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _logprobs(rollout: Side, train: Side) -> Iterator[Finding]:
    if (reported := rollout.get("logprobs")) in ("raw_logits", "processed_logits"):
        why = "logits, not log-probs: what is reported lacks the normalisation over the vocabulary"
        remedy = f"logprobs_mode: {reported.replace('logits', 'logprobs')}"
        yield _finding("wrong", "logprobs", rollout, train, why, remedy)


def _temperature(rollout: Side, train: Side) -> Iterator[Finding]:
    temperature, trained = rollout.get("temperature"), train.get("temperature")
    if temperature is None or trained is None:
        return
    if temperature == 0:
        why = "greedy: the log-prob of a forced choice says nothing about the distribution that the trainer scores"
        severity: Severity = "note" if trained in (0, 1) else "wrong"  # a greedy token is scored at temperature 1
        yield _finding(severity, "temperature", rollout, train, why, "a temperature above 0 for training")
        return
    raw = rollout.get("logprobs") == "raw"
    if temperature != trained:
        why = "the trainer scores another distribution than the one that was sampled from"
        remedy = f"temperature {temperature:g} on the trainer's side"
        if raw and temperature != 1:
            why += (
                ", though raw log-probs, which are those at temperature 1, agree with it"
                if trained == 1
                else "; raw log-probs are of a third one, that of temperature 1"
            )
            remedy += ", with logprobs_mode: processed_logprobs, or temperature 1 on both"
        yield _finding("wrong", "temperature", rollout, train, why, remedy)
    elif raw and temperature != 1:
        why = "raw log-probs are those at temperature 1, the trainer divides its logits by its temperature"
        remedy = "logprobs_mode: processed_logprobs, or temperature 1"
        yield _finding("wrong", "temperature", rollout, train, why, remedy)


def _truncation(rollout: Side, train: Side) -> Iterator[Finding]:
    for name in ("top_p", "top_k", "min_p"):
        value, trained = rollout.get(name), train.get(name)
        if value in (None, OFF[name]) or (value == trained and rollout.get("logprobs") != "raw"):
            continue
        if rollout.get("logprobs") == "raw":
            why = "sampled from a truncated distribution, reported under the whole one: the numbers may agree, but " \
                  "they are not those of the distribution that was sampled"  # fmt: skip
            yield _finding(
                "note", name, rollout, train, why, f"{name} {OFF[name]:g}, or processed log-probs on both sides"
            )
        else:
            why = "reported over the kept tokens only, but the trainer is not known to cut and renormalise likewise"
            yield _finding(
                "wrong", name, rollout, train, why, f"{name} {OFF[name]:g}, or the same support in the trainer"
            )


def _sampler_only(rollout: Side, train: Side) -> Iterator[Finding]:
    for name in ("penalties", "logit_edits"):
        if (value := rollout.get(name)) and value != train.get(name):
            raw = rollout.get("logprobs") == "raw"
            severity: Severity = "note" if raw else "wrong"
            why = "the sampler changes logits by rules that the trainer's forward doesn't know"
            why += "; raw log-probs are from before them, not those of the distribution that was sampled" if raw else ""
            yield _finding(severity, name, rollout, train, why, "leave it out while training")
    defaults = rollout.settings.get("sampling_defaults")
    if defaults is not None and defaults.value != "vllm":
        why = "sampling settings that a request leaves out are taken from there, unseen by the trainer"
        yield _finding("note", "sampling_defaults", rollout, train, why, "generation_config: vllm")


def _numerics(rollout: Side, train: Side) -> Iterator[Finding]:
    ours, theirs = rollout.get("numerics"), train.get("numerics")
    if None in (ours, theirs) or _same_bits(rollout, train):
        return
    if ours == theirs == "native":
        why = (
            "sums are taken in an order that depends on the batch: rounding differs between decode and a packed forward"
        )
        yield _finding(
            "differs", "numerics", rollout, train, why, "batch-invariant operators on both sides, such as ours"
        )
    else:
        why = "batch-invariant on one side only, or by other kernels: each repeats itself, but the two differ"
        yield _finding("differs", "numerics", rollout, train, why, "the same batch-invariant operators on both sides")


def _max_length(rollout: Side, train: Side) -> Iterator[Finding]:
    limit, trained = rollout.get("max_length"), train.get("max_length")
    if limit is not None and trained is not None and limit > trained:
        why = f"sequences of more than {trained:,} tokens are cut, or refused, on the trainer's side only"
        yield _finding("wrong", "max_length", rollout, train, why, f"a limit of {trained:,} for the rollout")


def _parallel(name: Name) -> Rule:
    def rule(rollout: Side, train: Side) -> Iterator[Finding]:
        sides = rollout.get(name) or 1, train.get(name) or 1
        if sides != (1, 1):
            why = "a sum that is split over GPUs is added in another order" + (
                "" if sides[0] == sides[1] else ", and split differently on the two sides"
            )
            yield _finding("differs", name, rollout, train, why, f"{name} 1, or the same size and order of reduction")

    return rule


def _weights(rollout: Side, train: Side) -> Iterator[Finding]:
    if (updates := train.get("updates_per_sync") or 1) > 1 and not _same_bits(rollout, train):
        why = f"up to {updates:g} updates between two weight syncs: later log-probs are of newer weights"
        remedy = "compare before the first update of a batch, or look at policy age"
        yield _finding("note", "updates_per_sync", rollout, train, why, remedy)
    if (stale := train.get("staleness") or 0) > 0:
        why = (
            f"samples of older weights are used, up to a share of {stale:g} of those between two syncs: a difference "
            "of weights, not of arithmetic"
        )
        yield _finding("wrong", "staleness", rollout, train, why, "staleness_threshold 0 while looking for a mismatch")
    if bool(rollout.get("lora")) or bool(train.get("lora")):
        why = "merged into the weights on one side and added beside them on the other, an adapter rounds differently"
        yield _finding("differs", "lora", rollout, train, why, "merge on both sides, or on neither")
    if train.get("correction"):
        why = "importance correction weighs the mismatch down, and hides it from the loss"
        yield _finding("note", "correction", rollout, train, why, "keep it, but look at the ratio before it is applied")


def _seed(rollout: Side, train: Side) -> Iterator[Finding]:
    if rollout.get("seed") is None:
        why = "without a seed the same samples can't be drawn again to look into them"
        yield _finding("note", "seed", rollout, train, why, "a seed for the rollout")


_BITS = "another order of sums: the last bits differ"
RULES: tuple[Rule, ...] = (
    _equal("model", "wrong", "another model", "the same checkpoint on both sides"),
    _equal("tokenizer", "wrong", "another tokenizer gives other token ids", "the same tokenizer on both sides"),
    _equal("chat_template", "wrong", "another template gives other prompts", "the same chat template on both sides"),
    _equal("dtype", "wrong", "weights and activations have another precision", "the same dtype on both sides"),
    _quantization,
    _model_overrides,
    _logprobs,
    _temperature,
    _truncation,
    _sampler_only,
    _max_length,
    _weights,
    _numerics,
    _equal("logits_dtype", "differs", "logits are rounded to another precision before the softmax",
           "logits in float32 on both sides"),
    _equal("attention", "differs", "another attention kernel adds in another order", "the same kernel on both sides"),
    _only_off("logits_dtype", "note", "the trainer's head computes in another precision; the rollout's is not stated",
              "logits in float32 on both sides"),
    _only_off("speculative", "differs", "drafted tokens are verified in wider forwards than they are decoded in",
              "no speculative decoding while training"),
    _only_off("chunked_prefill", "differs", f"a prompt is split where the schedule likes: {_BITS}",
              "enable_chunked_prefill: false, or batch-invariant operators", schedule=True),
    _only_off("prefix_cache", "differs", f"a cached prefix was computed in another batch: {_BITS}",
              "enable_prefix_caching: false, or batch-invariant operators", schedule=True),
    _only_off("cuda_graphs", "differs", f"padding to a graph's batch size may pick other kernels: {_BITS}",
              "enforce_eager: true, or batch-invariant operators", schedule=True),
    _only_off("compile", "differs", f"compiled code fuses, and may add in another order: {_BITS}",
              "no compilation, or the same on both sides"),
    _only_off("fused_kernels", "differs", f"a fused loss or layer is another kernel: {_BITS}",
              "the same kernels on both sides"),
    _parallel("tensor_parallel"),
    _parallel("pipeline_parallel"),
    _parallel("sequence_parallel"),
    _only_off("expert_parallel", "differs", f"experts are added up over GPUs: {_BITS}", "no expert parallelism"),
    _seed,
)  # fmt: skip

# settings on which a comparison needs both sides' word
_COMPARED: tuple[Name, ...] = tuple(
    name
    for name in NAMES
    if name in ("model", "dtype", "logits_dtype", "attention", "temperature", "top_p", "top_k", "min_p", "numerics",
                "chat_template", "tokenizer", "max_length")
)  # fmt: skip
