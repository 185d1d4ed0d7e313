"""The names that a user may have meant by one that isn't there."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_CUTOFF = 0.75


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """``; did you mean PREFIXa.b?``, or nothing where no name of ``known`` is near.

    Dots step into objects. Near is a name with the same last part, in whatever object it is; else the closest one; else
    the one with the closest last part.

    Example:
        >>> did_you_mean("rope_theta", ["hidden_size", "rope_parameters.rope_theta"], "config.")
        '; did you mean config.rope_parameters.rope_theta?'
    """
    known = sorted(known)
    same = [one for one in known if _last(one) == _last(name)]
    close = same or difflib.get_close_matches(name, known, n=1, cutoff=_CUTOFF) or _close_last(name, known)
    return f"; did you mean {' or '.join(prefix + one for one in close)}?" if close else ""


def _close_last(name: str, known: Iterable[str]) -> list[str]:
    last = {_last(one): one for one in known}
    return [last[one] for one in difflib.get_close_matches(_last(name), last, n=1, cutoff=_CUTOFF)]


def _last(name: str) -> str:
    return name.rpartition(".")[2]
