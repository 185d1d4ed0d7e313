"""The final number of a worked answer, as an exact decimal."""

from __future__ import annotations

import re
from decimal import Decimal

_MINUS = str.maketrans({"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-"})
# LaTeX that may surround a number without changing it
_LATEX = (("\\$", "$"), ("\\%", "%"), ("{,}", ","), ("\\!", ""), ("\\,", ""), ("\\;", ""), ("\\ ", " "))
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}")

# a sign only counts where it can't be a minus between two numbers; commas only where they group thousands
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)])-)?(?:[$€£]\s?)?(?P<inner>(?<=[$€£])-)?"
    r"(?P<digits>\d{1,3}(?:,\d{3})+(?![\d,]*\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
)
_MARKER = re.compile(r"####\s*([^\n]*)")


def parse_number(text: str) -> Decimal | None:
    """The number that ``text`` is, give or take currency, percent sign, thousands commas, unit and final period.

    None unless it holds exactly one number: several in an answer's place are a guess, and a fraction is not one number.

    Example:
        >>> parse_number("$1,234.50."), parse_number("3 or 4")
        (Decimal('1234.50'), None)
    """
    found = _numbers(text)
    return found[0] if len(found) == 1 else None


def final_number(text: str) -> Decimal | None:
    r"""The answer of a completion: after its last ``####``, else in its last ``\boxed{}``, else its last number.

    A marker without exactly one number gives None rather than a number from elsewhere.
    """
    if marked := _MARKER.findall(text):
        return parse_number(marked[-1])
    if (boxed := last_boxed(text)) is not None:
        return parse_number(boxed)
    found = _numbers(text)
    return found[-1] if found else None


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}``, braces matched; None without one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for at in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[begin + 1 : at]
    return None


def _numbers(text: str) -> list[Decimal]:
    text = text.translate(_MINUS)
    for latex, plain in _LATEX:
        text = text.replace(latex, plain)
    return [_decimal(match) for match in _NUMBER.finditer(_TEXT.sub(r" \1 ", text))]


def _decimal(match: re.Match[str]) -> Decimal:
    value = Decimal(match["digits"].replace(",", ""))
    return -value if match["sign"] or match["inner"] else value
