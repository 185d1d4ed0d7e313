"""One run: its folder, its numbers, what the terminal shows of it, and how it stops and goes on.

Knows nothing of actors, engines or trainers; whatever saves a checkpoint is passed in.
"""

from rlalign.run.folder import RunFolder
from rlalign.run.order import prompts_of_step
from rlalign.run.resume import check_estimator, resumed_config
from rlalign.run.session import Run

__all__ = ["Run", "RunFolder", "check_estimator", "prompts_of_step", "resumed_config"]
