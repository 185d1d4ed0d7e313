from __future__ import annotations

from decimal import Decimal

import pytest

from rlalign.tasks.numbers import final_number, last_boxed, parse_number


@pytest.mark.parametrize(("text", "number"), [
    ("72", "72"), ("72.", "72"), ("-5", "-5"), ("\u22125", "-5"), ("-$5", "-5"), ("$-5", "-5"),
    ("$1,234.50.", "1234.50"),
    ("50%", "50"), (r"50\%", "50"), (r"\$1{,}234", "1234"), (r"72\text{ dollars}", "72"), (".5", "0.5"),
    ("1,234,567", "1234567"), ("18 eggs", "18"), ("(-3)", "-3"), ("x = 4", "4"), ("70000.00", "70000"),
])  # fmt: skip
def test_one_number_in_all_its_dress(text: str, number: str) -> None:
    assert parse_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "none", "3 or 4", r"\frac{1}{2}", "1,2345", "5-3", "1 2 3"])
def test_anything_but_one_number_is_none(text: str) -> None:
    assert parse_number(text) is None


@pytest.mark.parametrize(("text", "number"), [
    ("So she has 3.\n#### 72", 72),
    ("#### 5\nno wait\n#### 1,080", 1080),
    ("####\n72 apples", 72),
    (r"thus \boxed{\$72} for 2 days", 72),
    (r"\boxed{1} then \boxed{a{b}{-7}}", -7),
    (r"\boxed{9} #### 8", 8),
    ("It takes 3 days, 14.5 in all.", Decimal("14.5")),
    ("10 - 3", 3),
    ("5-3=2", 2),
])  # fmt: skip
def test_final_number(text: str, number: int) -> None:
    assert final_number(text) == number


@pytest.mark.parametrize("text", ["", "no idea", "#### 1 2 3 72", "72 #### unknown", r"72 or \boxed{\frac{72}{1}}"])
def test_a_marker_without_one_number_earns_nothing_from_elsewhere(text: str) -> None:
    assert final_number(text) is None


def test_boxed_braces_are_matched() -> None:
    assert last_boxed(r"\boxed{\frac{1}{2}} end") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{unclosed") is None
