"""Log-probs that were rounded where they were stored: the grid is seen, scoring is put on it, and nothing is left."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.softmax_scorer import Softmax, dump

from rlalign.config import SamplingParams
from rlalign.verifier.attribute import attribute
from rlalign.verifier.data_causes import stored_grid
from rlalign.verifier.score import OPERATORS, ScoreSettings
from rlalign.verifier.scores import Scores, on_grid

GRIDS = ("bfloat16", "float16", "2 decimals", "4 decimals", "6 decimals")
SETTINGS = {"plain": ScoreSettings(), "another order": ScoreSettings(native=OPERATORS)}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_storage_is_a_cause_and_nothing_is_left(grid, settings):
    made = [replace(s, logprobs=on_grid(s.logprobs, grid)) for s in dump(Softmax(1e-8), settings=SETTINGS[settings])]
    outcome = attribute(made, Softmax(1e-8), decode=False)
    assert outcome.steps[0].cause.name == f"stored[{grid}]"
    assert outcome.explained and outcome.findings == ()


def test_storage_is_named_beside_another_cause():
    old = dump(Softmax(), SamplingParams(temperature=0.7), ScoreSettings(weights=1))
    made = [replace(s, logprobs=on_grid(s.logprobs, "bfloat16")) for s in old]
    outcome = attribute(made, Softmax(), decode=False, num_previous=1)
    assert {step.cause.name for step in outcome.steps} == {"stale_weights[1]", "temperature=0.7", "stored[bfloat16]"}
    assert outcome.rest.mismatches == 0


def test_where_rounding_is_coarser_than_the_grid_it_is_said_beside_what_is_unexplained():
    made = [replace(s, logprobs=on_grid(s.logprobs * np.float32(1.001), "4 decimals")) for s in dump(Softmax())]
    outcome = attribute(made, Softmax(), decode=False)
    assert not outcome.explained
    assert "every log-prob of the dump fits into 4 decimals" in outcome.verdict


def test_a_grid_takes_many_values_that_would_not_lie_on_it_by_chance():
    def grid(values: np.ndarray) -> str | None:
        [one, *_] = dump(Softmax())
        size = np.zeros(len(values), np.int64)
        return stored_grid(Scores([replace(one, token_ids=size, logprobs=values.astype(np.float32))], Softmax()))

    wide = -np.random.default_rng(0).exponential(size=200)
    assert grid(wide) is None
    assert grid(np.round(wide, 6)) == "6 decimals"
    assert grid(np.round(wide[:30], 3)) is None  # too few
    assert grid(np.zeros(200)) is None
    # float32 numbers beyond 16 are further apart than six decimals anyway
    assert grid(-16 - np.arange(200) * 2.0**-19 * 3) is None


def test_grids_round_as_their_dtypes_do():
    values = np.array([-0.1, -1.00390625, -3.3, -1e-9, -100.123, 0.0, -np.inf, np.nan], np.float32)
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        np.testing.assert_array_equal(on_grid(values, name), torch.from_numpy(values).to(dtype).float().numpy())
    np.testing.assert_array_equal(on_grid(values, "2 decimals")[:3], np.float32([-0.1, -1.0, -3.3]))
