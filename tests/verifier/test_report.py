from __future__ import annotations

import io
import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from rlalign.config import SamplingParams, config_from_dict
from rlalign.records import Completion, Prompt, Sample
from rlalign.verifier.compare import compare_samples
from rlalign.verifier.decide import MismatchHalt, decide, enforce, policy_of
from rlalign.verifier.report import Report, build_report, record


def sample(index: int, logprobs: list[float], token_ids: list[int] | None = None) -> Sample:
    ids = np.array(token_ids or range(100, 100 + len(logprobs)), np.int64)
    prompt = Prompt(prompt_id=7, token_ids=np.array([1, 2, 3]), text="p", ground_truth="")
    completion = Completion(
        request_id=f"r{index}", sample_index=index, prompt_ids=prompt.token_ids, token_ids=ids,
        logprobs=np.float32(logprobs), raw_logprobs=None, batch_sizes=np.arange(5, 5 + len(ids), dtype=np.int32),
        seed=0, weights_version=4, finish_reason="stop",
    )  # fmt: skip
    return Sample(step=2, prompt=prompt, completion=completion, sampling=SamplingParams())


def report_of(samples: list[Sample], train: list[list[float]], **more: object) -> Report:
    return build_report(compare_samples(samples, [np.float32(t) for t in train]), samples, **more)


def text_of(report: Report) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(report.table())
    return console.file.getvalue()


def test_worst_first_missing_then_nonfinite_then_largest_difference() -> None:
    samples = [sample(0, [-1.0, -1.0, -1.0]), sample(1, [-1.0, np.nan]), sample(2, [-1.0, -1.0])]
    report = report_of(samples, [[-1.0, -1.5, -3.0], [-1.0, -1.0], [-1.0]])
    assert [(t.kind, t.key[2], t.position) for t in report.worst] == [
        ("missing", 2, 1), ("nonfinite", 1, 1), ("differs", 0, 2), ("differs", 0, 1),
    ]  # fmt: skip
    assert (report.mismatch_count, report.nonfinite_count, report.num_tokens) == (4, 2, 7)
    assert report.max_abs_delta == np.inf


def test_a_worst_token_carries_what_finds_it_again() -> None:
    report = report_of([sample(0, [-1.0, -2.0, -3.0])], [[-1.0, -2.5, -3.0]])
    token = report.worst[0]
    assert token.key == (2, 7, 0)
    assert (token.position, token.token_id, token.sequence_length, token.batch_size) == (1, 101, 6, 6)
    assert (token.rollout, token.train, token.delta) == (-2.0, -2.5, -0.5)
    assert token.ulp == 2**21
    assert (token.weights_version, token.finish_reason) == (4, "stop")
    assert token.context == " 1 2 3 100 ⟦ 101 ⟧ 102 "


def test_context_decodes_and_shows_newlines() -> None:
    report = report_of([sample(0, [-1.0], [9])], [[-2.0]], decode=lambda ids: "".join(f"<{i}>\n" for i in ids))
    assert report.worst[0].context == "<1>⏎<2>⏎<3>⏎⟦<9>⏎⟧"


def test_list_is_cut_but_counts_are_not() -> None:
    report = report_of([sample(0, [-1.0] * 30)], [[-2.0] * 30], worst_tokens=4)
    assert (len(report.worst), report.mismatch_count) == (4, 30)


def test_table_shows_neighbouring_floats_apart_and_survives_markup() -> None:
    train = np.nextafter(np.float32(-1.0), np.float32(0))
    report = report_of([sample(0, [-1.0])], [[float(train)]], decode=lambda ids: "[bold]x[/nope]")
    text = text_of(report)
    assert "-0.99999994" in text
    assert "[/nope]" in text


def test_the_table_counts_no_ulp_beyond_a_million() -> None:
    near, far = text_of(report_of([sample(0, [-1.0])], [[-1.0625]])), text_of(report_of([sample(0, [-1.0])], [[-2.0]]))
    assert "524,288" in near
    assert "> 1e6" in far
    assert "8,388,608" not in far


def test_table_says_what_the_numbers_of_a_key_are() -> None:
    text = text_of(report_of([sample(0, [-1.0])], [[-2.0]]))
    head, key = text.index("step/prompt"), text.index("2/7/0")
    assert head < text.index("/sample") < key


def test_verdict_is_one_line_and_names_the_token() -> None:
    equal = report_of([sample(0, [-1.0, -2.0])], [[-1.0, -2.0]])
    assert equal.verdict == "rollout and trainer agree bit for bit on 2 tokens of 1 sample"
    verdict = report_of([sample(0, [-1.0, -2.0])], [[-1.0, -2.5]]).verdict
    assert "differ on 1 of 2 tokens" in verdict
    assert "step 2 prompt 7 sample 0 position 1, token 101" in verdict
    assert "\n" not in verdict
    assert "nothing was compared" in report_of([], []).verdict


def test_record_is_plain_json() -> None:
    report = report_of([sample(0, [-1.0])], [[-2.0]])
    back = json.loads(json.dumps(record(report.worst[0])))
    assert back["key"] == "2/7/0"
    assert back["delta"] == -1.0


def test_halt_carries_the_report_across_a_pickle() -> None:
    report = report_of([sample(0, [-1.0])], [[-2.0]])
    with pytest.raises(MismatchHalt) as caught:
        enforce(report, "halt", warn=pytest.fail)
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.report == report
    assert str(again) == report.verdict


def test_policies() -> None:
    bad, good = report_of([sample(0, [-1.0])], [[-2.0]]), report_of([sample(0, [-1.0])], [[-1.0]])
    said: list[str] = []
    assert enforce(bad, "warn", warn=said.append) == "warn"
    assert said == [bad.verdict]
    assert enforce(bad, "log", warn=pytest.fail) == "log"
    assert enforce(good, "halt", warn=pytest.fail) == "pass"
    with pytest.raises(ValueError, match="on_mismatch='stop'"):
        decide(bad, "stop")


def test_correct_goes_on_where_there_is_a_ratio_to_correct_by() -> None:
    bad, broken = report_of([sample(0, [-1.0])], [[-2.0]]), report_of([sample(0, [-1.0])], [[np.nan]])
    assert enforce(bad, "correct", warn=pytest.fail, dump=pytest.fail) == "correct"
    for hopeless in (broken, report_of([], [])):
        with pytest.raises(MismatchHalt):
            enforce(hopeless, "correct", warn=pytest.fail)


def test_a_difference_beyond_the_sampled_tokens_is_one() -> None:
    good = report_of([sample(0, [-1.0])], [[-1.0]])
    assert good.equal
    found = replace(good, beyond=("all logits differ", "layer 3 differs"))
    assert not found.equal
    assert found.verdict == f"{good.verdict}; all logits differ; layer 3 differs"
    assert decide(found, "halt") == "halt"


def test_nothing_compared_halts() -> None:
    with pytest.raises(MismatchHalt, match="nothing was compared"):
        enforce(report_of([], []), "halt", warn=pytest.fail)


@pytest.mark.parametrize(("values", "expected"), [
    ({}, "halt"),
    ({"numerics": "native"}, "log"),
    ({"align": {"on_mismatch": "warn"}}, "warn"),
    ({"numerics": "native", "align": {"on_mismatch": "halt"}}, "halt"),
])  # fmt: skip
def test_policy_of_config(values: dict[str, object], expected: str) -> None:
    assert policy_of(config_from_dict(values)) == expected


def test_train_logprobs_must_match_the_samples() -> None:
    with pytest.raises(ValueError, match="train_logprobs has 1 entries for 2 samples"):
        compare_samples([sample(0, [-1.0]), sample(1, [-1.0])], [np.float32([-1.0])])


def test_dump_and_halt_keep_the_step_and_nothing_empty() -> None:
    bad, good = report_of([sample(0, [-1.0])], [[-2.0]]), report_of([sample(0, [-1.0])], [[-1.0]])
    said: list[str] = []
    kept: list[str] = []
    assert enforce(bad, "dump", warn=said.append, dump=lambda: kept.append("dump")) == "dump"
    with pytest.raises(MismatchHalt):
        enforce(bad, "halt", warn=pytest.fail, dump=lambda: kept.append("halt"))
    assert enforce(good, "dump", warn=pytest.fail, dump=pytest.fail) == "pass"
    assert enforce(bad, "log", warn=pytest.fail, dump=pytest.fail) == "log"
    with pytest.raises(MismatchHalt):
        enforce(report_of([], []), "halt", warn=pytest.fail, dump=pytest.fail)
    assert (kept, said) == (["dump", "halt"], [bad.verdict])
