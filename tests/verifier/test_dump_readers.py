"""Every format as its engine writes it, in small; and what is said of a file that is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from support.dumps import entry, ids, only, write

from rlalign.config import SamplingParams
from rlalign.verifier.dumps import (
    MISSING,
    DumpSequence,
    ReadOptions,
    detect_format,
    missing,
    read_dump,
    write_dump,
)

REAL = Path(__file__).resolve().parents[3] / "shared/data/vllm_dump/vllm_native_t1.jsonl"
INF = float("inf")


def test_vllm_nested_with_several_outputs(tmp_path: Path) -> None:
    output = {"index": 0, "text": "ab", "token_ids": [7, 8], "cumulative_logprob": -3.0, "finish_reason": "stop",
              "logprobs": [entry(7, -1.0), entry(8, -2.0, rank=5)], "stop_reason": None}  # fmt: skip
    row = {"request_id": "cmpl-1", "prompt": "hi", "prompt_token_ids": [1, 2], "prompt_logprobs": None,
           "outputs": [output, {**output, "index": 1, "token_ids": [9, 8]}], "finished": True}  # fmt: skip
    path = write(tmp_path, row)
    assert detect_format(path).name == "vllm"
    first, second = read_dump(path)
    assert (first.id, second.id) == ("cmpl-1/0", "cmpl-1/1")
    assert ids(first) == ([1, 2], [7, 8])
    assert first.logprobs.tolist() == [-1.0, -2.0]
    assert (first.finish_reason, first.text, first.source) == ("stop", "ab", f"{path}:1")
    # id 9 is not among the reported ones: its log-prob is missing, not another token's
    assert missing(second.logprobs).tolist() == [True, False]


def test_vllm_prompt_logprobs(tmp_path: Path) -> None:
    row = {"request_id": "0", "prompt_token_ids": [1, 2, 3], "prompt_logprobs": [None, entry(2, -1.5), entry(3, -2.5)],
           "outputs": [{"index": 0, "token_ids": [5], "logprobs": None}]}  # fmt: skip
    sequence = only(write(tmp_path, row))
    assert ids(sequence) == ([1], [2, 3])
    assert (sequence.logprobs.tolist(), sequence.processed) == ([-1.5, -2.5], False)
    row["outputs"][0]["logprobs"] = [entry(5, -4.0)]
    assert ids(only(write(tmp_path, row))) == ([1, 2, 3], [5])
    assert ids(only(write(tmp_path, row), options=ReadOptions(prompt=True))) == ([1], [2, 3])


@pytest.mark.skipif(not REAL.is_file(), reason="needs the vLLM dump of the shared data")
def test_vllm_as_it_was_dumped() -> None:
    sequences = list(read_dump(REAL))
    assert (len(sequences), sum(len(s.token_ids) for s in sequences)) == (64, 7231)
    assert sequences[0].logprobs[0] == np.float32(-2.317173719406128)
    assert sequences[0].sampling == SamplingParams(temperature=1.0)
    assert not any(missing(s.logprobs).any() for s in sequences)


def test_vllm_logprobs_mode_and_sampling(tmp_path: Path) -> None:
    row = {"request_id": 3, "prompt_token_ids": [1], "token_ids": [2], "logprobs": [{"2": -1.0}],
           "sampling_params": {"temperature": 0.7, "top_k": -1, "top_p": 0.9, "n": 1}}  # fmt: skip
    sequence = only(write(tmp_path, {**row, "logprobs_mode": "processed_logprobs"}))
    assert (sequence.id, sequence.processed) == ("3", True)
    assert sequence.sampling == SamplingParams(temperature=0.7, top_p=0.9)
    assert only(write(tmp_path, {**row, "logprobs_mode": "raw_logprobs"})).processed is False
    with pytest.raises(ValueError, match="line 1: field 'logprobs_mode' is 'raw_logits'"):
        only(write(tmp_path, {**row, "logprobs_mode": "raw_logits"}))


def test_sglang(tmp_path: Path) -> None:
    meta = {"id": "a1", "finish_reason": {"type": "length", "length": 2}, "prompt_tokens": 2, "completion_tokens": 2,
            "weight_version": "12", "input_token_logprobs": [[None, 3, None], [-0.5, 4, None]],
            "output_token_logprobs": [[-1.0, 7, "a"], [-2.0, 8, None]]}  # fmt: skip
    path = write(tmp_path, {"text": "ab", "output_ids": [7, 8], "meta_info": meta})
    assert detect_format(path).name == "sglang"
    sequence = only(path)
    assert (sequence.id, ids(sequence)) == ("a1", ([3, 4], [7, 8]))
    assert (sequence.logprobs.tolist(), sequence.weights_version) == ([-1.0, -2.0], 12)
    assert sequence.finish_reason == "length"
    in_prompt = only(path, options=ReadOptions(prompt=True))
    assert (ids(in_prompt), in_prompt.logprobs.tolist()) == (([3], [4]), [-0.5])
    # a list of responses, as a batched request returns, with the prompt recorded beside each
    del meta["input_token_logprobs"]
    batch = [{"input_ids": [5], "meta_info": meta}, {"prompt_token_ids": [6], "meta_info": {**meta, "id": "a2"}}]
    assert [(s.id, s.prompt_token_ids.tolist()) for s in read_dump(write(tmp_path, batch))] == [
        ("a1", [5]),
        ("a2", [6]),
    ]
    with pytest.raises(ValueError, match="line 1: field 'prompt_token_ids' is missing"):
        only(write(tmp_path, {"meta_info": meta}))


def verl_batch() -> dict[str, Any]:
    """Two sequences padded on both sides (0), a tool's tokens inside the first, and a row of padding only."""
    return {
        "input_ids": [[0, 0, 5, 6, 11, 12, 13, 0], [0, 7, 8, 9, 21, 0, 0, 0], [0] * 8],
        "attention_mask": [[0, 0, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0, 0, 0], [0] * 8],
        "response_mask": [[1, 0, 1, 0], [1, 0, 0, 0], [0] * 4],
        "rollout_log_probs": [[-1.0, 0.0, -3.0, -1.0], [-4.0, 0.0, 0.0, 0.0], [0.0] * 4],
        "old_log_probs": [[-1.5, 0.0, -3.5, 0.0], [-4.5, 0.0, 0.0, 0.0], [0.0] * 4],
        "meta_info": {"temperature": 0.8},
    }


@pytest.mark.parametrize("without", [(), ("attention_mask",)])
def test_verl_batch_padded_on_both_sides(tmp_path: Path, without: tuple[str, ...]) -> None:
    batch = {name: value for name, value in verl_batch().items() if name not in without}
    path = write(tmp_path, batch)
    assert detect_format(path).name == "verl"
    first, second, padding = read_dump(path)
    assert ids(first) == ([5, 6], [11, 12, 13])
    assert (first.logprobs.tolist(), first.mask.tolist()) == ([-1.0, 0.0, -3.0], [True, False, True])
    assert ids(second) == ([7, 8, 9], [21])
    assert len(padding.token_ids) == 0
    assert [s.id for s in (first, second, padding)] == ["0", "1", "2"]
    assert first.sampling == SamplingParams(temperature=0.8)
    trained, *_ = read_dump(path, options=ReadOptions(logprobs="old_log_probs"))
    assert trained.logprobs.tolist() == [-1.5, 0.0, -3.5]


def test_verl_rows_in_parquet(tmp_path: Path) -> None:
    batch = verl_batch()
    names = ("input_ids", "attention_mask", "response_mask", "rollout_log_probs")
    path = tmp_path / "batch.parquet"
    parquet.write_table(pa.table({name: batch[name] for name in names}), path)
    assert [ids(sequence) for sequence in read_dump(path)] == [([5, 6], [11, 12, 13]), ([7, 8, 9], [21]), ([], [])]


@pytest.mark.parametrize("named", ["input_ids", "prompts"])
def test_verl_without_its_mask_takes_what_attention_shows(tmp_path: Path, named: str) -> None:
    batch = verl_batch()
    batch |= {"responses": [row[4:] for row in batch["input_ids"]], "prompts": [row[:4] for row in batch["input_ids"]]}
    del batch["response_mask"], batch["prompts" if named == "input_ids" else "input_ids"]
    path = write(tmp_path, batch)
    assert detect_format(path).name == "verl"
    read = [([5, 6], [11, 12, 13]), ([7, 8, 9], [21]), ([], [])]
    assert [ids(sequence) for sequence in read_dump(path)] == read
    assert next(iter(read_dump(path))).logprobs.tolist() == [-1.0, 0.0, -3.0]
    row = {name: value[0] for name, value in batch.items() if name != "meta_info"}
    assert only(write(tmp_path, row)).token_ids.tolist() == [11, 12, 13]
    del batch["attention_mask"]
    with pytest.raises(ValueError, match="field 'response_mask' is missing, and 'attention_mask' too"):
        list(read_dump(write(tmp_path, batch)))
    assert [ids(s) for s in read_dump(write(tmp_path, batch), options=ReadOptions(pad_token_id=0))] == read
    inside = {"prompts": [0, 5], "responses": [0, 11, 0, 12, 0], "rollout_log_probs": [-1, -2, -3, -4, 0]}
    found = only(write(tmp_path, inside | {"pad_token_id": 0}))
    assert (ids(found), found.mask.tolist()) == (([5], [0, 11, 0, 12]), [True] * 4)
    row = {"input_ids": [1, 2], "rollout_log_probs": [-1.0], "response_mask": None}
    with pytest.raises(ValueError, match="field 'response_mask' is missing, and 'responses' too"):
        list(read_dump(write(tmp_path, row)))


def test_verl_padding_that_cannot_be_told_is_refused(tmp_path: Path) -> None:
    row = {"input_ids": [0, 0, 5, 11], "response_mask": [1], "rollout_log_probs": [-1.0]}
    with pytest.raises(ValueError, match="field 'attention_mask' is missing: the prompt begins with 0 several times"):
        only(write(tmp_path, row))
    assert ids(only(write(tmp_path, row), options=ReadOptions(pad_token_id=0))) == ([5], [11])
    hole = {**row, "attention_mask": [1, 0, 1, 1]}
    with pytest.raises(ValueError, match="'attention_mask' has a hole at 1"):
        only(write(tmp_path, hole))


def test_trl(tmp_path: Path) -> None:
    batch = {
        "prompt_ids": [[0, 3, 4], [5, 6, 7]],
        "prompt_mask": [[0, 1, 1], [1, 1, 1]],
        "completion_ids": [[8, 9, 0], [10, 11, 12]],
        "completion_mask": [[1, 1, 0], [1, 1, 1]],
        "tool_mask": [[1, 1, 1], [1, 0, 1]],
        "sampling_per_token_logps": [[-1.0, -2.0, 0.0], [-3.0, None, -5.0]],
    }
    path = write(tmp_path, batch)
    assert detect_format(path).name == "trl"
    first, second = read_dump(path)
    assert (ids(first), first.logprobs.tolist()) == (([3, 4], [8, 9]), [-1.0, -2.0])
    assert (ids(second), second.mask.tolist()) == (([5, 6, 7], [10, 11, 12]), [True, False, True])
    bare = {name: batch[name] for name in ("prompt_ids", "completion_ids", "sampling_per_token_logps")}
    with pytest.raises(ValueError, match="field 'prompt_mask' is missing"):
        list(read_dump(write(tmp_path, bare)))
    assert ids(next(read_dump(write(tmp_path, bare), options=ReadOptions(pad_token_id=0)))) == ([3, 4], [8, 9])
    ragged = {name: [value[0][:2], value[1]] for name, value in bare.items()}
    assert [ids(s) for s in read_dump(write(tmp_path, ragged))] == [([0, 3], [8, 9]), ([5, 6, 7], [10, 11, 12])]
    flat = {name: value[1] for name, value in bare.items()}
    assert ids(only(write(tmp_path, flat))) == ([5, 6, 7], [10, 11, 12])


def test_prime_rl(tmp_path: Path) -> None:
    row = {
        "schema_version": 1, "step": 4, "export_step": 4, "rank": 0, "micro_step": 0, "micro_sequence_idx": 1,
        "export_sequence_idx": 2, "run_id": None, "env_name": "math", "token_ids": [1, 2, 3, 4],
        "position_ids": [0, 1, 2, 3], "loss_mask": [False, False, True, True],
        "inference_logprobs": [0.0, 0.0, -1.0, None], "trainer_logprobs": [0.0, -9.0, -1.25, -2.0],
    }  # fmt: skip
    path = write(tmp_path, row)
    assert detect_format(path).name == "prime-rl"
    sequence = only(path)
    assert (sequence.id, ids(sequence)) == ("4/0/2", ([1, 2], [3, 4]))
    assert missing(sequence.logprobs).tolist() == [False, True]
    assert only(path, options=ReadOptions(logprobs="trainer_logprobs")).logprobs.tolist() == [-1.25, -2.0]


def own(**more: Any) -> dict[str, Any]:
    return {"id": "a", "prompt_token_ids": [1], "token_ids": [2, 3], "logprobs": [-1.0, -2.0], **more}


def test_our_own_schema(tmp_path: Path) -> None:
    row = own(logprobs=[None, "-Infinity"], mask=[True, False], sampling={"temperature": 0.5, "min_p": 0.1},
              processed=True, weights_version=3, finish_reason="stop", text="x")  # fmt: skip
    sequence = only(write(tmp_path, row))
    assert detect_format(tmp_path / "dump.jsonl").name == "rlalign"
    assert (missing(sequence.logprobs).tolist(), sequence.logprobs[1]) == ([True, False], -INF)
    assert (sequence.mask.tolist(), sequence.processed, sequence.weights_version) == ([True, False], True, 3)
    assert sequence.sampling == SamplingParams(temperature=0.5, min_p=0.1)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_what_is_written_comes_back_bit_for_bit(tmp_path: Path, suffix: str) -> None:
    random = np.random.default_rng(0)
    bits = random.integers(0, 2**32, 3000, dtype=np.uint32).view(np.float32)
    bits = bits[np.isfinite(bits)]
    values = [bits, np.float32([0.0, -0.0, np.nan, INF, -INF, MISSING, -1e-45]), np.zeros(0, np.float32)]
    sequences = [
        DumpSequence(
            f"s{i}", np.arange(i), random.integers(0, 9, len(v)), v, source="",
            mask=random.random(len(v)) < 0.5 if i else None, processed=[None, True, False][i],
            sampling=SamplingParams(temperature=0.3, top_k=4, top_p=0.5) if i else None,
            weights_version=[None, 0, 5][i], finish_reason=None, text=["⏎\n", None, ""][i],
        )
        for i, v in enumerate(values)
    ]  # fmt: skip
    path = tmp_path / f"out{suffix}"
    assert write_dump(path, sequences) == 3
    for before, after in zip(sequences, read_dump(path), strict=True):
        assert after.logprobs.view(np.uint32).tolist() == before.logprobs.view(np.uint32).tolist()
        for name in ("prompt_token_ids", "token_ids"):
            assert np.array_equal(getattr(after, name), getattr(before, name))
        assert (after.mask is None) == (before.mask is None)
        assert after.mask is None or np.array_equal(after.mask, before.mask)
        for name in ("id", "sampling", "processed", "weights_version", "finish_reason", "text"):
            assert getattr(after, name) == getattr(before, name)
    with pytest.raises(ValueError, match="two sequences have the id 's0'"):
        write_dump(path, [sequences[0], sequences[0]])


def test_documents_lists_folders_and_missing_ids(tmp_path: Path) -> None:
    row = own()
    del row["id"]
    (tmp_path / "b.json").write_text(json.dumps([row, row], indent=2))
    (tmp_path / "a.jsonl").write_text("\ufeff" + json.dumps(own(id="first")) + "\n\n")
    assert [s.id for s in read_dump(tmp_path)] == ["first", "1", "2"]
    assert [s.source.rpartition("/")[2] for s in read_dump(tmp_path)] == ["a.jsonl:1", "b.json:1[0]", "b.json:1[1]"]


def test_the_first_telling_row_decides(tmp_path: Path) -> None:
    empty = {"request_id": "0", "prompt_token_ids": [1], "token_ids": [], "logprobs": []}
    vllm = {"request_id": "1", "prompt_token_ids": [1], "token_ids": [2], "logprobs": [entry(2, -1.0)]}
    path = write(tmp_path, empty, vllm)
    assert detect_format(path).name == "vllm"
    assert [len(s.token_ids) for s in read_dump(path)] == [0, 1]
    assert detect_format(write(tmp_path, empty)).name == "rlalign"


@pytest.mark.parametrize(("content", "message"), [
    (b"", "the file is empty"),
    (b"\n\n", "the file is empty"),
    (json.dumps(own()).encode() + b'\n{"id": \n', "line 2: not valid JSON"),
    (b"[1]\n", "line 1, item 0: must be an object, is int"),
    (b'"x"\n', "line 1: a row must be an object"),
    (b'{"text": "\xff"}\n', "line 1: not UTF-8 text"),
    (b'{"text": "x"}\n', "line 1: no dump format has the fields text"),
    (json.dumps({**own(), "logprobs": None}).encode(), "logprobs; of these logprobs is missing or null"),
    (json.dumps(own()).encode() + b'\n{"id": "1", "tok', "line 2: not valid JSON: Unterminated string starting at "
     "(column 13); the file ends there, cut off"),
    (b"[" * 100_000 + b"\n", "line 1: lists or objects inside each other, too deep"),
    (b'{"text": 1' + b"0" * 5000 + b"}\n", "line 1: not readable as JSON: Exceeds the limit"),
    (b'{"prompt_token_ids": [1], "outputs": [{"token_ids": [2], "logprobs": null}]}\n',
     "line 1: field 'outputs[0].logprobs' is missing: ask vLLM for it"),
    (b"\x80\x05pickle", "this is a pickle"),
    (b"PK\x03\x04", "this is a zip archive"),
    (b"PAR1 torn", "not a readable parquet file"),
])  # fmt: skip
def test_a_wrong_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        list(read_dump(path))
    assert message in str(error.value)
    assert str(path) in str(error.value)


ROW = json.dumps(own())


@pytest.mark.parametrize(("lines", "where"), [
    ([ROW, '{"id": 1, "x": [1, 2'], (2, 21)),
    ([ROW, '{"id": 1, "x": [1, 2  '], (2, 21)),
    ([ROW, '{"id": 1, "x": [1,, 2]}', ROW], (2, 19)),
    ([ROW, '{"id": 1} x', ROW], (2, 11)),
    ([ROW, '{"id": "a', ROW], (2, 8)),
    # a first line that ends too soon may be a document's: the lines after it tell
    (['{"id": 1, "x": [1, 2'], (1, 21)),
    (['{"id": 1, "x": [1, 2', ROW, ROW], (1, 21)),
    (['{"id": 1, "x": [1, ', ROW, ROW], (1, 19)),
    (['{"id": 1, "x":', ROW, ROW], (1, 15)),
    (['{"id": 1, "x": "ab', ROW], (1, 16)),
    (["[", f"{ROW},", "{]"], (3, 2)),
    (["[", ROW, ROW, "]"], (3, 1)),
    (["[", f"{ROW},", ROW], (3, len(ROW) + 1)),
    (["{", '"id": 1,', '"x": [1, 2'], (3, 11)),
])  # fmt: skip
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_broken_json_is_placed_by_line_and_column(
    tmp_path: Path, lines: list[str], where: tuple[int, int], end: str
) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_bytes(((end or "\n").join(lines) + end).encode())
    with pytest.raises(ValueError) as error:
        list(read_dump(path))
    said = str(error.value)
    assert said.startswith(f"{path}, line {where[0]}: not valid JSON: ")
    assert f" (column {where[1]})" in said
    # what is wrong in the middle was not cut off, whatever ends the file
    last = where[0] == len(lines) and (where[1] > len(lines[-1].rstrip()) or "Unterminated" in said)
    assert ("the file ends there" in said) == (last and not end)


@pytest.mark.parametrize("last", ["-", "-Inf", "tr", "n", "1.", "1e", "1.5e-", '"\\u00', '"ab', "1", "1,", ""])
def test_a_line_cut_off_anywhere_is_said_to_be(tmp_path: Path, last: str) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_text(f'{ROW}\n{{"id": "1", "logprobs": [-1.5, {last}')
    with pytest.raises(ValueError, match=r"line 2: not valid JSON: .* \(column \d+\); the file ends there, cut off"):
        list(read_dump(path))


@pytest.mark.parametrize("last", ["trx", "--", "1.x", "}", "1 n", "1]}n", "1], u"])
def test_what_is_no_beginning_of_a_value_was_not_cut_off(tmp_path: Path, last: str) -> None:
    path = tmp_path / "wrong.jsonl"
    path.write_text(f'{ROW}\n{{"id": "1", "logprobs": [-1.5, {last}')
    with pytest.raises(ValueError, match=r"line 2: not valid JSON: .*\)$"):
        list(read_dump(path))


@pytest.mark.parametrize(("change", "message"), [
    ({"logprobs": [-1.0]}, "field 'logprobs' has 1 values for 2 of 'token_ids'"),
    ({"logprobs": [-1.0, "x"]}, "field 'logprobs[1]' must be a log-prob, is 'x'"),
    ({"logprobs": [-1.0, True]}, "field 'logprobs[1]' must be a log-prob, is True"),
    ({"logprobs": None}, "field 'logprobs' is missing"),
    ({"logprobs": [-1.0, -(10**400)]}, "field 'logprobs[1]' must be a log-prob, is -1000"),
    ({"token_ids": [2, -3]}, "field 'token_ids[1]' must be a token id, is -3"),
    ({"token_ids": [2, 2.5]}, "field 'token_ids[1]' must be a token id, is 2.5"),
    ({"token_ids": [2, True]}, "field 'token_ids[1]' must be a token id, is True"),
    ({"token_ids": [2, 2**40]}, "field 'token_ids[1]' must be a token id"),
    ({"prompt_token_ids": "abc"}, "field 'prompt_token_ids' must be a list"),
    ({"mask": [1]}, "field 'mask' has 1 values for 2"),
    ({"mask": [1, 2]}, "field 'mask' must hold booleans"),
    ({"mask": [[1], [1, 1]]}, "field 'mask' must hold booleans"),
    ({"sampling": {"temperature": -1}}, "field 'sampling.temperature': Input should be greater than or equal to 0"),
    ({"sampling": 1}, "field 'sampling' must be an object"),
    ({"processed": "yes"}, "field 'processed' must be true or false"),
    ({"weights_version": 1.5}, "field 'weights_version' must be a whole number"),
])  # fmt: skip
def test_a_wrong_field_is_named_with_its_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path, own(), {**own(), **change})
    with pytest.raises(ValueError) as error:
        list(read_dump(path))
    assert f"{path}, line 2: {message}" in str(error.value)


def test_formats_and_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, own())
    with pytest.raises(ValueError, match="format 'vlm' is not one of"):
        list(read_dump(path, format="vlm"))
    with pytest.raises(ValueError, match="rlalign dumps have no log-probs of the prompt"):
        list(read_dump(path, options=ReadOptions(prompt=True)))
    with pytest.raises(ValueError, match="vllm dumps have one field of log-probs"):
        list(read_dump(path, format="vllm", options=ReadOptions(logprobs="other")))
    with pytest.raises(FileNotFoundError):
        list(read_dump(tmp_path / "none.jsonl"))


def test_a_record_checks_its_shapes() -> None:
    sequence = DumpSequence("a", np.arange(2), np.arange(3), np.zeros(3, np.float32), source="f:1")
    with pytest.raises(ValueError, match="f:1: field 'logprobs' is float64"):
        replace(sequence, logprobs=np.zeros(3))
    with pytest.raises(ValueError, match="f:1: field 'mask' has 2 values for 3 token ids"):
        replace(sequence, mask=np.ones(2, np.bool_))
