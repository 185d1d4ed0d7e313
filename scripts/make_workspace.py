"""Save a view of a wandb project: ``python scripts/make_workspace.py --entity NAME --project NAME``."""

import sys

from rlalign.cli.workspace import main

if __name__ == "__main__":
    sys.exit(main())
