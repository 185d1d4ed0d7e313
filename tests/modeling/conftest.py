from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.models import FAMILIES

from rlalign.modeling import register_attention


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def registered() -> Iterator[None]:
    """attn_implementation="rlalign", its backend by device; so it is left, whatever the test registered."""
    register_attention()
    yield
    register_attention()
