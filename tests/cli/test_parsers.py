"""What holds for every command line: no option may be cut short, and models are folders."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlalign import cli
from rlalign.cli.verify import main

MODULES = [name for _, name, _ in pkgutil.iter_modules(cli.__path__)]
SOURCES = {name: Path(cli.__path__[0], f"{name}.py").read_text(encoding="utf-8") for name in MODULES}


def and_below(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from and_below(one)


@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if "\ndef make_parser(" in source])
def test_no_parser_takes_the_beginning_of_an_option(name: str) -> None:
    parsers = list(and_below(importlib.import_module(f"rlalign.cli.{name}").make_parser()))
    assert [parser.prog for parser in parsers if parser.allow_abbrev] == []


@pytest.mark.parametrize(("name", "words"), [("plot_gap", ["run", "--outpu=a.png"]), ("readme_tables", ["--chec"])])
def test_neither_do_those_that_are_made_in_main(name: str, words: list[str]) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module(f"rlalign.cli.{name}").main(words)


def test_a_threshold_that_is_cut_short_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "a.jsonl", "b.jsonl", "--max-ab", "1"]) == 2
    assert "unrecognized arguments: --max-ab 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [["dump", "a.jsonl"], ["attribute", "--dump", "a.jsonl"], ["run", "--prompts", "p"]]
)
def test_a_name_of_the_hub_is_told_from_a_folder(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--model", "Qwen/Qwen3-0.6B"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "error: model folder Qwen/Qwen3-0.6B does not exist; if that is a name on the Hugging Face hub"
    )
    assert "hf download Qwen/Qwen3-0.6B --local-dir DIR" in said and said.count("\n") == 1


def test_an_older_checkpoint_is_a_folder_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["attribute", "--dump", "a.jsonl", "--model", str(tmp_path), "--previous-model", "org/older"]
    assert main(words) == 2
    assert "hf download org/older" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["nowhere", "/org/name", "a/b/c", "models/name"])
def test_other_paths_are_folders_that_are_not_there(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert main(["dump", "a.jsonl", "--model", folder]) == 2
    assert "hub" not in capsys.readouterr().err
