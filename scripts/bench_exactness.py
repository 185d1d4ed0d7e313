"""The contract's axes, measured with exact arithmetic and without, as a table and as JSON.

python scripts/bench_exactness.py [--prompts 24] [--output FILE]
"""

import sys

from rlalign.cli.bench_exactness import main

if __name__ == "__main__":
    sys.exit(main())
