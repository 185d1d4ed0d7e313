"""Tokens that fell out of the support when it was computed again: which are rounding's, and what they must not hide."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.numbers_scorer import BASE, LENGTHS, Numbers, reported, sequences
from support.softmax_scorer import Softmax, dump

from rlalign.config import SamplingParams
from rlalign.verifier.attribute import attribute
from rlalign.verifier.attribution import Attribution
from rlalign.verifier.dumps.record import DumpSequence
from rlalign.verifier.score import OPERATORS, ScoreSettings, effective_sampling


class Filtered(Numbers):
    """Its top-p leaves out two tokens of sequence 1, unless it is above ``needs``."""

    def __init__(self, needs: float) -> None:
        super().__init__()
        self.needs = needs

    def _one(self, sequence: DumpSequence, settings: ScoreSettings) -> np.ndarray:
        found = super()._one(sequence, replace(settings, slack=0.0))
        if sequence.id == "1" and effective_sampling(sequence, settings).top_p < self.needs:
            found[[4, 9]] = -np.inf
        return found


def filtered(needs: float) -> Attribution:
    dump = reported(sequences(), Filtered(0.0)(sequences(), BASE))
    noise = np.random.default_rng(0)
    dump = reported(dump, [s.logprobs + noise.normal(0, 5e-5, len(s.logprobs)) for s in dump])
    return attribute(dump, Filtered(needs))


def test_tokens_at_the_edge_of_the_support_are_named_and_hide_nothing():
    outcome = filtered(0.90001)
    assert outcome.steps == ()
    assert [(f.name, f.tokens, f.where) for f in outcome.broken] == [("edge_of_support", 2, ((1, 4), (1, 9)))]
    assert outcome.base.tokens == sum(LENGTHS) - 2
    assert outcome.base.max_abs < 1e-3
    assert outcome.explained
    assert outcome.findings == ()
    assert not outcome.equal


def test_tokens_outside_the_support_by_more_are_not_rounding():
    outcome = filtered(0.95)
    assert outcome.broken == ()
    assert [(f.name, f.where) for f in outcome.findings] == [("outside_support", ((1, 4), (1, 9)))]
    assert not outcome.explained
    assert "more than rounding: unexplained" in outcome.verdict


def test_slack_loosens_every_mass_and_nothing_else():
    params = effective_sampling(sequences()[0], ScoreSettings(slack=0.1))
    assert (params.temperature, params.top_k) == (0.7, 20)
    assert params.top_p == pytest.approx(0.9087, abs=1e-4)
    assert params.min_p == pytest.approx(0.0905, abs=1e-4)
    for slack in np.linspace(0.01, 1.0, 50).tolist():
        assert effective_sampling(sequences(SamplingParams())[0], ScoreSettings(slack=slack)) == SamplingParams()


class Edge(Numbers):
    """Processed, the fourth token of each second sequence is just outside of the support."""

    def _one(self, sequence: DumpSequence, settings: ScoreSettings) -> np.ndarray:
        found = super()._one(sequence, settings)
        if effective_sampling(sequence, settings).truncated and int(sequence.id) % 2 and not settings.slack:
            found[3] = -np.inf
        return found


def test_a_token_at_the_edge_does_not_keep_a_cause_from_its_sequence():
    found = [replace(s, processed=False) for s in sequences(SamplingParams(temperature=0.9, top_p=0.9))]
    truth = Numbers()(found, replace(BASE, processed=True))
    result = attribute(reported(found, truth), Edge(), decode=False)
    [step] = result.steps
    assert (step.cause.name, step.sequences, result.rest.mismatches) == ("processed", None, 0)


class Stale(Numbers):
    """Weights that move log-probs little, but under the latest ones two tokens of sequence 1 lie far outside."""

    def _one(self, sequence: DumpSequence, settings: ScoreSettings) -> np.ndarray:
        found = super()._one(sequence, replace(settings, weights=0))
        if settings.weights == 0:
            found += np.float32(0.01)
            if sequence.id == "1":
                found[[4, 9]] = -np.inf
        return found


def test_a_few_tokens_outside_do_not_hide_what_removes_them():
    rng = np.random.default_rng(0)
    true = Stale()(sequences(), replace(BASE, weights=1))
    dump = reported(sequences(), [values + rng.normal(0, 5e-5, len(values)) for values in true])
    outcome = attribute(dump, Stale(), num_previous=1)
    assert [step.cause.name for step in outcome.steps] == ["stale_weights[1]"]
    assert outcome.explained


class Narrow(Softmax):
    """Top-p keeps one more for a token of sequence 1 where filters are loosened: ``wide`` is its log-prob."""

    def __init__(self, place: int, wide: np.float32) -> None:
        super().__init__()
        self.place, self.wide = place, wide

    def _one(self, sequence: DumpSequence, settings: ScoreSettings) -> np.ndarray:
        found = super()._one(sequence, settings)
        if sequence.id == "r1" and settings.slack > 0:
            found[self.place] = self.wide
        return found


@pytest.mark.parametrize(("at_the_edge", "name"), [(True, "edge_of_support"), (False, "isolated")])
def test_another_member_of_the_support_is_no_other_distribution(at_the_edge, name):
    """It has 1% of the mass on one side, and nothing on the other: all that is left of the token's own moves."""
    params = SamplingParams(top_p=0.8)
    made = [replace(s, sampling=params) for s in dump(Softmax(), params, ScoreSettings(native=OPERATORS))]
    wide = Softmax()([replace(made[1], sampling=SamplingParams(top_p=0.83))], BASE)[0]
    place = int(np.flatnonzero(wide < made[1].logprobs - 1e-3)[0])
    values = np.where(np.arange(len(wide)) == place, wide, made[1].logprobs)
    scorer = Narrow(place, wide[place]) if at_the_edge else Softmax()
    outcome = attribute([made[0], replace(made[1], logprobs=values), *made[2:]], scorer, decode=False)
    assert [(f.name, f.where) for f in (*outcome.broken, *outcome.findings)] == [(name, ((1, place),))]
    assert outcome.explained == at_the_edge
