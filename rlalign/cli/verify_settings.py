"""``KEY=VALUE,KEY=VALUE`` of a command line as ``ScoreSettings``, and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rlalign.cli.errors import one_line
from rlalign.config import ScoringDtype
from rlalign.verifier.causes import PAD_POSITIONS
from rlalign.verifier.score import OPERATORS, Logits, ScoreSettings

_NUMERICS = ("invariant", "native")
_DTYPES = get_args(ScoringDtype)
HELP = (
    f"native, invariant, {', '.join(_DTYPES)}, decode, alone, or KEY=VALUE of model, numerics, dtype, native "
    f"({'+'.join(OPERATORS)}), attention (reference, sdpa, flex), phase (prefill, decode), batch (together, alone), "
    "chunk, padding (left_seen, middle_seen), pad_position, position_offset, response_position_offset, "
    "logits (bfloat16, float16, bfloat16_softmax, float16_softmax), config.FIELD, or a cause as attribute names it "
    "(operator.NAME: ours but for NAME by PyTorch; padding.left, …); several with commas"
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
# what attribute's causes are as settings; decode is a word of its own
_CAUSES = {
    "operators.native": "native",
    "operators.invariant": "invariant",
    "batch": "native,alone",
    "decode.alone": "native,decode,alone",
    **{f"operator.{name}": f"native={name}" for name in OPERATORS},
    **{f"dtype.{name}": name for name in _DTYPES},
    "dtype.float16": "native,float16",
    **{f"logits.{name}": f"logits={name}" for name in get_args(Logits) if name != "float32"},
    **{f"positions[{by:+d}]": f"position_offset={by}" for by in (1, -1)},
    **{f"response_positions[{by:+d}]": f"response_position_offset={by}" for by in (1, -1)},
    **{f"padding.{where}": f"padding={where}_seen" for where in ("left", "middle")},
    **{f"padding.left.uncounted[{at}]": f"padding=left_seen,pad_position={at}" for at in PAD_POSITIONS},
}
# as Python and as JSON write them
_CONSTANTS = {"None": None, "null": None, "True": True, "true": True, "False": False, "false": False}


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
    for part in ",".join(_CAUSES.get(piece.strip(), piece) for piece in text.split(",")).split(","):
        part = part.strip()
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
            config.append((key.removeprefix("config."), _value(value)))
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


def _value(text: str) -> bool | int | float | str | None:
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
