"""From an exception to one readable line and an exit code; every command of rlalign ends here.

| exit | meaning                                                                  |
|------|--------------------------------------------------------------------------|
| 0    | done (a comparison: equal)                                               |
| 1    | rollout and trainer differ, or a log-prob is non-finite or missing       |
| 2    | unusable input: bad argument, file, config or combination                |
| 3    | internal error                                                           |
| 130  | Ctrl-C                                                                   |

A traceback is printed only with ``--traceback`` or ``RLALIGN_TRACEBACK=1``.
"""

from __future__ import annotations

import io
import os
import re
import sys
import traceback as traceback_module
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console

from rlalign.cli.near import did_you_mean
from rlalign.config import Config, config_to_dict
from rlalign.verifier.decide import MismatchHalt

EXIT_EQUAL = 0
EXIT_DIFFERENT = 1
EXIT_UNUSABLE = 2
EXIT_INTERNAL = 3
EXIT_INTERRUPTED = 130

_UNUSABLE = (ValueError, NotImplementedError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
# their own exceptions are about what the user gave them: settings, weight files, accounts
_INPUT_PACKAGES = ("hydra", "omegaconf", "safetensors", "wandb")
_MAX_CAUSES = 8


def run_main(fn: Callable[[], int | None], *, traceback: bool | None = None) -> int:
    """Run ``fn`` and return its exit code (None counts as 0); an exception becomes one line on stderr and a code.

    ``traceback`` None asks ``RLALIGN_TRACEBACK`` and the command line. A ``MismatchHalt`` also prints its table of
    worst tokens, so whoever raises it need not. ``SystemExit`` (argparse) passes through.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that has no Δ must not change an exit code
            stream.reconfigure(errors="backslashreplace")
    try:
        return fn() or EXIT_EQUAL
    except KeyboardInterrupt:
        _say("interrupted")
        return EXIT_INTERRUPTED
    except Exception as error:
        if traceback if traceback is not None else traceback_wanted():
            traceback_module.print_exception(error)
        return _report(root_cause(error))


def traceback_wanted() -> bool:
    """True if the user asked for tracebacks, by ``--traceback`` or ``RLALIGN_TRACEBACK=1``."""
    return "--traceback" in sys.argv[1:] or os.environ.get("RLALIGN_TRACEBACK", "") not in ("", "0")


def root_cause(error: BaseException) -> BaseException:
    """The exception that a remote task raised, out of the wrapper that carried it here.

    Ray wraps an actor's exception in a class whose text is a whole traceback; the original hangs on ``.cause``.
    """
    for _ in range(_MAX_CAUSES):  # bounded: a wrapper that names itself as its cause must not hang an error path
        cause = getattr(error, "cause", None)
        if not (_package(error) == "ray" and isinstance(cause, BaseException)):
            break
        error = cause
    return error


def exit_code(error: BaseException) -> int:
    """The exit code that ``error`` stands for."""
    # FloatingPointError: engine and trainer raise it for log-probs and gradients that are not finite
    if isinstance(error, MismatchHalt | FloatingPointError):
        return EXIT_DIFFERENT
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, _UNUSABLE) or _package(error) in _INPUT_PACKAGES:
        return EXIT_UNUSABLE
    # transformers reports an unreadable checkpoint as an OSError without an errno; a real I/O failure has one
    if isinstance(error, OSError) and error.errno is None:
        return EXIT_UNUSABLE
    return EXIT_INTERNAL


def one_line(error: BaseException) -> str:
    """The message of ``error`` on one line; pydantic's lists become ``field: reason; field: reason``."""
    details = getattr(error, "errors", None)
    if _package(error) == "pydantic_core" and callable(details):
        return "; ".join(_field_error(item) for item in details(include_url=False, include_context=False))
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"no such file or folder: {error.filename}"
    text = " ".join(str(error).split()) or type(error).__name__
    if _package(error) == "hydra" and (unknown := re.match(r"Could not override '([^']+)'", text)):
        return _unknown_setting(unknown[1]) or text
    return f"a weights file can't be read: {text}" if _package(error) == "safetensors" else text


def _field_error(item: dict[str, object]) -> str:
    where = ".".join(str(part) for part in item["loc"]) or "config"  # type: ignore[attr-defined]
    if item["type"] == "unexpected_keyword_argument":
        return _unknown_setting(where) or f"{where}: no such setting"
    reason = str(item["msg"]).removeprefix("Value error, ")
    if reason.startswith(where):
        return reason
    # a whole section's repr says nothing that the reason doesn't
    if item["type"] == "value_error" or isinstance(item["input"], dict):
        return f"{where}: {reason}"
    return f"{where}={item['input']!r}: {reason}"


def _unknown_setting(name: str) -> str | None:
    """What to say of a setting that isn't there; None if its recipe merely lacks it, or its group is open to any."""
    settings = {*_names(config_to_dict(Config())), "experiment"}
    if name in settings or name.startswith("attention."):
        return None
    return f"{name}: no such setting{did_you_mean(name, settings)}"


def _names(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from _names(value, f"{prefix}{name}.")


def _report(error: BaseException) -> int:
    code = exit_code(error)
    if isinstance(error, MismatchHalt):
        if error.report.worst:  # not where all sampled tokens agree, and something beyond them differs
            Console(stderr=True).print(error.report.table())
        _say(one_line(error))
    elif code == EXIT_INTERNAL:
        _say(
            f"internal error: {type(error).__name__}: {one_line(error)} (--traceback or RLALIGN_TRACEBACK=1 shows more)"
        )
    else:
        _say(f"error: {one_line(error)}")
    return code


def _package(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
