"""Numbers in words, as people read them."""

from __future__ import annotations

_MOST_ULP = 1_000_000


def counted(count: int, noun: str) -> str:
    """``1 token``, ``2,000 tokens``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def are(count: int) -> str:
    """The verb of so many."""
    return "is" if count == 1 else "are"


def shown_ulp(ulp: int) -> str:
    """A distance in a table; the Δ beside it says more than a count beyond a million."""
    return f"{ulp:,}" if ulp <= _MOST_ULP else "> 1e6"
