"""Rows of a data file, and the prompts inside them. Every error names file, line and field."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Row:
    """One object of a file; ``line`` counts from 1 (rows of a parquet file likewise)."""

    path: Path
    line: int
    values: dict[str, Any]

    def error(self, reason: str) -> ValueError:
        """A ValueError that says where."""
        return ValueError(f"{self.path}, line {self.line}: {reason}")

    def text(self, name: str) -> str:
        """A field that must be a non-empty string; dots step into objects. Raises ValueError."""
        value: Any = self.values
        for part in name.split("."):
            if not isinstance(value, dict) or value.get(part) is None:
                raise self.error(f"field {name!r} is missing")
            value = value[part]
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"field {name!r} must be non-empty text, is {value!r:.60}")
        return value


def read_rows(path: Path) -> list[Row]:
    """All rows of a ``.jsonl``/``.json`` lines file or a ``.parquet`` file.

    Raises FileNotFoundError, or ValueError for an empty or malformed file or another suffix.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    readers = {".jsonl": _jsonl, ".json": _jsonl, ".parquet": _parquet}
    if path.suffix not in readers:
        raise ValueError(f"{path}: unknown suffix {path.suffix!r}; supported are {', '.join(readers)}")
    rows = list(readers[path.suffix](path))
    if not rows:
        raise ValueError(f"{path}: the file is empty")
    return rows


def read_text(path: Path) -> str:
    """The file as UTF-8, without a byte order mark. Raises ValueError for anything else."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def messages_of(row: Row, name: str = "prompt") -> list[Message]:
    """Chat messages of a field, or its plain text as one user message. Raises ValueError naming line and field."""
    value = row.values.get(name)
    if not isinstance(value, list):
        return [{"role": "user", "content": row.text(name)}]
    for index, message in enumerate(value):
        fields = message if isinstance(message, dict) else {}
        if not all(isinstance(fields.get(key), str) for key in ("role", "content")):
            raise row.error(f"field '{name}[{index}]' must have text in 'role' and 'content', is {message!r:.60}")
    if not value:
        raise row.error(f"field {name!r} has no message")
    return value


def render(messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
    """(text, token ids) of a prompt: by the tokenizer's chat template when it has one, else the contents in order."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # the template writes the special tokens itself
        return text, list(tokenizer(text, add_special_tokens=False)["input_ids"])
    text = "\n\n".join(message["content"] for message in messages)
    return text, list(tokenizer(text)["input_ids"])


def _jsonl(path: Path) -> Iterator[Row]:
    # only newlines end a line: str.splitlines would cut inside strings that hold U+2028
    for line, text in enumerate(read_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {line}: not valid JSON: {error.msg} at column {error.colno}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}, line {line}: a row must be an object, is {type(values).__name__}")
        yield Row(path, line, values)


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading parquet needs pyarrow (pip install pyarrow)") from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from error
    for line, values in enumerate(rows, start=1):
        yield Row(path, line, values)
