"""Rollout engines and the trainer as Ray actors, and the controller that keeps their weights in step.

The only room that imports ray. Because a sample depends on weights, prompt and seed alone, a rollout actor that dies is
restarted and its requests run again with the same result.
"""

from rlalign.actors.controller import Controller, Rollout

__all__ = ["Controller", "Rollout"]
