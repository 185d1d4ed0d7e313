"""Rows that don't go together: of two formats in one file, and of one that doesn't name them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.dumps import entry, write

from rlalign.verifier.dumps import read_dump
from rlalign.verifier.dumps.ids import Ids

OURS = {"id": "a", "prompt_token_ids": [1], "token_ids": [2], "logprobs": [-1.0]}
VLLM = {"request_id": "b", "prompt_token_ids": [1], "outputs": [{"token_ids": [2], "logprobs": [entry(2, -1.0)]}]}
SGLANG = {"input_ids": [1], "meta_info": {"output_token_logprobs": [[-1.0, 2, None]]}}


@pytest.mark.parametrize(("rows", "format", "words"), [
    ([VLLM, OURS], None, "line 2: field 'logprobs[0]' must be an object of token ids, is -1.0; this row looks like "
     "rlalign, but the file is read as vllm, as line 1 is: a file has one format, and --format sets it"),
    ([VLLM, OURS], "vllm", "looks like rlalign, but the file is read as vllm, as line 1 is"),
    ([OURS, SGLANG], None, "looks like sglang, but the file is read as rlalign, as line 1 is"),
    ([OURS], "vllm", "looks like rlalign, but the file is read as vllm, as an earlier line or --format says"),
])  # fmt: skip
def test_a_row_of_another_format_is_said_to_be(
    tmp_path: Path, rows: list[dict[str, Any]], format: str | None, words: str
) -> None:
    with pytest.raises(ValueError) as error:
        list(read_dump(write(tmp_path, *rows), format=format))
    assert words in str(error.value)


def test_a_wrong_field_of_the_right_format_is_only_that(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 2: field 'token_ids\[0\]' must be a token id, is -2$"):
        list(read_dump(write(tmp_path, OURS, OURS | {"token_ids": [-2]})))


@pytest.mark.parametrize(("named", "expected"), [
    ({"rank": 0}, ["0", "1"]),
    ({"run_id": "r", "export_step": 3, "rank": 0}, ["0", "1"]),
    ({"rank": 0, "export_sequence_idx": None}, ["0", "1"]),
])  # fmt: skip
def test_rows_of_prime_rl_that_name_no_sequence_are_numbered(
    tmp_path: Path, named: dict[str, Any], expected: list[str]
) -> None:
    row = {"token_ids": [1, 2], "loss_mask": [0, 1], "inference_logprobs": [0, -1.0], **named}
    path, seen = write(tmp_path, row, row), Ids()
    sequences = list(read_dump(path))
    for sequence in sequences:
        seen.add(sequence)
    assert [sequence.id for sequence in sequences] == expected
    assert [sequence.name for sequence in sequences] == [f"{path}:1", f"{path}:2"]
