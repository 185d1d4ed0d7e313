"""Policies of one checkpoint and its relatives, loaded when a setting asks for them, with operators switched in place.

Legend: a *base* setting is what decides which weights are in memory: checkpoint, config, dtype, and whether the model
is PyTorch's own throughout.
"""

from __future__ import annotations

import json
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from rlalign.cli.near import did_you_mean
from rlalign.config import Dtype, ScoringDtype
from rlalign.modeling import AuditError, Policy, load_policy
from rlalign.modeling.inner_attention import InnerAttention, Reference, Sdpa
from rlalign.modeling.torch_attention import Flex
from rlalign.verifier.score import Operator, ScoreSettings, UnsupportedSetting

if TYPE_CHECKING:
    from torch import nn

_Key = tuple[int, tuple[tuple[str, Any], ...], ScoringDtype, bool]
# the object of config.json that holds the fields of any kind of RoPE, and those
_NEWER, _OLDER = "rope_parameters", "rope_scaling"
_ROPE_FIELDS = (
    "type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast",
    "beta_slow", "low_freq_factor", "high_freq_factor", "short_factor", "long_factor", "mscale", "mscale_all_dim",
    "truncate", "partial_rotary_factor",
)  # fmt: skip
# class names of aligned modules begin with this; what follows says which operator they run
_KINDS: tuple[tuple[str, Operator], ...] = (
    ("RotaryEmbedding", "rotary"), ("Norm", "norm"), ("Linear", "linear"), ("SiLU", "activation"),
    ("GELU", "activation"),
)  # fmt: skip


@dataclass(slots=True)
class Policies:
    """Policies by setting; those used last stay in memory.

    models: checkpoint folders, the model itself first. dtype: what ``ScoreSettings.dtype=None`` means. kept: how many
    policies are in memory at once.
    """

    models: Sequence[Path]
    dtype: ScoringDtype
    device: str = "cpu"
    kept: int = 2
    _loaded: OrderedDict[_Key, Policy] = field(default_factory=OrderedDict)

    @contextmanager
    def using(self, settings: ScoreSettings) -> Iterator[Policy]:
        """The policy of ``settings``, its operators switched for the time of the block.

        Raises UnsupportedSetting for a checkpoint that isn't there, or operators that can't be mixed here.
        """
        policy = self._policy(settings)
        with _switched(policy, settings):
            yield policy

    def _policy(self, settings: ScoreSettings) -> Policy:
        # PyTorch throughout is loaded as such, so that what is called native is what transformers computes
        key = (settings.weights, settings.config, settings.dtype or self.dtype, settings.numerics == "native")
        if key not in self._loaded:
            while len(self._loaded) >= self.kept:
                self._loaded.popitem(last=False)
            self._loaded[key] = self._load(*key)
        self._loaded.move_to_end(key)
        return self._loaded[key]

    def _load(self, weights: int, config: tuple[tuple[str, Any], ...], dtype: ScoringDtype, native: bool) -> Policy:
        if weights >= len(self.models):
            raise UnsupportedSetting(f"weights={weights}: {len(self.models) - 1} other checkpoints were given")
        if dropping := next((name for name, _ in config if "drop" in name), None):
            raise UnsupportedSetting(f"config.{dropping}: scoring has no dropout, whatever config.json says")
        transformers_logging.disable_progress_bar()
        with _with_config(self.models[weights], dict(config)) as folder:
            try:
                numerics = "native" if native else "invariant"
                return load_policy(folder, dtype=dtype, numerics=numerics, device=self.device, without_dropout=True)
            except AuditError as error:
                raise UnsupportedSetting(f"{error}") from error
            except Exception as error:  # transformers says in many ways that weights and config don't fit each other
                if not config:
                    raise
                changes = ", ".join(f"config.{name}={value}" for name, value in config)
                reason = " ".join(str(error).split())
                raise UnsupportedSetting(f"{changes}: the model can't be loaded with it: {reason}") from error


def check_architectures(a: Path, b: Path, remedy: str) -> None:
    """Raises ValueError, with what to do, for two kinds of model: their modules may bear the same names, but no setting
    and no weight sync is to blame."""
    first, second = (config_fields(folder) for folder in (a, b))
    if first.get("model_type") != second.get("model_type"):
        raise ValueError(f"{a} is of type {first.get('model_type')}, {b} of type {second.get('model_type')}; {remedy}")
    # FSDP's own class, which some saves name, is the model's
    named = (fields.get("architectures") or () for fields in (first, second))
    classes = [", ".join(one.removeprefix("FSDP") for one in names) for names in named]
    if all(classes) and classes[0] != classes[1]:  # not every file says
        raise ValueError(f"{a} is a {classes[0]}, {b} a {classes[1]}; {remedy}")


@contextmanager
def _with_config(folder: Path, changes: Mapping[str, Any]) -> Iterator[Path]:
    """``folder``, or another one with the same files and a changed config.json."""
    if not changes:
        yield folder
        return
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # with the defaults of fields that the file leaves out
    known = AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
    for name, value in changes.items():
        _replace(config, known, name, value, folder / "config.json")
    with tempfile.TemporaryDirectory(prefix="rlalign-") as scratch:
        for file in folder.iterdir():
            if file.name != "config.json" and file.is_file():
                (Path(scratch) / file.name).symlink_to(file.resolve())
        (Path(scratch) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield Path(scratch)


def _replace(config: dict[str, Any], known: Mapping[str, Any], name: str, value: Any, file: Path) -> None:
    """Set the field of ``config`` that ``name`` leads to. Raises UnsupportedSetting, with what it may have meant, for
    one that neither ``config`` nor ``known`` has."""
    *parents, last = name.split(".")
    target, defaults = config, known
    for parent in parents:
        if parent == _OLDER and target.get(parent) is None and _NEWER not in config:
            target[parent] = {}  # as null as absent where nothing is scaled
        target, defaults = target.get(parent), _object(defaults.get(parent))
        if not isinstance(target, dict):
            near = did_you_mean(name, _fields(config, known), "config.")
            raise UnsupportedSetting(f"config.{name}: {file} has no object {parent!r}{near}")
    known_scaling = parents[-1:] in ([_NEWER], [_OLDER]) and last in _ROPE_FIELDS
    if last not in target and last not in defaults and not known_scaling:
        near = did_you_mean(name, _fields(config, known), "config.")
        raise UnsupportedSetting(f"config.{name}: {file} has no such field{near}")
    target[last] = value


def _fields(config: Mapping[str, Any], known: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Names that ``_replace`` takes and that hold no object themselves."""
    for name in {**known, **config}:
        if isinstance(config.get(name), dict):
            yield from _fields(config[name], _object(known.get(name)), f"{prefix}{name}.")
        elif not isinstance(known.get(name), dict):
            yield prefix + name


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


@contextmanager
def _switched(policy: Policy, settings: ScoreSettings) -> Iterator[None]:
    """Modules of ``settings.native`` on PyTorch's operators, attention on what is asked for, and back again."""
    attention = _attention(policy, settings)
    modules = list(_to_switch(policy, settings.native)) if policy.backend != "native" else []
    before = [(module, module.rlalign_backend) for module in modules]
    layers = [module for module in policy.model.modules() if hasattr(module, "rlalign_attention")]
    attentions = [(module, module.rlalign_attention) for module in layers]
    backend = policy.backend
    try:
        for module in modules:
            module.rlalign_backend = "native"
        for module in layers if attention is not None else ():
            module.rlalign_attention = attention
        if "head" in settings.native:
            policy.backend = "native"
        yield
    finally:
        policy.backend = backend
        for module, value in before:
            module.rlalign_backend = value
        for module, value in attentions:
            module.rlalign_attention = value


def _to_switch(policy: Policy, native: frozenset[Operator]) -> Iterator[nn.Module]:
    for module in policy.model.modules():
        kind = type(module).__name__
        if kind.startswith("Aligned") and next((name for part, name in _KINDS if part in kind), None) in native:
            yield module


def _attention(policy: Policy, settings: ScoreSettings) -> InnerAttention | None:
    """What replaces the policy's inner attention; None if nothing does."""
    if settings.attention is None:
        return Sdpa() if "attention" in settings.native and policy.backend != "native" else None
    made = {"reference": Reference, "sdpa": Sdpa, "flex": lambda: Flex(compile=False)}[settings.attention]()
    made.check(policy.device, policy.dtype)
    return made


def checkpoint_dtype(folder: Path) -> Dtype:
    """What the checkpoint says that its weights are; float32 where it doesn't. ValueError for one that we don't run."""
    path, config = folder / "config.json", config_fields(folder)
    dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in get_args(Dtype):
        raise ValueError(f"{path}: dtype={dtype!r} is not supported; give --dtype, one of {', '.join(get_args(Dtype))}")
    return dtype


def config_fields(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A checkpoint's JSON. Raises FileNotFoundError for one that it doesn't have."""
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"model folder {folder} {f'has no {name}' if folder.is_dir() else 'does not exist'}")
    return json.loads(path.read_text(encoding="utf-8"))
