"""What another process does with memory of this one; a module of its own, so that a spawned process can import it."""

from __future__ import annotations

from multiprocessing.connection import Connection

import torch

from rlalign.actors.shared_memory import SharedReader
from rlalign.modeling import checksum_tensors, hash_tensors


def read_in_another_process(pipe: Connection) -> None:
    """Checksum, SHA-256 and place of every version that comes through the pipe, until None does."""
    reader = SharedReader()
    while (shared := pipe.recv()) is not None:
        weights = reader.read(shared, torch.device("cuda"))
        pipe.send((checksum_tensors(weights), hash_tensors(weights), next(iter(weights.values())).device.type))
