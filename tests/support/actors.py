"""Actor processes that outlive a run: importing torch takes each of them seconds, and ``load`` makes them new."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayActorError

from rlalign.actors import cluster


class ActorPool:
    """Stands in for ``start_actor`` and ``stop_actor``: a stopped actor that is still alive is handed out again."""

    def __init__(self) -> None:
        self._idle: dict[type, list[Any]] = {}
        self._class_of: dict[Any, type] = {}

    def start(self, cls: type, config: Any, *args: Any, num_gpus: float = 0.0) -> Any:
        idle = self._idle.setdefault(cls, [])
        handle = idle.pop() if idle else cluster.start_actor(cls, config, *args, num_gpus=num_gpus)
        self._class_of[handle] = cls
        return handle

    def stop(self, handle: Any) -> None:
        try:
            ray.get(handle.__ray_ready__.remote())
        except RayActorError:
            return
        self._idle[self._class_of[handle]].append(handle)


def kill(handle: Any) -> None:
    """Returns when the actor is gone; ``ray.kill`` does before, and the next call may still be answered."""
    ray.kill(handle)
    with suppress(RayActorError):
        while True:
            ray.get(handle.__ray_ready__.remote())
