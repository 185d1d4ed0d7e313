"""Prompts of any file that people have at hand.

``.jsonl`` and ``.parquet`` rows may hold, first match wins: ``prompt_token_ids`` (a list of ids; no tokenizer needed),
``prompt`` (text, or chat messages as in verl's schema), ``question`` (GSM8K). Every other suffix is plain text, one
prompt a line. Text is encoded as it stands; messages and questions go through the chat template if there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlalign.records import Prompt
from rlalign.tasks.gsm8k import row_messages
from rlalign.tasks.rows import Row, read_rows, read_text, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIELDS = ("prompt", "prompt_token_ids", "question")
_ROW_SUFFIXES = (".jsonl", ".json", ".parquet")
_MAX_ID = 2**31 - 1


def read_prompt_rows(path: Path, *, limit: int | None = None) -> list[Row]:
    """The file's rows, the first ``limit`` of them. Raises FileNotFoundError, or ValueError naming the line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is a folder, not a file" if path.is_dir() else f"no such file: {path}")
    rows = (read_rows(path) if path.suffix in _ROW_SUFFIXES else _text_lines(path))[:limit]
    for row in rows:
        if all(row.values.get(name) is None for name in _FIELDS):
            fields = ", ".join(_FIELDS)
            raise row.error(f"no prompt: a row has one of the fields {fields}; this one has {[*row.values]}")
    # a parquet row has every column: those that it has no value for are null, and say nothing
    return [replace(row, values={k: value for k, value in row.values.items() if value is not None}) for row in rows]


def needs_tokenizer(rows: Sequence[Row]) -> bool:
    """True if a row has text rather than token ids."""
    return any("prompt_token_ids" not in row.values for row in rows)


def encode_rows(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase | None) -> list[Prompt]:
    """One prompt per row, named by its line. Raises ValueError naming line and field."""
    return [_encode(row, tokenizer) for row in rows]


def _encode(row: Row, tokenizer: PreTrainedTokenizerBase | None) -> Prompt:
    if "prompt_token_ids" in row.values:
        ids = _token_ids(row)
        text = "" if tokenizer is None else tokenizer.decode(ids)
        return Prompt(row.line, np.array(ids, np.int64), text, ground_truth="")
    if tokenizer is None:
        raise row.error("this row is text, which needs a tokenizer; give 'prompt_token_ids'")
    if isinstance(row.values.get("prompt"), str):
        text = row.text("prompt")
        return Prompt(row.line, np.array(tokenizer(text)["input_ids"], np.int64), text, ground_truth="")
    text, ids = render(row_messages(row), tokenizer)
    return Prompt(row.line, np.array(ids, np.int64), text, ground_truth="")


def _token_ids(row: Row) -> list[int]:
    ids = row.values["prompt_token_ids"]
    # a bool is an int to Python, but no token id
    if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i <= _MAX_ID for i in ids):
        raise row.error(f"field 'prompt_token_ids' must be a non-empty list of ids, is {ids!r:.60}")
    return ids


def _text_lines(path: Path) -> list[Row]:
    lines = enumerate(read_text(path).split("\n"), start=1)
    rows = [Row(path, line, {"prompt": text.rstrip("\r")}) for line, text in lines if text.strip()]
    if not rows:
        raise ValueError(f"{path}: the file is empty")
    return rows
