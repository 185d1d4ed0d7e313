"""Tables of README.md and docs/ from the JSON under benchmarks/results.

python scripts/readme_tables.py [--check]
"""

import sys

from rlalign.cli.readme_tables import main

if __name__ == "__main__":
    sys.exit(main())
