"""Seconds and memory of ``rlalign-verify compare`` on two generated dumps of many tokens, by file format.

python scripts/bench_compare.py [--tokens 10000000] [--dir DIR] [--output FILE]
"""

import sys

from rlalign.cli.bench_compare import main

if __name__ == "__main__":
    sys.exit(main())
