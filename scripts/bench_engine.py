"""Invariant against native: tokens per second of rollout and of training, as a table and as JSON.

python scripts/bench_engine.py [--model DIR] [--rounds 7] [--output FILE]
"""

import sys

from rlalign.cli.bench_engine import main

if __name__ == "__main__":
    sys.exit(main())
