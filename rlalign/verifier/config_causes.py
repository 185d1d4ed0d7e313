"""Causes that are other fields of a checkpoint's files: config.json, generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlalign.config import SamplingParams
from rlalign.verifier.causes import Cause, setting_cause

Scalar = int | float | str | None
# a field, or an object's fields all at once; where its values are from
Change = tuple[str, Scalar | tuple[tuple[str, Scalar], ...], str]

_COMMON, _OFF = "a common value", "switched off"
# by how the fields' names end
_COMMON_VALUES = {
    ("rope_theta",): (10_000.0, 500_000.0, 1_000_000.0),
    ("norm_eps", "norm_epsilon"): (1e-6, 1e-5),
}
_SWITCHES = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "clip_qkv")
# of rope_parameters, and of rope_scaling, as older files call it
_ROPE_TYPES, _NO_SCALING = (".rope_type", "rope_scaling.type"), "default"


def config_causes(changes: Sequence[Change]) -> list[Cause]:
    """One cause per change of config.json, as ``config_changes`` gives them."""
    return [_config_cause(*change) for change in changes]


def _config_cause(name: str, value: Scalar | tuple[tuple[str, Scalar], ...], origin: str) -> Cause:
    fields = [(f"{name}.{key}", one) for key, one in value] if isinstance(value, tuple) else [(name, value)]
    shown = ", ".join(f"{key}={one}" for key, one in fields)
    return setting_cause(
        f"config.{name}" + ("" if isinstance(value, tuple) else f"={value}"), "weights",
        f"computed with {shown} ({origin})", f"give both sides the same config.json: {name} differs",
        guessed=origin in (_COMMON, _OFF), config=fields,
    )  # fmt: skip


def generation_causes(defaults: Mapping[str, Any]) -> list[Cause]:
    """That requests named no sampling parameters and the engine took those of generation_config.json.

    defaults: the file's fields.
    """
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    values = {name: value for name, none in off.items() if (value := defaults.get(name)) not in (None, none)}
    if values.get("top_k") == -1:
        del values["top_k"]
    try:
        useful = bool(values) and not SamplingParams(**values).greedy
    except ValueError:  # whatever an engine made of these, it is not ours to guess
        useful = False
    if not useful:
        return []
    shown = ", ".join(f"{name}={value}" for name, value in values.items())
    return [
        setting_cause(
            "generation_config", "sampling",
            f"sampled with generation_config.json's defaults ({shown}), which the dump doesn't name",
            "put sampling parameters into the dump, or let requests name all of them (vLLM: --generation-config vllm)",
            **(off | values),
        )
    ]  # fmt: skip


def config_changes(own: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> list[Change]:
    """What of config.json may explain a difference: what other checkpoints have instead, then common values of the RoPE
    base and the norm's epsilon, then windows, soft caps and RoPE scaling switched off."""
    mine = _flat(own)
    found: list[Change] = []
    for n, other in enumerate(others, start=1):
        theirs, origin = _flat(other), f"as previous model {n}"
        names = [name for name in theirs if name in mine and theirs[name] != mine[name] and _matters(name)]
        found += [(name, value, origin) for name, value in _objects(mine, theirs).items()]
        found += [(name, theirs[name], origin) for name in names]
    for endings, values in _COMMON_VALUES.items():
        for name in (name for name in mine if name.endswith(endings) and mine[name] is not None):
            found += [(name, value, _COMMON) for value in values if value != mine[name]]
    switched_on = [name for name in mine if mine[name] is not None]
    found += [(name, None, _OFF) for name in switched_on if name.rpartition(".")[2] in _SWITCHES]
    scaled = (name for name in switched_on if name.endswith(_ROPE_TYPES) and mine[name] != _NO_SCALING)
    found += [(name, _NO_SCALING, _OFF) for name in scaled]
    unique = {(name, value): (name, value, origin) for name, value, origin in reversed(found)}
    return list(reversed(unique.values()))


def _objects(mine: Mapping[str, Scalar], theirs: Mapping[str, Scalar]) -> dict[str, tuple[tuple[str, Scalar], ...]]:
    """Objects of which more than one field is another: one by one they may mean nothing, or be refused."""
    found: dict[str, dict[str, Scalar]] = {}
    for name, value in theirs.items():
        parent, _, key = name.rpartition(".")
        if parent and mine.get(name) != value and _matters(name):
            found.setdefault(parent, {})[key] = value
    return {parent: tuple(fields.items()) for parent, fields in found.items() if len(fields) > 1}


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    found: dict[str, Scalar] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif value is None or isinstance(value, int | float | str):
            found[prefix + name] = value
    return found


_OTHER = ("num_", "max_", "_", "architectures", "id2label", "label2id")
_IGNORED = ("transformers_version", "dtype", "torch_dtype", "_name_or_path", "use_cache", "vocab_size", "hidden_size")


def _matters(name: str) -> bool:
    """Whether a field can change a log-prob of the same weights without changing their shapes."""
    return not name.startswith(_OTHER) and not name.endswith(("_token_id", *_IGNORED))
