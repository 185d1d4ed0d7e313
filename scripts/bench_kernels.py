"""GPU kernels against the libraries' own: milliseconds, TFLOP/s or TB/s, as a table, a plot and JSON.

python scripts/bench_kernels.py attention linear logprob norm [--rounds 7] [--only TEXT] [--output FOLDER]
"""

import sys

from rlalign.cli.bench_kernels import main

if __name__ == "__main__":
    sys.exit(main())
