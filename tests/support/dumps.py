"""Running rlalign-verify in process, dumps of a few rows, and one token's log-prob made another."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlalign.cli.verify import main
from rlalign.verifier.dumps import DumpSequence, read_dump

Change = Callable[[list[DumpSequence]], list[DumpSequence]]


def run(command: list[str], tmp_path: Path, *more: str) -> dict[str, Any]:
    out = tmp_path / "out.json"
    code = main([*command, "--json", str(out), *more])
    result = json.loads(out.read_text())
    assert result["exit_code"] == code
    return result


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def with_logprob(value: float) -> Change:
    def change(sequences: list[DumpSequence]) -> list[DumpSequence]:
        logprobs = sequences[2].logprobs.copy()
        logprobs[3] = value
        return [*sequences[:2], replace(sequences[2], logprobs=logprobs), sequences[3]]

    return change


def one_ulp(sequences: list[DumpSequence]) -> list[DumpSequence]:
    return with_logprob(np.nextafter(sequences[2].logprobs[3], np.float32(-np.inf)))(sequences)


def write(tmp_path: Path, *rows: Any) -> Path:
    """JSONL of ``rows``."""
    path = tmp_path / "dump.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def only(path: Path, **more: Any) -> DumpSequence:
    (sequence,) = read_dump(path, **more)
    return sequence


def ids(sequence: DumpSequence) -> tuple[list[int], list[int]]:
    return sequence.prompt_token_ids.tolist(), sequence.token_ids.tolist()


def entry(token: int, value: float, rank: int = 1) -> dict[str, Any]:
    """A position of vLLM's log-probs, by token id."""
    other = {"99": {"logprob": -0.1, "rank": 1, "decoded_token": "x"}} if rank > 1 else {}
    return {**other, str(token): {"logprob": value, "rank": rank, "decoded_token": "y"}}
