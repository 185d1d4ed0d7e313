"""``KEY=VALUE,KEY=VALUE`` of a command line as ``ScoreSettings``, and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rlalign.cli.errors import one_line
from rlalign.config import ScoringDtype
from rlalign.verifier.score import OPERATORS, ScoreSettings

_NUMERICS = ("invariant", "native")
_DTYPES = get_args(ScoringDtype)
HELP = (
    f"native, invariant, {', '.join(_DTYPES)}, decode, alone, or KEY=VALUE of model, numerics, dtype, native "
    f"({'+'.join(OPERATORS)}), attention (reference, sdpa, flex), phase (prefill, decode), batch (together, alone), "
    "chunk, padding (left_seen, middle_seen), pad_position, position_offset, response_position_offset, "
    "logits (bfloat16), config.FIELD; several with commas"
)
_WORDS = {
    **{name: ("numerics", name) for name in _NUMERICS},
    **{name: ("dtype", name) for name in _DTYPES},
    **{name: ("phase", name) for name in ("prefill", "decode")},
    **{name: ("batch", name) for name in ("together", "alone")},
}
_PLAIN = (
    "dtype", "attention", "phase", "batch", "chunk", "padding", "pad_position", "position_offset",
    "response_position_offset", "logits",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class NamedSetting:
    """What a user called a side, and what it means. model: None for the command's own."""

    text: str
    settings: ScoreSettings
    model: Path | None


def parse_setting(option: str, text: str) -> NamedSetting:
    """Raises ValueError naming ``option``: for a word or key that is unknown, with those that are; for a value out of
    bounds; for two parts that contradict each other."""
    values: dict[str, Any] = {}
    config: list[tuple[str, Any]] = []
    model: Path | None = None
    said: dict[str, tuple[str, str]] = {}
    for part in (piece.strip() for piece in text.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            if part not in _WORDS:
                raise ValueError(f"{option} {text!r}: {part!r} is unknown; a setting is one of: {HELP}")
            key, value = _WORDS[part]
        # numerics and native are one switch, by its word or by its operators
        before = said.setdefault("native" if key == "numerics" else key, (value, part))
        if before[0] != value:
            raise ValueError(f"{option} {text!r}: {before[1]!r} and {part!r} contradict each other")
        if key == "model":
            model = Path(value)
        elif key.startswith("config."):
            config.append((key.removeprefix("config."), _number(value)))
        elif key == "numerics" and value in _NUMERICS:
            values["native"] = OPERATORS if value == "native" else ()
        elif key == "native":
            values["native"] = value.split("+")
        elif key in _PLAIN:
            values[key] = value
        else:
            raise ValueError(f"{option} {text!r}: {part!r} is unknown; a setting is one of: {HELP}")
    try:
        return NamedSetting(text, ScoreSettings(**values, config=tuple(config)), model)
    except ValueError as error:
        raise ValueError(f"{option} {text!r}: {one_line(error)}") from error


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
