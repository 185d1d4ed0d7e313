from __future__ import annotations

import io

import pytest

from rlalign.cli.errors import run_main
from rlalign.config import config_from_dict
from rlalign.verifier.decide import MismatchHalt
from rlalign.verifier.report import Report, WorstToken

BAD = WorstToken("differs", (1, 2, 3), 4, 5, "a ⟦b⟧", -1.0, -2.0, -1.0, 6, 7, 8, 9, "stop")
REPORT = Report(10, 2, 1, 0, 1.0, (BAD,))


def run(error: BaseException, **more: bool) -> int:
    def raises() -> None:
        raise error

    return run_main(raises, **more)


@pytest.fixture(autouse=True)
def _no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLALIGN_TRACEBACK", raising=False)
    monkeypatch.setattr("sys.argv", ["prog"])


@pytest.mark.parametrize(("error", "code", "text"), [
    (ValueError("bad\n  thing"), 2, "error: bad thing"),
    (NotImplementedError("backend='triton'"), 2, "error: backend='triton'"),
    (FileNotFoundError(2, "No such file", "x.jsonl"), 2, "error: no such file or folder: x.jsonl"),
    (OSError("no config.json in DIR"), 2, "error: no config.json in DIR"),
    (OSError(28, "No space left on device"), 3, "internal error: OSError: [Errno 28] No space left on device"),
    (FloatingPointError("log-prob is nan"), 1, "error: log-prob is nan"),
    (KeyError("k"), 3, "internal error: KeyError: 'k'"),
    (KeyboardInterrupt(), 130, "interrupted"),
])  # fmt: skip
def test_codes_and_single_line(error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(error) == code
    said = capsys.readouterr().err
    assert said.startswith(text)
    assert said.count("\n") == 1


def test_a_terminal_without_greek_changes_no_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    assert run_main(lambda: print("max |Δ|") or 1) == 1
    stream.flush()
    assert stream.buffer.getvalue() == b"max |\\u0394|\n"


def test_return_values_pass_through() -> None:
    assert run_main(lambda: None) == 0
    assert run_main(lambda: 1) == 1


@pytest.mark.parametrize(("values", "expected"), [
    ({"run": {"stepz": 3}}, "error: run.stepz: no such setting; did you mean run.steps?"),
    ({"sampling": {"temperature": -1}}, "error: sampling.temperature=-1: Input should be greater than or equal to 0"),
    ({"algorithm": {"group_size": 1}}, "error: algorithm.group_size=1 leaves no group"),
])  # fmt: skip
def test_config_errors_name_the_field(
    values: dict[str, object], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(lambda: config_from_dict(values) and None) == 2
    said = capsys.readouterr().err
    assert said.startswith(expected)
    assert said.count("\n") == 1


def test_halt_shows_the_table_and_names_the_token(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(MismatchHalt(REPORT)) == 1
    said = capsys.readouterr().err
    assert "Worst 1 of 1" in said
    assert "step 1 prompt 2 sample 3 position 4, token 5" in said


def test_halt_over_something_beyond_the_sampled_tokens_shows_no_empty_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(MismatchHalt(Report(10, 2, 0, 0, 0.0, (), ("all logits differ",)))) == 1
    said = capsys.readouterr().err
    assert said == "rollout and trainer agree bit for bit on 10 tokens of 2 samples; all logits differ\n"


def test_a_wrapped_actor_error_is_unwrapped(capsys: pytest.CaptureFixture[str]) -> None:
    wrapper = type("RayTaskError", (Exception,), {"__module__": "ray.exceptions"})("a whole traceback\nof lines")
    wrapper.cause = MismatchHalt(REPORT)
    assert run(wrapper) == 1
    wrapper.cause = ValueError("prompt is empty")
    assert run(wrapper) == 2
    assert "error: prompt is empty\n" in capsys.readouterr().err


def test_what_wandb_refuses_is_unusable_input(capsys: pytest.CaptureFixture[str]) -> None:
    from wandb.errors import UsageError

    assert run(UsageError("No API key configured.")) == 2
    assert capsys.readouterr().err == "error: No API key configured.\n"


def test_hydra_errors_are_unusable_input(capsys: pytest.CaptureFixture[str]) -> None:
    error = type("ConfigCompositionException", (Exception,), {"__module__": "hydra.errors"})("Could not find 'x'")
    assert run(error) == 2
    assert capsys.readouterr().err == "error: Could not find 'x'\n"


def test_traceback_only_when_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(ValueError("x"))
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("RLALIGN_TRACEBACK", "1")
    run(ValueError("x"))
    assert "Traceback" in capsys.readouterr().err
    run(ValueError("x"), traceback=False)
    assert "Traceback" not in capsys.readouterr().err
