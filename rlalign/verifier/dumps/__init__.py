"""Dumps of any engine: token ids and the log-probs it reported, read as a stream of one record type.

A reader per format; docs/dumps.md lists their fields. The format is chosen by the first row that one of them knows, or
by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from rlalign.verifier.dumps import native, openai, padded, prime_rl, sglang, vllm
from rlalign.verifier.dumps.native import write_dump
from rlalign.verifier.dumps.options import ReadOptions
from rlalign.verifier.dumps.record import MISSING, DumpSequence, missing
from rlalign.verifier.dumps.rows import Row, parse_line, read_rows

__all__ = [
    "FORMATS", "MISSING", "DumpSequence", "Format", "ReadOptions", "choose_format", "detect_format", "missing",
    "parse_line", "read_dump", "read_sequences", "write_dump",
]  # fmt: skip

Convention = Literal["processed", "temperature", "raw"]
_LOOK_AT = 1000
_SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True, slots=True)
class Format:
    """One format. convention: what its log-probs are where a dump doesn't say: after all sampling transforms, after
    temperature only, or raw. columns: whether its log-probs may be taken from another field of the row.
    """

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Row, ReadOptions], Iterator[DumpSequence]]
    convention: Convention
    columns: bool = False
    prompts: bool = False


# most telling first: the first that knows a row reads the file
FORMATS = {
    each.name: each
    for each in (
        Format("prime-rl", prime_rl.matches, prime_rl.read, "processed", columns=True),
        Format("verl", padded.matches_verl, padded.read_verl, "processed", columns=True),
        Format("trl", padded.matches_trl, padded.read_trl, "processed", columns=True),
        Format("sglang", sglang.matches, sglang.read, "temperature", prompts=True),
        Format("openai", openai.matches, openai.read, "raw", prompts=True),
        Format("vllm", vllm.matches, vllm.read, "raw", prompts=True),
        Format("rlalign", native.matches, native.read, "processed", columns=True),
    )
}


def read_dump(
    path: Path | str, *, format: str | None = None, options: ReadOptions | None = None
) -> Iterator[DumpSequence]:
    """Every sequence of a file, or of the files below a folder in order of their names, as a stream.

    format: a name of ``FORMATS``; None looks at the content of each file. A sequence that names no id gets its number,
    from 0. Raises FileNotFoundError, or ValueError naming file, line and field; ValueError for a file without rows.
    """
    number = 0
    for file in _files(Path(path)):
        chosen, rows = choose_format(file, read_rows(file), format)
        for sequence in read_sequences(rows, chosen, options, first_number=number):
            yield sequence
            number += 1


def read_sequences(
    rows: Iterator[Row], format: Format, options: ReadOptions | None, *, first_number: int
) -> Iterator[DumpSequence]:
    """Sequences of rows of one file; one that names no id gets its number, from ``first_number``."""
    for number, sequence in enumerate(_read(format, rows, options), start=first_number):
        yield sequence if sequence.id else replace(sequence, id=str(number), numbered=True)


def detect_format(path: Path | str, format: str | None = None) -> Format:
    """The format that ``read_dump`` would read the (first) file in. Raises as ``read_dump`` does."""
    file = _files(Path(path))[0]
    return choose_format(file, read_rows(file), format)[0]


def _read(format: Format, rows: Iterator[Row], options: ReadOptions | None) -> Iterator[DumpSequence]:
    options = options or ReadOptions()
    if options.logprobs is not None and not format.columns:
        raise ValueError(f"{format.name} dumps have one field of log-probs; {options.logprobs!r} can't be chosen")
    if options.prompt and not format.prompts:
        raise ValueError(f"{format.name} dumps have no log-probs of the prompt")
    told_by = None
    for row in rows:
        if told_by is None and format.matches(row.values):
            told_by = row.line
        try:
            yield from format.read(row, options)
        except ValueError as error:
            other = _format_of(row)
            if other is None or format.matches(row.values):
                raise
            how = "as an earlier line or --format says" if told_by is None else f"as line {told_by} is"
            raise ValueError(
                f"{error}; this row looks like {other}, but the file is read as {format.name}, {how}: a file has one "
                "format, and --format sets it"
            ) from error


def choose_format(path: Path, rows: Iterator[Row], name: str | None) -> tuple[Format, Iterator[Row]]:
    """The format of a file, by name or by the first row that one knows; and all of its rows again.

    Raises ValueError for no rows, for an unknown name, and for rows that nobody knows.
    """
    if name is not None and name not in FORMATS:
        raise ValueError(f"format {name!r} is not one of {', '.join(FORMATS)}")
    looked_at: list[Row] = []
    for row in rows:
        looked_at.append(row)
        found = name or _format_of(row)
        if name is None and found == "rlalign" and len(looked_at) < _LOOK_AT and _is_empty(row.values.get("logprobs")):
            continue  # a response without tokens, which could be anybody's
        if found is not None:
            return FORMATS[found], chain(looked_at, rows)
        if len(looked_at) >= _LOOK_AT:
            break
    if not looked_at:
        raise ValueError(f"{path}: the file is empty")
    first = looked_at[0]
    if native.matches(first.values):
        return FORMATS["rlalign"], chain(looked_at, rows)
    absent = [name for name in ("prompt_token_ids", "token_ids", "logprobs") if first.values.get(name) is None]
    why = f"; of these {' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} missing or null" if absent else ""
    raise first.error(
        f"no dump format has the fields {', '.join(first.values) or '(none)'}; a row of ours has id, prompt_token_ids, "
        f"token_ids, logprobs{why}. Formats (--format): {', '.join(FORMATS)}"
    )


def _format_of(row: Row) -> str | None:
    return next((each.name for each in FORMATS.values() if each.matches(row.values)), None)


def _is_empty(listed: Any) -> bool:
    return listed is None or len(listed) == 0


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
    if not files:
        raise ValueError(f"{path}: the folder holds no {', '.join(_SUFFIXES)} file")
    return files
