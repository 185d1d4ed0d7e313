"""Do rollout and trainer agree on a checkpoint? The same command as ``rlalign-verify``.

python scripts/verify_logprobs.py run --model DIR --prompts FILE
"""

import sys

from rlalign.cli.verify import main

if __name__ == "__main__":
    sys.exit(main())
