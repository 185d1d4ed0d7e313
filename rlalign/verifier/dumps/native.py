"""Our own schema: one sequence a line of JSONL, or a row of parquet. docs/dumps.md describes every field."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from rlalign.verifier.dumps import fields
from rlalign.verifier.dumps.options import ReadOptions
from rlalign.verifier.dumps.record import DumpSequence, missing
from rlalign.verifier.dumps.rows import Row

_GROUP_ROWS = 1024
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_SCHEMA = pa.schema([
    pa.field("id", pa.string(), nullable=False),
    pa.field("prompt_token_ids", pa.list_(pa.int64()), nullable=False),
    pa.field("token_ids", pa.list_(pa.int64()), nullable=False),
    pa.field("logprobs", pa.list_(pa.float32()), nullable=False),
    pa.field("mask", pa.list_(pa.bool_())),
    pa.field("sampling", pa.struct([
        ("temperature", pa.float64()), ("top_k", pa.int64()), ("top_p", pa.float64()), ("min_p", pa.float64()),
    ])),
    pa.field("processed", pa.bool_()),
    pa.field("weights_version", pa.int64()),
    pa.field("finish_reason", pa.string()),
    pa.field("text", pa.string()),
])  # fmt: skip


def matches(values: Mapping[str, Any]) -> bool:
    """True for a row of ids with a list of plain numbers as log-probs."""
    if values.get("token_ids") is None or "prompt_token_ids" not in values:
        return False
    listed = values.get("logprobs")
    return isinstance(listed, np.ndarray) or (isinstance(listed, list) and not any(map(_nested, listed)))


def read(row: Row, options: ReadOptions) -> Iterator[DumpSequence]:
    """One sequence per row."""
    token_ids = fields.ids(row, "token_ids", fields.need(row, "token_ids"))
    name = options.logprobs or "logprobs"
    logprobs = fields.logprobs(row, name, fields.need(row, name))
    fields.same_length(row, name, logprobs, "token_ids", len(token_ids))
    mask = row.values.get("mask")
    if mask is not None:
        mask = fields.mask(row, "mask", mask)
        fields.same_length(row, "mask", mask, "token_ids", len(token_ids))
    yield DumpSequence(
        id=fields.text(row, "id", row.values.get("id", row.values.get("request_id"))) or "",
        prompt_token_ids=fields.ids(row, "prompt_token_ids", fields.need(row, "prompt_token_ids")),
        token_ids=token_ids,
        logprobs=logprobs,
        mask=mask,
        **fields.distribution(row),
        weights_version=fields.whole(row, "weights_version", row.values.get("weights_version")),
        finish_reason=fields.text(row, "finish_reason", row.values.get("finish_reason")),
        text=fields.text(row, "text", row.values.get("text")),
        source=row.source,
    )


def write_dump(path: Path | str, sequences: Iterable[DumpSequence]) -> int:
    """Write our own schema, as a stream; returns how many sequences. Log-probs come back with the same 32 bits.

    ``.parquet`` writes parquet, ``.jsonl`` JSONL (where only the payload of a NaN is lost). Raises ValueError for
    another suffix and for two sequences of one id.
    """
    path, seen, count = Path(path), set(), 0
    check_dump_path(path)
    with _WRITERS[path.suffix](path) as writer:
        for sequence in sequences:
            if sequence.id in seen:
                raise ValueError(f"{path}: two sequences have the id {sequence.id!r}; a dump names each once")
            seen.add(sequence.id)
            writer.write(sequence)
            count += 1
    return count


def check_dump_path(path: Path) -> None:
    """Raises FileNotFoundError or ValueError if no dump can be written there, before any work is done."""
    if path.suffix not in _WRITERS:
        raise ValueError(f"{path}: a dump is written as {' or '.join(_WRITERS)}, not {path.suffix!r}")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"no such folder: {path.absolute().parent}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a file")


class _Jsonl:
    """One line a sequence; fields that nobody set are left out."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def __enter__(self) -> _Jsonl:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def write(self, sequence: DumpSequence) -> None:
        values = _plain(sequence)
        # nine digits tell every float32 from its neighbours; json would print the seventeen of a float64
        logprobs = ",".join(_number(value) for value in sequence.logprobs.tolist()) if len(sequence.logprobs) else ""
        absent = missing(sequence.logprobs)
        if absent.any():
            parts = logprobs.split(",")
            logprobs = ",".join("null" if gone else part for part, gone in zip(parts, absent, strict=True))
        head = {name: values.pop(name) for name in ("id", "prompt_token_ids", "token_ids")}
        rest = {name: value for name, value in values.items() if value is not None and name != "logprobs"}
        start, tail = json.dumps(head, allow_nan=False)[:-1], json.dumps(rest, allow_nan=False)[1:]
        self._file.write(f'{start}, "logprobs": [{logprobs}]{", " if rest else ""}{tail}\n')


class _Parquet:
    """Row groups of a thousand sequences."""

    def __init__(self, path: Path) -> None:
        self._writer = parquet.ParquetWriter(path, _SCHEMA)
        self._rows: list[DumpSequence] = []

    def __enter__(self) -> _Parquet:
        return self

    def __exit__(self, *exc: object) -> None:
        self._flush()
        self._writer.close()

    def write(self, sequence: DumpSequence) -> None:
        self._rows.append(sequence)
        if len(self._rows) >= _GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        rows, self._rows = self._rows, []
        if not rows:
            return
        lists = {
            "prompt_token_ids": _lists([row.prompt_token_ids for row in rows]),
            "token_ids": _lists([row.token_ids for row in rows]),
            "logprobs": _lists([row.logprobs for row in rows], [missing(row.logprobs) for row in rows]),
        }
        plain = [_plain(row, arrays=False) for row in rows]
        arrays = [
            lists[field.name] if field.name in lists else pa.array([row[field.name] for row in plain], field.type)
            for field in _SCHEMA
        ]
        self._writer.write_batch(pa.record_batch(arrays, schema=_SCHEMA))


_WRITERS = {".jsonl": _Jsonl, ".parquet": _Parquet}


def _lists(parts: list[np.ndarray], absent: list[np.ndarray] | None = None) -> pa.Array:
    offsets = np.cumsum([0, *map(len, parts)]).astype(np.int32)
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(np.concatenate(parts), mask=None if absent is None else np.concatenate(absent))
    )


def _plain(sequence: DumpSequence, *, arrays: bool = True) -> dict[str, Any]:
    """The record as JSON's own types, without log-probs; ``arrays`` False leaves out the ids too."""
    values: dict[str, Any] = {"id": sequence.id}
    if arrays:
        values |= {name: getattr(sequence, name).tolist() for name in ("prompt_token_ids", "token_ids")}
    values["mask"] = None if sequence.mask is None else sequence.mask.tolist()
    sampling = sequence.sampling
    values["sampling"] = None if sampling is None else {name: getattr(sampling, name) for name in _SAMPLING}
    for name in ("processed", "weights_version", "finish_reason", "text"):
        values[name] = getattr(sequence, name)
    return values


def _number(value: float) -> str:
    if value == 0:
        return repr(value)  # "-0" would come back as the integer 0, which has no sign
    return f"{value:.9g}" if np.isfinite(value) else '"NaN"' if value != value else f'"{"-" * (value < 0)}Infinity"'


def _nested(value: Any) -> bool:
    return isinstance(value, dict | list)
