from __future__ import annotations

import pytest

from rlalign.verifier.words import are, counted, shown_ulp


@pytest.mark.parametrize(("count", "text"), [(0, "0 tokens are"), (1, "1 token is"), (2000, "2,000 tokens are")])
def test_one_is_no_plural(count: int, text: str) -> None:
    assert f"{counted(count, 'token')} {are(count)}" == text


def test_an_ulp_count_beyond_a_million_is_none() -> None:
    assert [shown_ulp(count) for count in (1, 1_000_000, 1_000_001)] == ["1", "1,000,000", "> 1e6"]
