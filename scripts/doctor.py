"""Do the operators' bits hold on this machine? What it is, plan fingerprints, schedules, one line per operator.

python scripts/doctor.py [--backend reference|native|triton|auto] [--model DIR] [--quick] [--json]
"""

import sys

from rlalign.cli.doctor import main

if __name__ == "__main__":
    sys.exit(main())
