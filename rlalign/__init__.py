"""Reinforcement learning of language models in which rollout and trainer agree bit for bit."""

__version__ = "0.1.0"
