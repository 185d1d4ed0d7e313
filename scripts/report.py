"""One HTML file of a run, or of two side by side: ``python scripts/report.py RUN_DIR [RUN_DIR2] --output FILE``."""

import sys

from rlalign.cli.report import main

if __name__ == "__main__":
    sys.exit(main())
