"""The fastest schedules of this GPU for a model's shapes, proven to change no bit, as a table.

python scripts/tune.py --model DIR [--output FILE]; then RLALIGN_TUNED=FILE python recipes/grpo.py ...
"""

import sys

from rlalign.cli.tune import main

if __name__ == "__main__":
    sys.exit(main())
