"""How a recipe's command line starts and ends: every error in one line, with the exit code of ``errors``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from transformers.utils import logging as transformers_logging

from rlalign.cli.errors import run_main


def launch(main: Callable[[], None]) -> NoReturn:
    """Run a recipe's hydra main and exit. ``--traceback``, which hydra doesn't know, shows tracebacks."""
    if "--traceback" in sys.argv:
        sys.argv.remove("--traceback")
        os.environ["RLALIGN_TRACEBACK"] = "1"
    # otherwise hydra prints exceptions itself and exits 1, whatever they are
    os.environ["HYDRA_FULL_ERROR"] = "1"
    transformers_logging.disable_progress_bar()
    sys.exit(run_main(main))


def finish(job: Callable[[], None]) -> NoReturn:
    """Run a recipe's own part and exit from there: hydra would put a line of its own before an exception."""
    sys.exit(run_main(job))
