"""A folder of dumps that grow: what each look brings, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlalign.cli.dump_watch import WatchedFolder
from rlalign.verifier.dumps import DumpSequence, write_dump


@pytest.fixture
def plain() -> list[DumpSequence]:
    return [
        DumpSequence(f"r{i}", np.arange(3 + i), np.arange(6), np.linspace(-2, -1, 6, dtype=np.float32))
        for i in range(4)
    ]


def test_watched_files_grow_line_by_line(plain: list[DumpSequence], tmp_path: Path) -> None:
    write_dump(tmp_path / "whole.jsonl", plain)
    content = (tmp_path / "whole.jsonl").read_bytes()
    (tmp_path / "whole.jsonl").unlink()
    folder, grows, table = WatchedFolder(tmp_path), tmp_path / "grows.jsonl", tmp_path / "late.parquet"
    seen = []
    for end in (0, 10, 200, len(content) - 5, len(content)):
        grows.write_bytes(content[:end])
        seen += [s for _, _, sequences in folder.look() for s in sequences]
    assert [s.id for s in seen] == ["r0", "r1", "r2", "r3"]
    assert [s.source for s in seen] == [f"{grows}:{line}" for line in range(1, 5)]
    table.write_bytes(b"PAR1 still being written")
    assert (list(folder.look()), folder.unfinished) == ([], [table])
    write_dump(table, plain[:1])
    assert [s.id for _, _, sequences in folder.look() for s in sequences] == ["r0"]
    grows.write_bytes(b"")
    with pytest.raises(ValueError, match="the file shrank"):
        list(folder.look())


def test_a_corrupt_line_of_a_watched_file_is_not_called_one_that_is_being_written(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": "torn", "prompt_\n{"id": "next"')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: not valid JSON: Unterminated .* \(column \d+\)$"):
        list(WatchedFolder(tmp_path).look())


def test_a_watched_file_that_was_replaced_is_refused_and_one_that_is_gone_forgotten(
    plain: list[DumpSequence], tmp_path: Path
) -> None:
    grows, other = tmp_path / "grows.jsonl", tmp_path / "other"
    write_dump(grows, plain[:2])
    folder = WatchedFolder(tmp_path)
    assert [s.id for _, _, sequences in folder.look() for s in sequences] == ["r0", "r1"]
    write_dump(tmp_path / "longer.jsonl", plain)
    (tmp_path / "longer.jsonl").rename(other)
    other.replace(grows)
    with pytest.raises(ValueError, match="another file took its place"):
        list(folder.look())
    grows.unlink()
    assert (list(folder.look()), folder.unfinished) == ([], [])
