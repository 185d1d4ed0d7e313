"""A picture of how far rollout and trainer are apart, step by step, of one or more runs.

python scripts/plot_gap.py RUN_DIR [RUN_DIR ...] --output gap.png
"""

import sys

from rlalign.cli.plot_gap import main

if __name__ == "__main__":
    sys.exit(main())
