"""The training side: packing, one forward and backward per micro-batch, float32 masters, checkpoints.

Knows nothing of engines, actors or networks: token ids and numbers in, log-probs and new weights out.
"""

from rlalign.trainer.critic import Critic
from rlalign.trainer.optimizer import MasterAdamW
from rlalign.trainer.packing import PackedBatch, TokenPair, pack, pack_samples
from rlalign.trainer.padding import Unpadded, unpad
from rlalign.trainer.sft import SftTrainer
from rlalign.trainer.support import SupportStore
from rlalign.trainer.trainer import AccumulateResult, Trainer

__all__ = [
    "AccumulateResult",
    "Critic",
    "MasterAdamW",
    "PackedBatch",
    "SftTrainer",
    "SupportStore",
    "TokenPair",
    "Trainer",
    "Unpadded",
    "pack",
    "pack_samples",
    "unpad",
]
