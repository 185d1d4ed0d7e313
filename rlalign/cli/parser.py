"""The argument parser of every command."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, NoReturn

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class Parser(argparse.ArgumentParser):
    """argparse prints its usage before an error; here an error is one line, like every other one. And an option is
    written out: the beginning of a threshold's name would set another one than was meant."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """As argparse's. Raises FileNotFoundError for a model that is named as the hub does."""
        parsed = super().parse_args(*args, **kwargs)
        for folder in (getattr(parsed, "model", None), *getattr(parsed, "previous_model", ())):
            if folder is not None:
                _refuse_hub_name(folder)
        return parsed

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _refuse_hub_name(folder: Path) -> None:
    # beside other folders it is one whose name is wrong
    if _HUB_NAME.fullmatch(str(folder)) and not folder.exists() and not folder.parent.exists():
        raise FileNotFoundError(
            f"model folder {folder} does not exist; if that is a name on the Hugging Face hub, run "
            f"hf download {folder} --local-dir DIR first, and give DIR"
        )
