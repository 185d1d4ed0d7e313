"""Rewards for runs that show the system rather than teach a model: ``task.reward=recipes/rewards.py:NAME``."""

from __future__ import annotations


def even_digits(*, solution_str: str, **_: object) -> float:
    """The share of even ones among the answer's digits, 0 without any.

    It tells samples of random weights apart, which no exact match would, and can be learned.
    """
    digits = [character for character in solution_str if character in "0123456789"]
    return sum(character in "02468" for character in digits) / max(1, len(digits))
