"""What an attribution prints: few lines, places as ranges, and the verdict by itself."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.pages import parse
from support.softmax_scorer import Softmax, dump

from rlalign.cli.attribute_output import record, show, write_page
from rlalign.config import SamplingParams
from rlalign.verifier.attribute import attribute
from rlalign.verifier.attribution import Attribution, Effect
from rlalign.verifier.causes import setting_cause
from rlalign.verifier.dumps import DumpSequence
from rlalign.verifier.residue import Finding
from rlalign.verifier.scores import Gap

GAP, NOTHING = Gap(80, 80, 0.5, 1.0), Gap(0, 0, 0.0, 0.0)
SEQUENCES = [
    DumpSequence(str(i), np.arange(3), np.arange(40), np.zeros(40, np.float32), source=f"d.jsonl:{i + 1}")
    for i in range(8)
]
FACTS = {"dump": "d.jsonl", "model": "m", "numerics": "invariant", "dtype": "float32", "sequences": 8, "failed": [],
         "round_trips": None, "notes": [], "exceeded": [], "exit_code": 1}  # fmt: skip


def skipped(name: str, reason: str) -> Effect:
    return Effect(setting_cause(name, "sampling", "", ""), NOTHING, NOTHING, 0.0, reason)


def finding(name: str, *where: tuple[int, int]) -> Finding:
    return Finding(name, "what", len(where), where)


def outcome(effects: tuple[Effect, ...] = (), findings: tuple[Finding, ...] = ()) -> Attribution:
    return Attribution(8, GAP, effects, (), GAP, None, (), findings)


def shown(one: Attribution, **facts: Any) -> str:
    console = Console(file=io.StringIO(), width=200, force_terminal=facts.pop("terminal", False))
    show(one, FACTS | facts, SEQUENCES, console, worst=12)
    return console.file.getvalue()


def test_causes_of_one_reason_share_a_line_and_there_are_few_lines() -> None:
    effects = [
        skipped("top_p", "no sequence of the dump was sampled with it"),
        skipped("raw", "no sequence of the dump was sampled with any transform"),
        skipped("processed", "the log-probs are taken as processed to begin with"),
        skipped("linear", "changes no log-prob here"),
        *(skipped(f"prompt{i}", "needs a tokenizer, and the model's folder has none") for i in range(20)),
        skipped("operators.invariant", "is not exact: " + "word " * 60),
        *(skipped(f"x{i}", f"reason {i}") for i in range(9)),
    ]
    lines = [line for line in shown(outcome(tuple(effects))).splitlines() if line.startswith(("no eff", "not tried"))]
    assert lines[0] == "no effect here: top_p, raw, processed, linear"
    assert lines[1].startswith("not tried: prompt0, prompt1, ")
    assert lines[1].endswith("prompt11 and 8 more: needs a tokenizer, and the model's folder has none")
    assert len(lines[2]) < 160
    assert lines[3:] == [*(f"not tried: x{i}: reason {i}" for i in range(3)), "not tried: 6 more (--json says why)"]


@pytest.mark.parametrize(("found", "line"), [
    (finding("far", *((0, i) for i in range(40))), "far: 40 tokens, d.jsonl:1 positions 0-39"),
    (finding("far", (0, 3)), "far: 1 token, d.jsonl:1 position 3"),
    (finding("far", (0, 38), (0, 39), (1, 0), (1, 2)),
     "far: 4 tokens, d.jsonl:1 positions 38-39, d.jsonl:2 position 0, d.jsonl:2 position 2"),
    (finding("far", *((i, 1) for i in range(8))),
     f"far: 8 tokens, {', '.join(f'd.jsonl:{i} position 1' for i in range(1, 6))} and 3 more"),
    (finding("sequence", *((2, i) for i in range(40))), "sequence: 40 tokens, d.jsonl:3"),
    (finding("sequence", *((2, i) for i in range(5))), "sequence: 5 tokens, d.jsonl:3"),
    (finding("sequence", *((i, j) for i in range(8) for j in range(40))),
     f"sequence: 320 tokens, {', '.join(f'd.jsonl:{i}' for i in range(1, 6))} and 3 more"),
])  # fmt: skip
def test_places_are_ranges_or_whole_sequences(found: Finding, line: str) -> None:
    one = outcome(findings=(found,))
    assert line in shown(one).splitlines()
    assert len(record(one, FACTS, SEQUENCES)["findings"][0]["where"]) <= 5


def test_the_verdict_stands_by_itself_at_the_end() -> None:
    lines = shown(outcome(), terminal=True).splitlines()
    bold_red = f"\x1b[1;31m{outcome().verdict}\x1b[0m"
    assert lines[-2:] == ["", bold_red]


def test_few_sequences_that_were_not_compared_are_named_and_one_is_no_plural() -> None:
    failed = [{"id": str(i), "error": "too long"} for i in range(7)]
    trips = {"prompts_that_do_not": 1, "responses_that_do_not": 0}
    text = shown(outcome(), failed=failed, round_trips=trips, sequences=1)
    assert text.count("was not compared: too long") == 5
    assert "... and 2 more were not" in text
    assert "1 prompt of 1 sequence would become other tokens if decoded and encoded again: hand token ids on" in text
    assert "encoded again" not in shown(outcome(), round_trips={"prompts_that_do_not": 0, "responses_that_do_not": 0})


def test_the_page_has_the_pictures_before_and_after_what_was_kept(tmp_path: Path) -> None:
    made = dump(Softmax(), SamplingParams(temperature=0.7))
    found = attribute(made, Softmax(), decode=False)
    write_page(found, FACTS, made, tmp_path / "page.html")
    page = parse(tmp_path / "page.html")
    for title in ("|Δ| of every token", "probability by trainer and rollout", "where in the response"):
        assert f"as the dump says: {title}" in page.titles and f"with all causes: {title}" in page.titles
    before, after = (figures[0]["data"] for figures in page.figures[::3])
    assert before != after
    assert "temperature=0.7" in page.cells
    assert "no older checkpoint was given (--previous-model)" in page.cells


def test_what_to_do_next_is_said_where_something_is_left() -> None:
    assert "bisect --b model=DIR" in shown(outcome())
    assert "bisect" not in shown(outcome(), exit_code=0)


def test_causes_that_remove_nothing_are_not_in_the_table_but_in_the_record() -> None:
    def tried(name: str, mean: float) -> Effect:
        return Effect(setting_cause(name, "sampling", "", ""), GAP, Gap(80, 80, mean, 1.0), 0.1)

    one = outcome((tried("worse", 0.6), tried("better", 0.25), tried("same", GAP.mean_abs)))
    text = shown(one)
    assert "better" in text and "worse" not in text and "same" not in text
    assert len(record(one, FACTS, SEQUENCES)["alone"]) == 3
