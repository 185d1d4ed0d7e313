"""Ids that name a sequence once."""

from __future__ import annotations

from rlalign.verifier.dumps.record import DumpSequence


class Ids:
    """Those that came by. way_out: what else can be done, for the error.

    within_files: files of a folder may use the same ids, as an engine's do that starts anew for each; numbers that
    stand for absent ids are then left out.
    """

    def __init__(self, *, way_out: str = "", within_files: bool = False) -> None:
        self._way_out, self._within_files = way_out, within_files
        self._seen: dict[tuple[str, str], str] = {}

    def add(self, sequence: DumpSequence) -> None:
        """Raises ValueError naming both places for an id that was there before."""
        if self._within_files and sequence.numbered:
            return
        key = (sequence.source.rpartition(":")[0] if self._within_files else "", sequence.id)
        if key in self._seen:
            raise ValueError(
                f"{sequence.source}: a second sequence of the id {sequence.id!r}, which {self._seen[key]} has too; ids "
                f"name a sequence once{self._way_out}"
            )
        self._seen[key] = sequence.source
