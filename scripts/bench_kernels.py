"""GPU kernels against the libraries' own: milliseconds, TFLOP/s or TB/s, as a table, a plot and JSON.

python scripts/bench_kernels.py attention [--rounds 7] [--output FILE]
"""

import sys

from rlalign.cli.bench_kernels import main

if __name__ == "__main__":
    sys.exit(main())
