"""A dump read by a process of its own: text takes longer to parse than its numbers take to compare.

``python -m rlalign.verifier.dumps.ahead`` is that process: it takes (path, format, options) on stdin and writes lists
of sequences to stdout, then None; or an exception. All of it is pickled, between a process and its own child.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from rlalign.verifier.dumps import DumpSequence, ReadOptions, read_dump

_AT_ONCE_TOKENS = 1 << 15
_WORTH_BYTES = 32 << 20


def read_ahead(path: Path, *, format: str, options: ReadOptions | None = None) -> Iterator[DumpSequence]:
    """What ``read_dump`` gives, of large text files by another process; raises what it raises."""
    if not _is_large_text(path):
        yield from read_dump(path, format=format, options=options)
        return
    # the child must find this package where this process found it
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(part or os.getcwd() for part in sys.path)}
    command = [sys.executable, "-m", "rlalign.verifier.dumps.ahead"]
    pipe = subprocess.PIPE
    # a session of its own: Ctrl-C is for this process, which then ends the child
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment, start_new_session=True) as child:
        try:
            pickle.dump((path, format, options), child.stdin)
            child.stdin.close()
            yield from _received(child.stdout, path)
        finally:
            child.kill()


def _received(stream: BinaryIO, path: Path) -> Iterator[DumpSequence]:
    while True:
        try:
            message = pickle.load(stream)
        except EOFError as error:
            raise RuntimeError(f"the process that read {path} ended early") from error
        if message is None:
            return
        if isinstance(message, Exception):
            raise message
        yield from message


def _is_large_text(path: Path) -> bool:
    return path.is_file() and path.suffix != ".parquet" and path.stat().st_size >= _WORTH_BYTES


def _send() -> None:
    path, format, options = pickle.load(sys.stdin.buffer)
    out = sys.stdout.buffer
    group: list[DumpSequence] = []
    tokens = 0
    try:
        for sequence in read_dump(path, format=format, options=options):
            group.append(sequence)
            tokens += sequence.num_tokens
            if tokens >= _AT_ONCE_TOKENS:
                pickle.dump(group, out, protocol=pickle.HIGHEST_PROTOCOL)
                group, tokens = [], 0
        pickle.dump(group, out, protocol=pickle.HIGHEST_PROTOCOL)
        pickle.dump(None, out)
    except BrokenPipeError:
        return  # nobody listens any more
    except Exception as error:
        pickle.dump(error, out)
    out.flush()


if __name__ == "__main__":
    _send()
