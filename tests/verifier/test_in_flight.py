"""Weights that changed while responses were under way, at another token of each."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from support.softmax_scorer import LENGTH, Softmax, dump

from rlalign.verifier.attribute import attribute
from rlalign.verifier.attribution import Attribution
from rlalign.verifier.score import ScoreSettings

CUTS = (5, 0, 12, LENGTH, 17, 9)


def updated(cuts: tuple[int, ...], newer: int = 0) -> Attribution:
    made = []
    for cut, sequence in zip(cuts, dump(Softmax()), strict=True):
        old, new = (Softmax()([sequence], ScoreSettings(weights=n))[0] for n in (1, newer))
        made.append(replace(sequence, logprobs=np.concatenate([old[:cut], new[cut:]])))
    return attribute(made, Softmax(), decode=False, num_previous=1)


def test_each_response_is_cut_where_its_weights_changed():
    outcome = updated(CUTS)
    assert [step.cause.name for step in outcome.steps] == ["stale_weights[1].in_flight"]
    assert outcome.rest.mismatches == 0


def test_whole_responses_of_either_version_are_stale_weights():
    outcome = updated((LENGTH, 0, 0, LENGTH, 0, 0))
    assert [(step.cause.name, step.sequences) for step in outcome.steps] == [("stale_weights[1]", (0, 3))]
    assert outcome.rest.mismatches == 0
    whole = updated((LENGTH,) * 6)
    assert [(step.cause.name, step.sequences) for step in whole.steps] == [("stale_weights[1]", None)]


def test_a_version_that_is_unknown_is_not_explained_by_half():
    outcome = updated(CUTS, newer=2)
    assert not outcome.explained
