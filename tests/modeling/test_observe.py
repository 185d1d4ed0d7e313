"""Which axis of an output the rows are on, and what is compared of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.models import FAMILIES, MIXTURES, tiny_model

from rlalign.modeling import Policy, align
from rlalign.modeling.context import PackedContext
from rlalign.modeling.feeds import Forward
from rlalign.modeling.observe import Layout, layouts, observed_hidden, per_token


@pytest.fixture(params=[*FAMILIES, *MIXTURES, "gemma3"])
def policy(request: pytest.FixtureRequest) -> Policy:
    return Policy(align(tiny_model(request.param), backend="native"))


@pytest.mark.parametrize("num_rows", [1, 2, 4])
def test_every_output_of_a_forward_has_a_row_per_token(policy: Policy, num_rows: int) -> None:
    """Also where heads (4, and 2 for keys) are as many as rows."""
    found, seen = layouts(policy), []

    def observe(key, outputs):
        rows = per_token(outputs, found[key], num_rows)
        assert rows is not None and rows.shape == (num_rows, found[key].features), key
        seen.append(key)

    context = PackedContext(torch.tensor([0, num_rows], dtype=torch.int32), num_rows)
    forward = Forward(torch.arange(num_rows), torch.arange(num_rows), context, np.arange(num_rows))
    observed_hidden(policy, forward, observe)
    assert seen == list(found)


def test_rows_are_taken_from_their_axis() -> None:
    heads_first, rows_first = torch.randn(1, 4, 4, 3), torch.randn(1, 4, 5)
    rows = per_token([heads_first, rows_first], Layout((2, 1), 4 * 3 + 5), 4)
    assert rows is not None
    assert torch.equal(rows[1], torch.cat([heads_first[0, :, 1].flatten(), rows_first[0, 1]]))
    assert per_token([heads_first], Layout((2, 1), 17), 4) is None
    assert per_token([rows_first], Layout((1,), 5), 3) is None
