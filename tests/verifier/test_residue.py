"""What is said of a difference that no cause removes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support import softmax_scorer
from support.softmax_scorer import Softmax, dump, log_softmax

from rlalign.config import SamplingParams
from rlalign.verifier.attribute import attribute
from rlalign.verifier.dumps.record import MISSING
from rlalign.verifier.residue import describe_rest
from rlalign.verifier.score import OPERATORS, ScoreSettings

NATIVE = ScoreSettings(native=OPERATORS)


@pytest.mark.parametrize("penalty", [0.5, 1.5])
def test_a_penalty_is_recognised(penalty):
    """Tokens that were there lose ``penalty`` of their logit, so that all others gain."""
    scorer = Softmax()
    made = []
    for sequence in dump(scorer):
        # half of the prompt is said again
        tokens = np.where(np.arange(24) % 3 == 0, sequence.token_ids[0], sequence.token_ids)
        one = replace(sequence, token_ids=tokens)
        logits = scorer.logits(one, ScoreSettings())
        for row in range(len(tokens)):
            logits[row, list({*one.prompt_token_ids.tolist(), *tokens[:row].tolist()})] -= penalty
        made.append(replace(one, logprobs=log_softmax(logits)[np.arange(24), tokens].astype(np.float32)))
    outcome = attribute(made, scorer, decode=False)
    assert not outcome.explained
    assert [finding.name for finding in outcome.findings] == ["penalty"]


def test_stale_weights_are_no_penalty():
    outcome = attribute(dump(Softmax(), settings=ScoreSettings(weights=1)), Softmax(), decode=False)
    assert not outcome.explained
    assert "penalty" not in [finding.name for finding in outcome.findings]


@pytest.mark.parametrize("value", [np.nan, -np.inf, MISSING, np.float32(0.5)])
def test_what_is_no_log_prob_is_not_explained_by_rounding(value):
    made = dump(Softmax(), settings=NATIVE)
    values = made[2].logprobs.copy()
    values[5] = value
    outcome = attribute([*made[:2], replace(made[2], logprobs=values), *made[3:]], Softmax(), decode=False)
    assert outcome.base.mismatches > 0
    assert not outcome.explained
    assert [finding.where for finding in outcome.broken] == [((2, 5),)]


@pytest.mark.parametrize("native", [(), OPERATORS], ids=["exact", "rounding"])
@pytest.mark.parametrize(("change", "name", "share"), [
    (lambda values: np.where(np.arange(24) >= 18, 0, values), "zero", 6 / 24),
    (lambda values: np.zeros(24), "zero", 1),
    (lambda values: np.where(np.arange(24) == 0, values - 1, values), "first_token", 1 / 24),
    (lambda values: np.where(np.arange(24) == 23, values - 1, values), "last_token", 1 / 24),
    (lambda values: np.maximum(values, np.float32(-3.5)), "clamped", None),
])  # fmt: skip
def test_a_pattern_over_all_sequences_is_named_and_nothing_else(native, change, name, share):
    made = dump(Softmax(), settings=ScoreSettings(native=native))
    changed = [replace(s, logprobs=change(s.logprobs).astype(np.float32)) for s in made]
    outcome = attribute(changed, Softmax(), decode=False)
    assert not outcome.explained
    assert [finding.name for finding in outcome.findings] == [name]
    if share is not None:
        assert outcome.findings[0].tokens == pytest.approx(share * 24 * len(made), abs=3)


def test_a_confident_models_zeros_are_its_own():
    made = dump(Softmax())
    peaked = [replace(s, logprobs=np.where(s.logprobs > -0.5, 0, s.logprobs).astype(np.float32)) for s in made]
    assert any((s.logprobs == 0).any() for s in peaked)

    class Sure(Softmax):
        def __call__(self, sequences, settings):
            return [np.where(v > -0.5, np.float32(-1e-6), v) for v in super().__call__(sequences, settings)]

    assert "zero" not in [finding.name for finding in attribute(peaked, Sure(), decode=False).findings]

    values = peaked[3].logprobs.copy()
    values[place := int(np.argmin(values))] = 0
    outcome = attribute([*peaked[:3], replace(peaked[3], logprobs=values), *peaked[4:]], Sure(), decode=False)
    assert [finding.where for finding in outcome.findings if finding.name == "zero"] == [((3, place),)]


@pytest.mark.parametrize(("place", "words"), [(0, "(always the first token)"), (23, "(always the last token)")])
def test_zeros_at_one_end_of_all_responses_are_said_to_be_there(place, words):
    changed = [
        replace(s, logprobs=np.where(np.arange(24) == place, np.float32(0), s.logprobs)) for s in dump(Softmax())
    ]
    [finding] = attribute(changed, Softmax(), decode=False).findings
    assert finding.name == "zero"
    assert words in finding.what


def test_a_temperature_near_0_has_zeros_that_are_its_own():
    made = dump(Softmax(), SamplingParams(temperature=0.01))
    assert sum((s.logprobs == 0).sum() for s in made) > 24
    outcome = attribute(made, Softmax(), decode=False)
    assert "zero" not in [finding.name for finding in outcome.findings]


def test_tokens_outside_the_support_may_be_all_that_differ():
    made = dump(Softmax())
    scored = np.concatenate([s.logprobs for s in made])
    scored[5] = -np.inf
    size, place = np.where(np.isneginf(scored), 20.0, 0.0), np.repeat(np.arange(len(made)), 24)
    counts = np.ones(len(scored), np.bool_)
    findings = describe_rest(made, size, scored, place, counts, np.isneginf(scored))
    assert [(finding.name, finding.where) for finding in findings] == [("outside_support", ((0, 5),))]


@pytest.mark.parametrize(("wrong_from", "name"), [(9, "from_position"), (15, "isolated")])
def test_a_fault_that_rounding_half_hides_is_seen_in_what_follows(wrong_from, name):
    """One token is off by far more than rounding; those behind it by a few times rounding, or by no more than it."""
    made = dump(Softmax(0.03), settings=NATIVE)
    values = made[2].logprobs.copy()
    values[15] += 1.5
    if wrong_from < 15:
        values[wrong_from:] += np.random.default_rng(0).normal(0, 0.3, len(values) - wrong_from).astype(np.float32)
    outcome = attribute([*made[:2], replace(made[2], logprobs=values), *made[3:]], Softmax(0.03), decode=False)
    [finding] = outcome.findings
    assert (finding.name, finding.where[0][0]) == (name, 2)
    assert abs(finding.where[0][1] - wrong_from) <= 2
    assert not outcome.explained


def test_one_token_beyond_rounding_is_not_explained_by_the_mean():
    made = dump(Softmax(), SamplingParams(), NATIVE)
    values = made[3].logprobs.copy()
    values[7] += np.float32(1e-4)
    outcome = attribute([*made[:3], replace(made[3], logprobs=values), *made[4:]], Softmax(), base=NATIVE, decode=False)
    assert not outcome.explained  # bits are equal elsewhere
    noise = np.random.default_rng(0).normal(0, 1e-6, (len(made), 24)).astype(np.float32)
    near = [replace(s, logprobs=s.logprobs + more) for s, more in zip(made, noise, strict=True)]
    near[3] = replace(near[3], logprobs=values)
    outcome = attribute(near, Softmax(), decode=False)
    assert not outcome.explained
    assert "rounding explains all but 1 token: unexplained" in outcome.verdict
    assert [(f.name, f.where) for f in outcome.findings] == [("isolated", ((3, 7),))]


def test_a_mean_on_one_side_is_no_rounding_although_it_hides_in_it():
    """Renormalised by 3% of the mass in every row, which is no more than rounding moves a token."""
    scorer = Softmax(0.05)
    made = [replace(s, logprobs=s.logprobs + np.float32(0.03)) for s in dump(scorer, settings=NATIVE)]
    outcome = attribute(made, scorer, decode=False)
    assert outcome.rest.mean_abs < 2 * outcome.rounding.other_order
    assert not outcome.explained
    assert "not rounding, which has no side: the dump's are higher by 0.0" in outcome.verdict
    assert [finding.name for finding in outcome.findings] == ["one_sided"]
    assert attribute(dump(scorer, settings=NATIVE), scorer, decode=False).explained


def test_tokens_that_another_model_sampled_are_likelier_under_it(monkeypatch):
    """Their mean is on one side, and says nothing of filters or temperatures."""
    monkeypatch.setitem(softmax_scorer._MOVES, "config", 1.0)
    other = ScoreSettings(config=(("rope_theta", 77777.0),))
    outcome = attribute(dump(Softmax(), settings=other), Softmax(), decode=False)
    assert outcome.metrics["align/k1"] > 0.5 * outcome.base.mean_abs
    assert not outcome.explained
    assert "one_sided" not in [finding.name for finding in outcome.findings]


def test_far_tokens_among_others_that_rounding_does_not_explain_are_no_single_ones():
    """Weights that are older: a few tokens are far off, as the ends of what all tokens are."""
    made = dump(Softmax(), settings=ScoreSettings(weights=1))
    for sequence in made:
        sequence.logprobs[::12] -= 3
    outcome = attribute(made, Softmax(), decode=False)
    assert outcome.rounding.beyond > 0
    assert not {finding.name for finding in outcome.findings} & {"isolated", "from_position"}


def test_sequences_of_another_model_are_named_where_the_others_have_rounding():
    old, new = dump(Softmax(), settings=ScoreSettings(weights=2)), dump(Softmax(), settings=NATIVE)
    outcome = attribute([*new[:2], *old[2:4], *new[4:]], Softmax(), decode=False)
    assert not outcome.explained  # one of 48 tokens agrees by chance
    assert [(f.name, f.tokens, f.where[0]) for f in outcome.findings] == [("sequence", 47, (2, 0))]


def test_without_filters_nothing_is_at_the_edge_of_a_support():
    """A token that is just as far off as tokens at an edge may be."""
    made = dump(Softmax(), settings=NATIVE)
    gaps = np.concatenate([a.logprobs - b for a, b in zip(made, Softmax()(made, ScoreSettings()), strict=True)])
    for size in np.linspace(0.9, 1.1, 21):
        values = made[0].logprobs.copy()
        values[3] += np.float32(8 * np.abs(gaps).mean() * size)
        outcome = attribute([replace(made[0], logprobs=values), *made[1:]], Softmax(), decode=False)
        assert outcome.broken == ()


@pytest.mark.parametrize("settings", [ScoreSettings(), NATIVE], ids=["exact", "rounding"])
def test_beginnings_that_older_weights_sampled_are_named_without_them(settings):
    """At another place in every sequence, as an update meets them in flight; nobody gives the older weights."""
    older = dump(Softmax(), settings=replace(settings, weights=1))
    made = []
    for index, (one, before) in enumerate(zip(dump(Softmax(), settings=settings), older, strict=True)):
        values = one.logprobs.copy()
        values[: 3 + 2 * index] = before.logprobs[: 3 + 2 * index]
        made.append(replace(one, logprobs=values))
    [finding] = attribute(made, Softmax(), decode=False).findings
    assert finding.name == "until_position"
    assert {place for place, _ in finding.where} == set(range(len(made)))
    assert finding.tokens >= 0.9 * sum(3 + 2 * index for index in range(len(made)))


def test_a_bias_on_a_few_tokens_moves_all_others_to_the_other_side():
    scorer, made = Softmax(), []
    for index, sequence in enumerate(dump(scorer)):
        logits = scorer.logits(sequence, ScoreSettings())
        logits[:, 0] -= 4.0
        tokens = np.where(np.arange(24) == 8 + index, 0, np.maximum(sequence.token_ids, 1))
        one = replace(sequence, token_ids=tokens)
        made.append(replace(one, logprobs=log_softmax(logits)[np.arange(24), tokens].astype(np.float32)))
    told = [finding.what for finding in attribute(made, scorer, decode=False).findings]
    assert told == [
        "the dump's log-probs are nearly all higher than scoring gives, and lower on average: as with a bias on a few "
        "tokens' logits"
    ]
