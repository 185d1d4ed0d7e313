from __future__ import annotations

import io

from rich.console import Console

from rlalign.run.progress import Progress, step_line

METRICS = {
    "reward/mean": 0.4123,
    "perf/rollout_tokens_per_s": 9120.4,
    "align/logp_abs_diff/max": 0.0,
    "align/mismatch_count": 0.0,
}
SECONDS = {"rollout": 0.61, "train": 1.5, "sync": 0.02}


def test_the_line_says_what_matters():
    line = step_line(7, 60, METRICS, SECONDS).plain
    assert line.startswith("step 7/60  reward 0.412  9,120 tok/s  max|Δlogp| 0  mismatches 0  rollout 0.61s")
    assert "train 1.50s" in line and "verify" not in line


def test_a_difference_is_seen():
    line = step_line(1, 2, METRICS | {"align/logp_abs_diff/max": 1.25e-6, "align/mismatch_count": 1234.0}, SECONDS)
    assert "max|Δlogp| 1.25e-06  mismatches 1,234" in line.plain
    assert "red" in {str(span.style) for span in line.spans}


def test_a_log_gets_one_plain_line_per_step():
    out = io.StringIO()
    progress = Progress(3, Console(file=out, force_terminal=False, soft_wrap=True))
    for step in (1, 2, 3):
        progress.step(step, METRICS, SECONDS)
    progress.close()
    lines = out.getvalue().splitlines()
    assert len(lines) == 3 and "\x1b" not in out.getvalue()
    assert lines[2].startswith("step 3/3")


def test_a_terminal_gets_one_line_that_is_rewritten():
    out = io.StringIO()
    progress = Progress(3, Console(file=out, force_terminal=True, width=300))
    for step in (1, 2, 3):
        progress.step(step, METRICS, SECONDS)
    progress.close()
    assert out.getvalue().count("\n") <= 2 and "step 3/3" in out.getvalue()


def test_texts_with_brackets_are_shown_as_they_are():
    out = io.StringIO()
    Progress(1, Console(file=out)).say("left out: [/prompt] [red]x[/red]")
    assert out.getvalue().strip() == "left out: [/prompt] [red]x[/red]"
