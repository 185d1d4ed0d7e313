"""Fields of a row as arrays, checked: an error names file, line and field, and what was found there.

Log-probs may be numbers, null (missing) or the strings NaN, Infinity and -Infinity. They become float32, the precision
in which every engine computes them.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import numpy as np

from rlalign.config import SamplingParams
from rlalign.verifier.dumps.record import MISSING
from rlalign.verifier.dumps.rows import Row

_MAX_ID = 2**31 - 1
_WORDS = {"NaN": np.nan, "Infinity": np.inf, "-Infinity": -np.inf, "nan": np.nan, "inf": np.inf, "-inf": -np.inf}
_FILTERS = ("temperature", "top_k", "top_p", "min_p")
# what changes logits, or bans tokens, before a token is drawn, and the value that does nothing
_UNMODELLED = {
    "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": None, "min_tokens": 0,
    "min_new_tokens": 0, "bad_words": None, "allowed_token_ids": None, "logits_processors": None,
}  # fmt: skip
# letters of a name that may be misspelt, and of one that may be cut short
_LONG, _CUT = 8, 4
_MODES = {"raw_logprobs": False, "processed_logprobs": True}


def need(row: Row, name: str, values: Mapping[str, Any] | None = None, prefix: str = "") -> Any:
    """A field that must be there and not null; ``values`` is an object inside the row, ``prefix`` its name."""
    fields = row.values if values is None else values
    if fields.get(name) is None:
        raise row.error(f"field '{prefix}{name}' is missing; there are {', '.join(map(str, fields)) or 'no fields'}")
    return fields[name]


def ids(row: Row, name: str, value: Any) -> np.ndarray:
    """Token ids int64 [n]."""
    if isinstance(value, np.ndarray) and value.dtype == np.int64:
        array = value
    else:
        kinds = set(map(type, _listed(row, name, value)))
        if kinds - {int, np.int64}:  # a bool is an int to Python, but no token id
            bad = next(i for i, item in enumerate(value) if type(item) not in (int, np.int64))
            raise row.error(f"field '{name}[{bad}]' must be a token id, is {_short(value[bad])}")
        try:
            array = np.array(value, np.int64)
        except OverflowError as error:
            raise row.error(f"field '{name}' holds a number that is no token id: {error}") from error
    if len(array) and (int(array.min()) < 0 or int(array.max()) > _MAX_ID):
        bad = int(np.flatnonzero((array < 0) | (array > _MAX_ID))[0])
        raise row.error(f"field '{name}[{bad}]' must be a token id, is {array[bad]}")
    return array


def logprobs(row: Row, name: str, value: Any) -> np.ndarray:
    """Log-probs float32 [n], MISSING where null."""
    if isinstance(value, np.ndarray) and value.dtype == np.float32:
        return value
    items = _listed(row, name, value)
    if set(map(type, items)) <= {float, int}:
        with np.errstate(over="ignore"), suppress(OverflowError):  # below, the number that is too large is named
            return np.array(items, np.float64).astype(np.float32)
    return np.array([number(row, f"{name}[{i}]", item) for i, item in enumerate(items)], np.float32)


def number(row: Row, name: str, value: Any) -> np.float32:
    """One log-prob."""
    if value is None:
        return MISSING
    if isinstance(value, str) and value in _WORDS:
        return np.float32(_WORDS[value])
    if type(value) not in (float, int, np.float32, np.float64, np.int64):
        raise row.error(f"field '{name}' must be a log-prob, is {_short(value)}")
    try:
        with np.errstate(over="ignore"):
            return np.float32(value)
    except OverflowError as error:
        raise row.error(f"field '{name}' must be a log-prob, is {_short(value)}") from error


def mask(row: Row, name: str, value: Any) -> np.ndarray:
    """bool [n] of booleans, or of zeros and ones."""
    if isinstance(value, np.ndarray) and value.dtype == np.bool_:
        return value
    items = _listed(row, name, value)
    try:
        array = np.array(items) if len(items) else np.zeros(0, np.bool_)
    except ValueError:  # lists of several lengths
        array = np.zeros((0, 0))
    if array.ndim != 1 or array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
        raise row.error(f"field '{name}' must hold booleans or zeros and ones, is {_short(value)}")
    return array.astype(np.bool_)


def whole(row: Row, name: str, value: Any) -> int | None:
    """An integer, or None for null."""
    if value is not None and type(value) not in (int, np.int64):
        raise row.error(f"field '{name}' must be a whole number, is {_short(value)}")
    return None if value is None else int(value)


def text(row: Row, name: str, value: Any) -> str | None:
    """A string (numbers become one, as request ids are), or None for null."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int | float)):
        raise row.error(f"field '{name}' must be text, is {_short(value)}")
    return None if value is None else str(value)


def objects(row: Row, name: str, value: Any) -> Sequence[Mapping[str, Any]]:
    """A list of objects."""
    for index, item in enumerate(_listed(row, name, value)):
        if not isinstance(item, dict):
            raise row.error(f"field '{name}[{index}]' must be an object, is {_short(item)}")
    return value


def same_length(row: Row, name: str, values: Sequence[Any], other: str, length: int) -> None:
    """Raises ValueError unless the field has one value for each of ``length`` values of the field ``other``."""
    if len(values) != length:
        raise row.error(f"field '{name}' has {len(values)} values for {length} of '{other}'")


def distribution(row: Row) -> dict[str, Any]:
    """What the row says of the distribution that it was sampled from, as fields of a ``DumpSequence``."""
    return {"sampling": sampling(row), "processed": processed(row), "unmodelled": unmodelled(row)}


def unmodelled(row: Row) -> tuple[tuple[str, str], ...]:
    """Penalties, biases and bans that do something, wherever the row names them: (field, value in words)."""
    places = (*_sampling_objects(row).values(), row.values)
    found = {name: place[name] for place in places for name in _UNMODELLED if _does_something(name, place.get(name))}
    return tuple((name, _short(value)) for name, value in found.items())


def _does_something(name: str, value: Any) -> bool:
    if isinstance(value, dict):
        return any(value.values())
    return len(value) > 0 if isinstance(value, list | str | np.ndarray) else value not in (None, _UNMODELLED[name])


def _sampling_objects(row: Row) -> dict[str, Mapping[str, Any]]:
    return {name: row.values[name] for name in ("sampling", "sampling_params", "meta_info") if _is_object(row, name)}


def sampling(row: Row) -> SamplingParams | None:
    """Temperature and filters, from an object ``sampling`` or ``sampling_params``, or from the row itself.

    None if the row names none of them. vLLM's -1 for "no top-k" becomes 0.
    """
    objects_ = _sampling_objects(row)
    _refuse_near_names(row, objects_)
    places = {**objects_, "": row.values}
    name = next((name for name, place in places.items() if any(place.get(key) is not None for key in _FILTERS)), None)
    if name is None:
        # an object that names none of them leaves the engine's defaults: temperature 1, nothing cut off
        return SamplingParams() if objects_.keys() - {"meta_info"} else None
    found = {key: places[name][key] for key in _FILTERS if places[name].get(key) is not None}
    if found.get("top_k") == -1:
        found["top_k"] = 0
    try:
        return _params(**found)
    except ValueError as error:
        field = error.errors()[0] if hasattr(error, "errors") else {"loc": ("?",), "msg": str(error)}
        where = ".".join(map(str, (*([name] if name else []), *field["loc"])))
        raise row.error(f"field '{where}': {field['msg']}, is {_short(field.get('input'))}") from error


def _refuse_near_names(row: Row, objects_: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises ValueError for a name that would be one of the filters', written otherwise: it would change nothing, and
    nobody would know. Names that resemble none are the engines' own, of which there are many."""
    for place in objects_.keys() - {"meta_info"}:
        named = tuple(name for name, value in objects_[place].items() if value is not None)
        for name, meant in _near_names(named):
            raise row.error(f"field '{place}.{name}' is unknown; did you mean {meant}?")


@lru_cache(maxsize=1024)
def _near_names(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """(name, which filter it may have meant) of those that are near one."""
    found = ((name, next((known for known in _FILTERS if _is_near(name, known)), None)) for name in names)
    return tuple((name, meant) for name, meant in found if meant is not None)


def _is_near(name: str, known: str) -> bool:
    """Another spelling of ``known``, or of a long one something like it: top_p and top_a are a letter apart too."""
    bare, letters = name.lower().replace("-", "").replace("_", ""), known.replace("_", "")
    if name == known or bare == letters:
        return name != known
    if len(letters) < _LONG:
        return False
    is_cut = len(bare) >= _CUT and letters.startswith(bare)
    return is_cut or (abs(len(bare) - len(letters)) <= 2 and difflib.SequenceMatcher(None, bare, letters).ratio() > 0.8)


@lru_cache(maxsize=1024, typed=True)
def _params(**found: float) -> SamplingParams:
    return SamplingParams(**found)


def processed(row: Row) -> bool | None:
    """Whether log-probs are after the sampling transforms: ``processed``, or vLLM's ``logprobs_mode``; None unsaid."""
    if (value := row.values.get("processed")) is not None:
        if not isinstance(value, bool):
            raise row.error(f"field 'processed' must be true or false, is {_short(value)}")
        return value
    if (mode := row.values.get("logprobs_mode")) is None:
        return None
    if mode not in _MODES:
        raise row.error(f"field 'logprobs_mode' is {_short(mode)}; log-probs are {' or '.join(_MODES)}")
    return _MODES[mode]


def _is_object(row: Row, name: str) -> bool:
    value = row.values.get(name)
    if value is None or isinstance(value, dict):
        return value is not None
    raise row.error(f"field '{name}' must be an object, is {_short(value)}")


def _listed(row: Row, name: str, value: Any) -> Sequence[Any]:
    if not isinstance(value, list | np.ndarray):
        raise row.error(f"field '{name}' must be a list, is {_short(value)}")
    return value


def _short(value: Any) -> str:
    return f"{value!r:.60}"
