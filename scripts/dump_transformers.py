"""A dump by transformers alone: ``python scripts/dump_transformers.py --model DIR --prompts FILE --out OUT``."""

import sys

from rlalign.cli.dump_transformers import main

if __name__ == "__main__":
    sys.exit(main())
