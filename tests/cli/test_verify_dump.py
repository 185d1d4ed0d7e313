"""``dump`` as a user runs it, in process, with faults planted into what an engine reported."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
from support.dumps import Change, error_line, one_ulp, run, with_logprob, write

from rlalign import modeling
from rlalign.cli.dump_scoring import score_plain
from rlalign.cli.verify import main
from rlalign.config import ModelConfig, SamplingParams
from rlalign.tasks.sort import make_sort_tokenizer
from rlalign.verifier.dumps import MISSING, DumpSequence, write_dump

REAL = Path(__file__).resolve().parents[3] / "shared/data/vllm_dump"
TINY = ModelConfig(hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=32,
                   max_position_embeddings=64)  # fmt: skip
WARM = SamplingParams(temperature=0.5, top_k=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    modeling.make_tiny_model(TINY, make_sort_tokenizer(max_value=9), path, seed=0)
    return path


@pytest.fixture(scope="module")
def policy(model: Path) -> modeling.Policy:
    return modeling.load_policy(model)


def scored(policy: modeling.Policy, params: SamplingParams | None, *, processed: bool = True) -> list[DumpSequence]:
    """What an exact engine would have dumped: most likely tokens, with the trainer's own log-probs."""
    random = np.random.default_rng(0)
    bare = [
        DumpSequence(f"r{i}", random.integers(0, policy.vocab_size, 3 + i), random.integers(0, policy.vocab_size, 6),
                     np.zeros(6, np.float32), sampling=params, source=f"r{i}")
        for i in range(4)
    ]  # fmt: skip
    under = params if params is not None and processed else SamplingParams()
    if under.truncated:
        bare = [_within_support(policy, sequence, under) for sequence in bare]
    values = score_plain(policy, bare, [under] * 4, micro_batch_tokens=64)
    return [replace(sequence, logprobs=value) for sequence, value in zip(bare, values, strict=True)]


def _within_support(policy: modeling.Policy, sequence: DumpSequence, params: SamplingParams) -> DumpSequence:
    """Tokens that top-k keeps, found by trying every id."""
    ids = sequence.token_ids.copy()
    for position in range(len(ids)):
        for candidate in range(policy.vocab_size):
            ids[position] = candidate
            (values,) = score_plain(policy, [replace(sequence, token_ids=ids)], [params], micro_batch_tokens=64)
            if np.isfinite(values[position]):
                break
    return replace(sequence, token_ids=ids)


@pytest.fixture(scope="module")
def plain(policy: modeling.Policy) -> list[DumpSequence]:
    return scored(policy, None)


def dump(model: Path, sequences: list[DumpSequence], tmp_path: Path, *more: str) -> dict[str, Any]:
    path = tmp_path / "dump.jsonl"
    write_dump(path, sequences)
    return run(["dump", str(path), "--model", str(model)], tmp_path, *more)


def test_an_exact_dump_is_equal(
    model: Path, plain: list[DumpSequence], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = dump(model, plain, tmp_path, "--micro-batch-tokens", "9")
    assert (result["exit_code"], result["equal"], result["num_sequences"], result["num_tokens"]) == (0, True, 4, 24)
    assert (result["formats"], result["dtype"], result["numerics"]) == (["rlalign"], "float32", "invariant")
    assert "the sides agree bit for bit on 24 tokens of 4 sequences" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "kind"), [
    (one_ulp, "differs"), (with_logprob(MISSING), "missing"), (with_logprob(np.nan), "nonfinite"),
    (with_logprob(-np.inf), "nonfinite"),
], ids=["one_ulp", "missing", "nan", "inf"])  # fmt: skip
def test_one_bad_token_is_named(
    model: Path, plain: list[DumpSequence], tmp_path: Path, change: Change, kind: str
) -> None:
    result = dump(model, change(plain), tmp_path)
    assert result["exit_code"] == 1
    (token,) = result["worst_tokens"]
    assert (token["id"], token["position"], token["kind"]) == ("r2", 3, kind)
    assert token["source"].endswith("dump.jsonl:3")
    assert result["num_missing"] == (kind == "missing")
    if kind == "differs":
        assert (result["metrics"]["align/mismatch_count"], token["ulp"]) == (1, 1)
    else:
        assert result["metrics"]["align/logp_abs_diff/max"] == "Infinity"
        # no threshold forgives it
        assert dump(model, change(plain), tmp_path, "--max-abs", "100")["exit_code"] == 1


def test_what_is_not_finite_says_whose_it_is(
    model: Path, policy: modeling.Policy, plain: list[DumpSequence], tmp_path: Path
) -> None:
    """Of the dump, or of the model: a token that the dump gives a log-prob, beyond the model's own top-1."""
    assert dump(model, with_logprob(np.nan)(plain), tmp_path)["exceeded"][0] == (
        "1 log-prob of the dump is missing or not finite"
    )
    best = _within_support(policy, plain[0], SamplingParams(top_k=1))
    ids = best.token_ids.copy()
    ids[-1] = (ids[-1] + 1) % policy.vocab_size
    cut = replace(best, token_ids=ids, logprobs=np.zeros(6, np.float32), sampling=SamplingParams(top_k=1))
    result = dump(model, [cut, replace(best, id="x", logprobs=np.full(6, MISSING))], tmp_path)
    assert result["exceeded"][0] == "6 log-probs of the dump are missing or not finite"
    assert result["exceeded"][1].startswith("1 log-prob of the model is not finite where the dump's is (-inf: ")
    # no one's fault between two dumps
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, sequences in zip(files, (plain, with_logprob(-np.inf)(plain)), strict=True):
        write_dump(path, sequences)
    found = run(["compare", *map(str, files)], tmp_path)["exceeded"]
    assert found[0] == "1 log-prob of train is not finite where rollout's is"
    found = run(["compare", *map(str, files[::-1])], tmp_path)["exceeded"]
    assert found[0] == "1 log-prob is missing or not finite"


def test_a_difference_within_the_thresholds_reads_as_agreement(
    model: Path, plain: list[DumpSequence], tmp_path: Path
) -> None:
    result = dump(model, one_ulp(plain), tmp_path, "--max-abs", "1e-3")
    largest = result["metrics"]["align/logp_abs_diff/max"]
    assert result["exit_code"] == 0
    assert result["verdict"] == (
        "the sides agree within the thresholds on 24 tokens of 4 sequences (tokens whose bits differ: 1, "
        f"max |Δ| {largest:.3g})"
    )


def test_probabilities_are_guessed_in_a_note(
    model: Path, plain: list[DumpSequence], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = dump(model, [replace(s, logprobs=np.exp(s.logprobs)) for s in plain], tmp_path)
    assert result["exit_code"] == 1
    assert [note for note in result["notes"] if "probabilities, not log-probs?" in note]
    assert "probabilities, not log-probs?" in capsys.readouterr().out


def test_zeros_that_are_not_the_models_are_noted(model: Path, plain: list[DumpSequence], tmp_path: Path) -> None:
    ends = [replace(s, logprobs=np.append(s.logprobs[:-2], np.zeros(2, np.float32))) for s in plain]
    notes = dump(model, ends, tmp_path)["notes"]
    assert [note.partition(":")[0] for note in notes] == [
        f"{2 * len(plain)} of 24 log-probs of the dump are exactly 0 where the model's are below -0.1"
    ]
    assert dump(model, plain, tmp_path)["notes"] == []


def shifted(sequences: list[DumpSequence]) -> list[DumpSequence]:
    return [replace(s, logprobs=np.roll(s.logprobs, 1)) for s in sequences]


def swapped(sequences: list[DumpSequence]) -> list[DumpSequence]:
    a, b, *rest = sequences
    return [replace(a, logprobs=b.logprobs), replace(b, logprobs=a.logprobs), *rest]


@pytest.mark.parametrize(("change", "tokens"), [(shifted, 24), (swapped, 12)])
def test_shifted_and_swapped_logprobs_differ(
    model: Path, plain: list[DumpSequence], tmp_path: Path, change: Change, tokens: int
) -> None:
    result = dump(model, change(plain), tmp_path, "--max-abs", "1e-3")
    assert (result["exit_code"], result["metrics"]["align/mismatch_count"]) == (1, tokens)
    assert {token["id"] for token in result["worst_tokens"]} <= (
        {"r0", "r1"} if change is swapped else set("r0 r1 r2 r3".split())
    )


def test_masked_tokens_and_empty_rows_do_not_count(model: Path, plain: list[DumpSequence], tmp_path: Path) -> None:
    mask = np.ones(6, np.bool_)
    mask[3] = False
    one = with_logprob(np.nan)(plain)
    one[2] = replace(one[2], mask=mask)
    empty = replace(plain[0], id="padding", token_ids=np.zeros(0, np.int64), logprobs=np.zeros(0, np.float32),
                    prompt_token_ids=np.zeros(0, np.int64))  # fmt: skip
    result = dump(model, [*one, empty], tmp_path)
    assert (result["exit_code"], result["num_tokens"], result["num_sequences"]) == (0, 23, 5)
    assert dump(model, [empty], tmp_path)["exit_code"] == 2


def test_thresholds_decide(model: Path, plain: list[DumpSequence], tmp_path: Path) -> None:
    sequences = with_logprob(plain[2].logprobs[3] + 0.25)(plain)
    assert dump(model, sequences, tmp_path)["exceeded"] == ["1 of 24 tokens differ in their bits"]
    accepted = dump(model, sequences, tmp_path, "--max-abs", "0.3", "--mismatch-frac", "0.1", "--k3", "0.1")
    assert (accepted["exit_code"], accepted["equal"]) == (0, False)
    assert dump(model, sequences, tmp_path, "--mean-abs", "0.001")["exit_code"] == 1


def test_sampling_from_the_dump_or_from_flags(model: Path, policy: modeling.Policy, tmp_path: Path) -> None:
    warm = scored(policy, WARM)
    assert dump(model, warm, tmp_path)["exit_code"] == 0
    assert dump(model, warm, tmp_path)["notes"][0].startswith("4 sequences don't say what their log-probs are")
    assert dump(model, warm, tmp_path, "--raw")["exit_code"] == 1
    assert dump(model, warm, tmp_path, "--top-k", "0")["exit_code"] == 1
    silent = [replace(s, sampling=None, processed=True) for s in warm]
    assert dump(model, silent, tmp_path)["exit_code"] == 1
    told = dump(model, silent, tmp_path, "--temperature", "0.5", "--top-k", "3")
    assert (told["exit_code"], told["notes"]) == (0, [])
    raw = [replace(s, processed=False) for s in scored(policy, SamplingParams(temperature=0.5), processed=False)]
    assert dump(model, raw, tmp_path)["exit_code"] == 0
    assert dump(model, raw, tmp_path, "--processed")["exit_code"] == 1
    greedy = [replace(s, processed=True) for s in raw]
    assert dump(model, greedy, tmp_path, "--temperature", "0")["exit_code"] == 0


def test_a_sequence_the_model_cannot_take_is_named_and_the_rest_compared(
    model: Path, plain: list[DumpSequence], tmp_path: Path
) -> None:
    alien = replace(plain[1], token_ids=np.full(6, 9999))
    result = dump(model, [plain[0], alien, *plain[2:]], tmp_path)
    assert (result["exit_code"], result["num_tokens"], result["num_failed"]) == (2, 18, 1)
    assert result["failed"][0]["id"] == "r1"
    assert "dump.jsonl:2: response token id 9999 is outside the vocabulary" in result["failed"][0]["error"]
    result = dump(model, [alien], tmp_path)
    assert (result["exit_code"], result["num_tokens"]) == (2, 0)
    assert result["verdict"].startswith("nothing was compared: 1 sequence could not be")


def test_a_token_added_to_the_tokenizer_alone_is_no_hindrance(
    model: Path, plain: list[DumpSequence], tmp_path: Path
) -> None:
    """Every id of the dump is within the model's vocabulary, whatever else the tokenizer has."""
    padded = tmp_path / "padded"
    shutil.copytree(model, padded)
    tokenizer = modeling.load_tokenizer(model)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(padded)
    assert dump(padded, plain, tmp_path)["exit_code"] == 0


@pytest.mark.parametrize(("more", "message"), [
    ((), "dump takes either FILE or --watch DIR"),
    (("FILE", "--watch", "."), "dump takes either FILE or --watch DIR"),
    (("FILE", "--watch-seconds", "1"), "--watch-seconds belongs to --watch"),
    (("FILE", "--poll-seconds", "1"), "--poll-seconds belongs to --watch"),
    (("FILE", "--max-abs", "-1"), "--max-abs -1.0: a threshold is a number >= 0"),
    (("FILE", "--mismatch-frac", "5"), "--mismatch-frac 5.0: a share is at most 1"),
    (("FILE", "--temperature", "-1"), "temperature=-1.0: Input should be"),
    (("FILE", "--raw", "--processed"), "not allowed with argument"),
    (("FILE", "--format", "vllm", "--logprobs", "x"), "vllm dumps have one field of log-probs"),
    (("none.jsonl",), "no such file"),
    (("FILE", "--json", "no/such/out.json"), "--json: no such folder"),
    (("FILE", "--json", "/"), "--json: / is a folder"),
    (("--watch", "nowhere"), "--watch: no such folder: nowhere"),
])  # fmt: skip
def test_unusable_arguments_exit_2_in_one_line(
    model: Path,
    plain: list[DumpSequence],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    message: str,
) -> None:
    path = tmp_path / "dump.jsonl"
    write_dump(path, plain)
    assert main(["dump", "--model", str(model), *(str(path) if part == "FILE" else part for part in more)]) == 2
    assert message in error_line(capsys)


def rows(*ids: str | None) -> list[dict[str, Any]]:
    bare = {"prompt_token_ids": [3, 4], "token_ids": [5, 6], "logprobs": [-1.0, -2.0]}
    return [bare if name is None else {"id": name, **bare} for name in ids]


def test_an_id_that_a_file_has_twice_is_refused_as_compare_does(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, *rows("a", "b", "a"))
    for command in (["dump", str(path), "--model", str(model)], ["compare", str(path), str(path)]):
        assert main(command) == 2
        said = error_line(capsys)
        assert f"{path}:3: a second sequence of the id 'a', which {path}:1 has too; ids name a sequence once" in said
    # engines number their requests anew for every file of a folder; and "0" is not the number of one without an id
    folder = tmp_path / "steps"
    for name in ("step_1", "step_2"):
        (folder / name).mkdir(parents=True)
        write(folder / name, *rows("a", None, "1"))
    assert run(["dump", str(folder), "--model", str(model)], tmp_path)["num_sequences"] == 6


def test_a_sequence_without_an_id_is_shown_by_its_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alien = rows(None)[0] | {"token_ids": [5, 9999]}
    path = write(tmp_path, alien, *rows(None))
    result = run(["dump", str(path), "--model", str(model)], tmp_path)
    assert (result["failed"][0]["id"], result["worst_tokens"][0]["id"]) == ("0", "1")
    shown = capsys.readouterr().out
    assert f"sequence {path}:1 was not compared: response token id 9999" in shown
    assert f"; worst: sequence {path}:2 position " in shown
    assert " dump.jsonl:2 " in shown  # the table
    with_ids = rows("x")[0] | {"token_ids": [5, 9999]}
    run(["dump", str(write(tmp_path, with_ids, *rows("y"))), "--model", str(model)], tmp_path)
    shown = capsys.readouterr().out
    assert f"sequence x was not compared: {path}:1: response" in shown
    assert f"worst: sequence y position 1, token 6 ({path}:2)" in shown or "worst: sequence y position 0" in shown


def test_watch_reads_what_is_there_and_says_what_is_unfinished(
    model: Path, plain: list[DumpSequence], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "dumps"
    folder.mkdir()
    write_dump(folder / "a.jsonl", plain[:2])
    write_dump(folder / "b.parquet", one_ulp(plain)[2:])
    with (folder / "a.jsonl").open("a") as file:
        file.write('{"id": "torn", "prompt_')
    result = run(["dump", "--watch", str(folder), "--model", str(model)], tmp_path, "--watch-seconds", "0")
    assert (result["exit_code"], result["num_sequences"]) == (1, 4)
    assert result["notes"] == [f"{folder / 'a.jsonl'} is unfinished; its end was not compared"]
    assert f"{folder / 'a.jsonl'}: 2 sequences, 12 tokens, 0 differ" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ['{"id": "x"}', '{"id": "r0", "prompt_', "twice"])
def test_watch_says_what_was_compared_before_a_line_that_cannot_be_read(
    model: Path, plain: list[DumpSequence], tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    pytest.importorskip("plotly", reason="the page needs plotly")
    file, page = tmp_path / "dumps" / "a.jsonl", tmp_path / "page.html"
    file.parent.mkdir()
    write_dump(file, plain[:3])
    line = file.read_text().splitlines()[0] if wrong == "twice" else wrong
    with file.open("a") as more:
        more.write(f"{line}\n")
    command = ["dump", "--watch", str(file.parent), "--model", str(model), "--html", str(page)]
    result = run(command, tmp_path, "--watch-seconds", "60")
    shown = capsys.readouterr()
    assert (result["exit_code"], result["equal"], result["num_sequences"]) == (2, False, 3)
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
    why = shown.err.removeprefix("error: ").strip()
    assert f"{file}, line 4: " in why or f"{file}:4" in why
    assert result["verdict"] == f"the sides agree bit for bit on 18 tokens of 3 sequences; not all was read: {why}"
    assert shown.out.splitlines()[-1] == result["verdict"]
    assert "not all was read" in page.read_text()


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the vLLM dump of the shared data")
def test_what_vllm_reported_on_a_gpu(tmp_path: Path) -> None:
    """2 of the 64 completions: bf16 on an H200 by vLLM's kernels, against our bf16 forward on a CPU."""
    command = ["dump", str(REAL / "vllm_native_t1.jsonl"), "--model", str(REAL / "qwen3-tiny"), "--limit", "2"]
    result = run(command, tmp_path, "--max-abs", "0.3", "--mean-abs", "0.05")
    assert (result["exit_code"], result["formats"], result["dtype"]) == (0, ["vllm"], "bfloat16")
    metrics = result["metrics"]
    assert 0.02 < metrics["align/logp_abs_diff/mean"] < 0.05
    assert 0.1 < metrics["align/logp_abs_diff/max"] < 0.25
    assert metrics["align/nonfinite_count"] == 0


def test_parquet_of_an_exact_dump_keeps_float32(plain: list[DumpSequence], tmp_path: Path) -> None:
    write_dump(tmp_path / "a.parquet", plain)
    assert str(parquet.read_schema(tmp_path / "a.parquet").field("logprobs").type) == "list<element: float>"
