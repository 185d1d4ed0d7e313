"""A reward for runs of few steps: it tells the samples of a model apart that can do nothing yet."""

from __future__ import annotations


def digit_sum(*, solution_str: str, **_: object) -> float:
    """The digits of the answer, summed, in hundredths."""
    return sum(int(character) for character in solution_str if character.isdigit()) / 100
