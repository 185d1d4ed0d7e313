"""Rollout: continuous batching over a paged KV cache, exact under every schedule.

``Engine`` is loaded when it is first asked for, so that the scheduler can be used and tested without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlalign.engine.engine import Engine

__all__ = ["Engine"]


def __getattr__(name: str) -> Any:
    if name == "Engine":
        from rlalign.engine.engine import Engine

        return Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
