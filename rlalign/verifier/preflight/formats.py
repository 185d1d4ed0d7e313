"""Configuration files of rlalign, verl, TRL and vLLM as sides, by tables of their keys.

A key is judged, known to be harmless, or listed as not judged; none is ignored. Tables follow the public arguments of
vLLM 0.10 and later, TRL 0.20 and later, and verl 0.5 and later; a key that they don't know is listed, never guessed.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import yaml

from rlalign.config import config_from_dict, config_to_dict
from rlalign.verifier.preflight.side import SAMPLING, Name, Setting, Side
from rlalign.verifier.preflight.tables import BOTH, FORMATS, Format, count

Role = Literal["rollout", "train"]
# how many times the settings that the right format has more than a wrong one
_FAR_MORE = 2


class _EachKeyOnce(yaml.SafeLoader):
    """YAML's own loader keeps the last of two equal keys, without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for key in keys if key != "<<" and keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"{twice} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_sides(path: Path, *, format: str | None = None) -> dict[Role, Side]:
    """The sides that a file describes: both, or only the rollout of an engine's own arguments.

    format: "rlalign", "verl", "trl" or "vllm"; None tells by content. Raises FileNotFoundError, or ValueError naming
    the file and what in it can't be used.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is a folder, not a file" if path.is_dir() else f"no such file: {path}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _EachKeyOnce)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if values is None:
        raise ValueError(f"{path}: a configuration is a mapping of settings, this file is empty")
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{path}: a configuration is a mapping of settings, this is {type(values).__name__}")
    if format not in (None, "rlalign", *FORMATS):
        raise ValueError(f"format={format!r} is not one of rlalign, {', '.join(FORMATS)}")
    name = format or _detect(path, values)
    _refuse_another(path, values, name)
    return _read_ours(path, values) if name == "rlalign" else _read_table(path, values, FORMATS[name])


def with_requests(engine: Side, client: Side) -> Side:
    """The engine's side with the sampling parameters that its client sends: a server's launch arguments have none, and
    where they name some, they describe the requests too."""
    if not client.sends or any(name in engine.settings for name in SAMPLING):
        return engine
    settings = dict(engine.settings)
    defaults = settings.pop("sampling_defaults", None)  # nothing is left to them
    unused = () if defaults is None or defaults.is_default else (defaults.key,)
    sent = {name: client.settings[name] for name in SAMPLING if name in client.settings}
    return replace(engine, settings=settings | sent, harmless=(*engine.harmless, *unused))


def _detect(path: Path, values: Mapping[str, Any]) -> str:
    """The framework whose unmistakable key is there; several or none is a ValueError that says how to choose."""
    flat = {_snake(key) for key in _flat(values)}
    if "numerics" in values or ({"engine", "trainer", "align"} & values.keys() and "actor_rollout_ref" not in values):
        return "rlalign"
    found = [name for name, one in FORMATS.items() if any(_covers(mark, key) for mark in one.marks for key in flat)]
    if not found:
        known = _known_keys(values)
        near = max(known, key=known.__getitem__)
        hint = f": {known[near]} of its {len(flat)} settings are also {near}'s" if known[near] else ""
        raise ValueError(
            f"{path}: not recognised as rlalign, {', '.join(FORMATS)}; give --rollout-format, --train-format{hint}"
        )
    # TRL's vllm_* settings stand in a file of TRL's: the first match of the table is the more particular one
    return found[0]


def _refuse_another(path: Path, values: Mapping[str, Any], name: str) -> None:
    """Raises ValueError if another format than ``name`` has far more of a file's settings: frameworks share names, and
    what remains of the file would be defaults."""
    known = _known_keys(values)
    best = max(known, key=known.__getitem__)
    if known[best] > _FAR_MORE * known[name]:
        raise ValueError(
            f"{path}: of its {len(_flat(values))} settings {name} has {known[name]}, {best} {known[best]}: "
            f"read it as {best}"
        )


def _known_keys(values: Mapping[str, Any]) -> dict[str, int]:
    """How many of a file's settings each format has."""
    ours = _flat(config_to_dict(config_from_dict({})))
    known = {"rlalign": sum(key in ours for key in _flat(values))}
    for name, table in FORMATS.items():
        keys = {_snake(key) for key in _flat(values, whole=table.keys)}
        known[name] = sum(
            key in table.keys or key in table.length or any(_covers(pattern, key) for pattern in table.harmless)
            for key in keys
        )
    return known


def _read_table(path: Path, values: Mapping[str, Any], table: Format) -> dict[Role, Side]:
    found: dict[Role, dict[Name, Setting]] = {role: {} for role in table.roles}
    rest: list[str] = []
    harmless: list[str] = []
    parts: dict[str, Setting] = {}
    length: list[Setting] = []
    flat = _flat(values, whole=table.keys)
    stated = {_snake(raw): value for raw, value in flat.items()}
    for raw, value in flat.items():
        key = _snake(raw)
        if table.idle(key, stated):
            harmless.append(raw)
        elif key in table.keys:
            if value is None:  # written down, and left to the framework
                continue
            for role, name, read in _targets(table, key):
                setting = Setting(_read(path, raw, value, read), raw)
                if name == "updates_per_sync":
                    parts[key.rpartition(".")[2]] = setting
                else:
                    _put(found[role], name, setting)
        elif key in table.length:
            if value is not None:
                length.append(Setting(_read(path, raw, value, count), raw))
        elif any(_covers(pattern, key) for pattern in table.harmless):
            harmless.append(raw)
        else:
            rest.append(raw)
    if len(rest) == len(flat):  # all would be defaults
        raise ValueError(f"{path}: none of its settings is one of {table.name}'s: {', '.join(rest[:3])}")
    updates, used = table.updates({name: part.value for name, part in parts.items()})
    if updates is not None:
        found["train"]["updates_per_sync"] = Setting(
            updates, ", ".join(parts[name].key for name in parts if name in used)
        )
    rest += [part.key for name, part in parts.items() if name not in used]
    if len(length) == len(table.length) > 0:
        _limit(found, length)
    else:
        rest += [part.key for part in length]
    if table.overrides is not None:
        fields = {_snake(key): value for key, value in _flat(values).items()}
        fields = {key.removeprefix(table.overrides): fields[key] for key in fields if key.startswith(table.overrides)}
        text = json.dumps(fields, default=str) if fields else None
        found["train"]["model_overrides"] = Setting(text, table.overrides.rstrip("."))
    sends = "train" in table.roles
    for role, defaults in table.defaults.items():
        says = sends or any(name in found[role] for name in SAMPLING)
        for name, value in defaults.items():
            if name not in found[role] and (says or name not in SAMPLING):
                found[role][name] = Setting(value, f"{table.name}'s own", is_default=True)
    table.finish(found)
    title = f"{path} ({table.name})"
    known = tuple(key for key in (*table.keys, *table.length, *table.harmless) if key not in stated and "*" not in key)
    return {role: Side(title, settings, tuple(rest), tuple(harmless), known, sends) for role, settings in found.items()}


def _put(settings: dict[Name, Setting], name: Name, setting: Setting) -> None:
    """Several keys may feed one setting: edits of logits add up."""
    before = settings.get(name)
    if before is not None and isinstance(before.value, tuple) and isinstance(setting.value, tuple):
        setting = Setting((*before.value, *setting.value), f"{before.key}, {setting.key}")
    elif before is not None and setting.value is None:  # a switch that is off takes nothing back
        return
    settings[name] = setting


def _limit(found: dict[Role, dict[Name, Setting]], length: Sequence[Setting]) -> None:
    """Of sequences, by what their parts may have; an engine's own limit counts where it is lower."""
    whole = Setting(sum(part.value for part in length), ", ".join(part.key for part in length))
    for settings in found.values():
        own = settings.get("max_length")
        settings["max_length"] = whole if own is None or own.value > whole.value else own


def _targets(table: Format, key: str) -> Iterator[tuple[Role, Name, Callable[[str, Any], Any]]]:
    role, name, read = table.keys[key]
    for one in table.roles if role == BOTH else (role,):
        yield one, name, read


def _read(path: Path, key: str, value: Any, read: Callable[[str, Any], Any]) -> Any:
    try:
        return read(key, value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {key}={value!r}: {error}") from error


def _read_ours(path: Path, values: Mapping[str, Any]) -> dict[Role, Side]:
    """Both sides of a file of ours: a run's config.yaml, or a part of it over the defaults."""
    known = config_to_dict(config_from_dict({}))
    if "defaults" in values:
        raise ValueError(
            f"{path}: a page that hydra composes; give settings that are resolved: a run's config.yaml, or what "
            "python recipes/grpo.py --cfg job prints"
        )
    if unknown := [key for key in values if key not in known]:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{path}: {unknown[0]}: no such setting{hint}")
    try:
        config = config_from_dict(dict(values))
    except ValueError as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    model, sampling, algorithm = config.model, config.sampling, config.algorithm
    stated = set(_flat(values))
    settings: dict[Name, Setting] = {}

    def say(name: Name, value: Any, key: str) -> None:
        if value is not None:
            settings[name] = Setting(value, key, is_default=key not in stated)

    for name in ("temperature", "top_p", "top_k", "min_p"):
        say(name, getattr(sampling, name), f"sampling.{name}")  # type: ignore[arg-type]
    invariant = config.numerics == "invariant"
    say("model", None if model.path is None else str(model.path), "model.path")
    say("dtype", model.dtype, "model.dtype")
    say("numerics", "rlalign, invariant" if invariant else "native", "numerics")
    say("prefix_cache", config.engine.prefix_cache, "engine.prefix_cache")
    say("chunked_prefill", True, "engine.prefill_chunk")
    say("attention", None if config.attention is None else config.attention["_target_"], "attention")
    say("updates_per_sync", algorithm.epochs * algorithm.minibatches, "algorithm.minibatches")
    say("seed", config.run.seed, "run.seed")
    say("logprobs", "processed", "")
    say("max_length", config.engine.max_model_len, "engine.max_model_len")
    # every key of ours is either above or changes no log-prob: that is what the schedule's tests show
    judged = {setting.key for setting in settings.values()}
    harmless = tuple(sorted(stated - judged))
    side = Side(f"{path} (rlalign)", settings, (), harmless)
    return {"rollout": side, "train": side}


def _flat(values: Mapping[str, Any], prefix: str = "", *, whole: Container[str] = ()) -> dict[str, Any]:
    """Dotted keys of nested mappings; an empty one, or one that is named in ``whole``, is a value of its own."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value and _snake(f"{prefix}{key}") not in whole:
            flat |= _flat(value, f"{prefix}{key}.", whole=whole)
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _snake(key: str) -> str:
    """A command line's spelling as a file's, ``tensor-parallel-size``; hydra's ``+`` of an added key is dropped."""
    return key.removeprefix("--").replace("-", "_").replace("+", "")


def _covers(pattern: str, key: str) -> bool:
    return fnmatchcase(key, pattern)
