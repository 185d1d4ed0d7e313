"""Objects of a dump file, one after another, whatever holds them: JSONL, one JSON document, parquet.

A file's kind is seen from its first bytes, not from its suffix. JSONL and parquet are streamed; a single JSON document
(an object, or a list of objects, over several lines) is read whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet

from rlalign.verifier.dumps.record import MISSING

_BATCH_ROWS = 256
_BLANK = " \t\r\n"
# pages are read as they are needed: a file may be one row group
_BUFFER_BYTES = 1 << 20
_CONSTANTS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
# what goes on a number, and an escape, that isn't whole
_NUMBER, _ESCAPE = re.compile(r"\.|[eE][+-]?"), re.compile(r"u[0-9a-fA-F]{0,3}")
_NOT_TEXT = {b"\x80": "a pickle", b"PK": "a zip archive, as torch.save and numpy.savez write", b"\x1f\x8b": "gzip"}


@dataclass(frozen=True, slots=True)
class Row:
    """One object of a file. line: from 1 (rows of a parquet file likewise). item: place in a list, None outside one.

    Lists of numbers are Python lists (JSON) or numpy arrays (parquet).
    """

    path: Path
    line: int
    values: dict[str, Any]
    item: int | None = None

    @property
    def source(self) -> str:
        """ "file:line" """
        return f"{self.path}:{self.line}" if self.item is None else f"{self.path}:{self.line}[{self.item}]"

    def error(self, reason: str) -> ValueError:
        """A ValueError that says where."""
        item = "" if self.item is None else f", item {self.item}"
        return ValueError(f"{self.path}, line {self.line}{item}: {reason}")


def read_rows(path: Path) -> Iterator[Row]:
    """Every object of the file, in order, as a stream.

    Raises FileNotFoundError, or ValueError naming the line for what is not JSONL, JSON or parquet.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    with path.open("rb") as file:
        magic = file.read(4)
    for start, what in _NOT_TEXT.items():
        if magic.startswith(start):
            raise ValueError(f"{path}: this is {what}; a dump is JSONL, JSON or parquet")
    yield from _parquet_rows(path) if magic == b"PAR1" else _json_rows(path)


def parse_line(path: Path, line: int, content: bytes, *, ended: bool = False) -> Iterator[Row]:
    """The objects of one line of a JSONL file: one, several if the line is a list, none if it is blank.

    ended: the line is complete, although its newline is not in ``content``.
    """
    if not content.strip():
        return
    yield from _objects(path, line, _decoded(path, content, line, ended))


def _decoded(path: Path, content: bytes, line: int | None, ended: bool = False) -> Any:
    """A line's value; ``line`` None for a document of several."""
    where = f"{path}" if line is None else f"{path}, line {line}"
    try:
        return json.loads(_text(content))
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno if line is None else line}"
        ended = ended or content.endswith(b"\n") or not (_is_begun(error) or error.msg.startswith("Unterminated"))
        cut = "" if ended else "; the file ends there, cut off or still being written (dump --watch)"
        raise ValueError(f"{where}: not valid JSON: {error.msg} (column {error.colno}){cut}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except RecursionError as error:
        raise ValueError(f"{where}: lists or objects inside each other, too deep to be read") from error
    except ValueError as error:  # a number of more digits than Python converts
        raise ValueError(f"{where}: not readable as JSON: {error}") from error


def _text(content: bytes) -> str:
    """Without what ends it: an error there is to have the line and column of what is missing, not of the next line."""
    return content.decode("utf-8-sig").rstrip(_BLANK)


def _at_the_end(error: json.JSONDecodeError) -> bool:
    return error.pos >= len(error.doc)


def _is_begun(error: json.JSONDecodeError) -> bool:
    """Whether what can't be read is the text's end, and the beginning of a value that could be."""
    rest = error.doc[error.pos : error.pos + len(max(_CONSTANTS, key=len))]
    if error.msg == "Expecting value":
        return any(one.startswith(rest) for one in _CONSTANTS)
    half = _ESCAPE if error.msg.startswith("Invalid \\u") else _NUMBER
    return _at_the_end(error) or half.fullmatch(rest) is not None


def _objects(path: Path, line: int, value: Any) -> Iterator[Row]:
    if isinstance(value, dict):
        yield Row(path, line, value)
        return
    if not isinstance(value, list):
        raise ValueError(f"{path}, line {line}: a row must be an object, is {type(value).__name__}")
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            raise ValueError(f"{path}, line {line}, item {index}: must be an object, is {type(item).__name__}")
        yield Row(path, line, item, index)


def _json_rows(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for line, content in enumerate(file, start=1):
            try:
                rows = list(parse_line(path, line, content))
            except ValueError as error:
                # a document that goes on in the next line ends its first one in the middle of something
                cause = error.__cause__
                if line > 1 or not isinstance(cause, json.JSONDecodeError) or not _at_the_end(cause):
                    raise
                document = _document(path, error, content, next(file, b""))
                break
            yield from rows
        else:
            return
    yield from _objects(path, 1, document)


def _document(path: Path, error: ValueError, first: bytes, second: bytes) -> Any:
    """The value of a file that is one document; or else of rows, by its second line, of which the first is cut off:
    then raises ``error``, which is about that one."""
    try:
        return _decoded(path, path.read_bytes(), None)
    except ValueError as of_document:
        cause = of_document.__cause__
        goes_on = isinstance(cause, json.JSONDecodeError) and _at_the_end(cause)
        if goes_on or first.strip() == b"[" or not _is_object(second):
            raise
    raise error


def _is_object(content: bytes) -> bool:
    try:
        return isinstance(json.loads(_text(content)), dict)
    except (ValueError, RecursionError):
        return False


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        with parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES) as file:
            line = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                columns = {name: _column(batch.column(name)) for name in batch.schema.names}
                for index in range(batch.num_rows):
                    line += 1
                    yield Row(path, line, {name: values[index] for name, values in columns.items()})
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from error


def _column(column: pa.Array) -> list[Any]:
    """One value per row: numpy arrays of lists of numbers, which no Python list of a million floats would match."""
    kind = column.type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        return column.to_pylist()
    numbers = _numbers(column.flatten())
    if numbers is None or column.null_count or pa.types.is_fixed_size_list(kind):
        return column.to_pylist()
    # offsets of a slice start at the slice's first value; flatten() drops what lies before it
    offsets = column.offsets.to_numpy()
    offsets = offsets - offsets[0]
    return [numbers[begin:end] for begin, end in pairwise(offsets.tolist())]


def _numbers(child: pa.Array) -> np.ndarray | None:
    """int64, float32 (null: MISSING) or bool [n]; None for what is none of these."""
    kind = child.type
    if pa.types.is_integer(kind) and not child.null_count:
        return child.cast(pa.int64()).to_numpy(zero_copy_only=False)
    if pa.types.is_boolean(kind) and not child.null_count:
        return child.to_numpy(zero_copy_only=False)
    if not pa.types.is_floating(kind):
        return None
    with np.errstate(over="ignore"):
        values = child.fill_null(0.0).to_numpy(zero_copy_only=False).astype(np.float32)
    if child.null_count:
        values[child.is_null().to_numpy(zero_copy_only=False)] = MISSING
    return values
