"""Dumps that are still being written: what a folder's files have gained since the last look."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from rlalign.verifier.dumps import (
    DumpSequence,
    Format,
    ReadOptions,
    choose_format,
    detect_format,
    parse_line,
    read_dump,
    read_sequences,
)
from rlalign.verifier.dumps.rows import Row

_SUFFIXES = (".jsonl", ".parquet")
_MAGIC = b"PAR1"
_AT_ONCE = 1 << 26


@dataclass(slots=True)
class _Growing:
    """A JSONL file as far as it was read: bytes, lines and sequences. inode: of the file that was read."""

    inode: int
    size: int = 0
    lines: int = 0
    sequences: int = 0
    format: Format | None = None


@dataclass(slots=True)
class WatchedFolder:
    """The folder's ``.jsonl`` files, line by line as they are completed, and its ``.parquet`` files once finished.

    format: of all files; None looks at each one's content.
    """

    folder: Path
    format: str | None = None
    options: ReadOptions | None = None
    _growing: dict[Path, _Growing] = field(default_factory=dict)
    _done: set[Path] = field(default_factory=set)

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise FileNotFoundError(f"--watch: no such folder: {self.folder}")

    def look(self) -> Iterator[tuple[Path, Format, Iterator[DumpSequence]]]:
        """Files with something new, in order of their names. Raises ValueError for a file that shrank, was replaced, or
        is wrong; so do the sequences, after those before what is wrong."""
        for path in sorted(self.folder.rglob("*")):
            if path.suffix not in _SUFFIXES or not path.is_file():
                continue
            if path.suffix == ".parquet":
                if path not in self._done and _finished(path):
                    self._done.add(path)
                    format = detect_format(path, self.format)
                    yield path, format, read_dump(path, format=format.name, options=self.options)
            else:
                yield from self._look_at_lines(path)

    def _look_at_lines(self, path: Path) -> Iterator[tuple[Path, Format, Iterator[DumpSequence]]]:
        while lines := self._new_lines(path):
            rows = (row for line, content in lines for row in parse_line(path, line, content, ended=True))
            if (first := next(rows, None)) is None:
                continue
            state, rows = self._growing[path], chain([first], rows)
            if state.format is None:
                state.format, rows = choose_format(path, rows, self.format)
            yield path, state.format, self._counted(state, rows)

    @property
    def unfinished(self) -> list[Path]:
        """Parquet files that were never closed, and JSONL files that end in the middle of a line."""
        found = [path for path in sorted(self.folder.rglob("*.parquet")) if path not in self._done]
        return found + [
            path for path, state in self._growing.items() if path.is_file() and path.stat().st_size > state.size
        ]

    def _new_lines(self, path: Path) -> list[tuple[int, bytes]]:
        found = path.stat()
        size, state = found.st_size, self._growing.setdefault(path, _Growing(found.st_ino))
        if found.st_ino != state.inode:
            raise ValueError(f"{path}: another file took its place while it was followed")
        if size < state.size:
            raise ValueError(f"{path}: the file shrank from {state.size} to {size} bytes while it was followed")
        if size == state.size:
            return []
        with path.open("rb") as file:
            file.seek(state.size)
            content = file.read(_AT_ONCE)
            if b"\n" not in content:
                content += file.read(size - state.size - len(content)) if size - state.size > len(content) else b""
        # what comes after the last newline is a line that its writer has not finished
        *whole, rest = content.split(b"\n")
        lines = list(enumerate(whole, start=state.lines + 1))
        state.size += len(content) - len(rest)
        state.lines += len(lines)
        return lines

    def _counted(self, state: _Growing, rows: Iterator[Row]) -> Iterator[DumpSequence]:
        for sequence in read_sequences(rows, state.format, self.options, first_number=state.sequences):
            state.sequences += 1
            yield sequence


def _finished(path: Path) -> bool:
    """True for a parquet file whose footer is there."""
    with path.open("rb") as file:
        if path.stat().st_size < 12:
            return False
        file.seek(-4, 2)
        return file.read() == _MAGIC
