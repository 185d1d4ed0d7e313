"""Sampling parameters that a dump does not name are fitted; a fit that is only the nearest one is no cause."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from support import softmax_scorer
from support.numbers_scorer import Numbers, planted
from support.softmax_scorer import Softmax, dump, filtered, log_softmax

from rlalign.config import SamplingParams
from rlalign.verifier import causes as catalogue
from rlalign.verifier.attribute import attribute
from rlalign.verifier.attribution import Attribution
from rlalign.verifier.dumps.record import DumpSequence
from rlalign.verifier.score import OPERATORS, ScoreSettings

NATIVE = ScoreSettings(native=OPERATORS)


def run(made: Sequence[DumpSequence], **options: object) -> Attribution:
    return attribute(made, Softmax(), decode=False, **options)


def names(outcome: Attribution) -> list[str]:
    return [step.cause.name for step in outcome.steps]


@pytest.mark.parametrize(
    ("params", "name"),
    [
        (SamplingParams(temperature=0.7), "temperature=0.7"),
        (SamplingParams(temperature=1.15), "temperature=1.15"),
        (SamplingParams(top_k=50), "top_k=50"),
        (SamplingParams(top_k=7), "top_k=7"),
        (SamplingParams(top_p=0.95), "top_p=0.95"),
        (SamplingParams(top_p=0.73), "top_p=0.73"),
        (SamplingParams(min_p=0.1), "min_p=0.1"),
        (SamplingParams(temperature=0.7, top_p=0.9), "temperature=0.7,top_p=0.9"),
        (SamplingParams(temperature=0.85, top_k=20), "temperature=0.85,top_k=20"),
        (SamplingParams(temperature=0.8, min_p=0.05), "temperature=0.8,min_p=0.05"),
        (SamplingParams(temperature=1.3, min_p=0.1), "temperature=1.3,min_p=0.1"),
        (SamplingParams(temperature=0.6, min_p=0.02), "temperature=0.6,min_p=0.02"),
        (SamplingParams(temperature=0.6, top_k=20, top_p=0.95), "temperature=0.6,top_k=20,top_p=0.95"),
        (SamplingParams(top_k=10, top_p=0.8), "top_k=10,top_p=0.8"),
    ],
)
def test_untold_parameters_are_found(params, name):
    outcome = run(dump(Softmax(), params, NATIVE))
    assert names(outcome) == [name, "operators.native"]
    assert outcome.rest.mismatches == 0 and outcome.nearest is None and outcome.findings == ()


def test_sequences_that_are_said_to_be_greedy_are_fitted_too():
    made = dump(Softmax(), SamplingParams(temperature=0.6, top_k=20, top_p=0.9))
    greedy = [replace(s, sampling=SamplingParams(temperature=0)) for s in made]
    assert names(run(greedy)) == ["temperature=0.6,top_k=20,top_p=0.9"]


@pytest.mark.parametrize(
    ("params", "name"), [(SamplingParams(top_k=30), "top_k=30"), (SamplingParams(0.7, top_p=0.95), "top_p=0.95")]
)
def test_within_rounding_the_value_of_few_digits_is_taken(params, name):
    """And tokens that rounding puts outside of a support don't widen it."""
    scorer = Softmax(0.03)
    made = [replace(s, sampling=SamplingParams(params.temperature)) for s in dump(scorer, params, NATIVE)]
    outcome = attribute(made, scorer, decode=False)
    assert names(outcome)[0] == name
    assert outcome.explained


def test_a_filter_is_found_beside_a_temperature_that_is_named():
    made = [replace(s, sampling=SamplingParams(temperature=0.7)) for s in dump(Softmax(), SamplingParams(0.7, 8))]
    assert names(run(made)) == ["top_k=8"]


def test_a_filter_other_than_the_named_one_is_found():
    made = [replace(s, sampling=SamplingParams(top_p=0.6)) for s in dump(Softmax(), SamplingParams(top_p=0.9))]
    assert names(run(made)) == ["top_p=0.9"]


def test_a_temperature_is_fitted_again_to_what_stale_weights_leave():
    made = dump(Softmax(), SamplingParams(temperature=0.8), ScoreSettings(weights=1))
    outcome = run(made, num_previous=1)
    assert sorted(names(outcome)) == ["stale_weights[1]", "temperature=0.8"]
    assert outcome.rest.mismatches == 0


def test_a_filter_that_was_fitted_before_the_weights_were_known_is_replaced():
    outcome = run(dump(Softmax(), SamplingParams(top_k=20), ScoreSettings(weights=1)), num_previous=1)
    assert names(outcome) == ["stale_weights[1]", "top_k=20"]
    assert outcome.rest.mismatches == 0


def test_what_generation_config_says_is_one_cause():
    fields = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": 3, "do_sample": True}
    outcome = run(dump(Softmax(), SamplingParams(0.6, 20, 0.95)), generation=fields)
    assert names(outcome) == ["generation_config"]
    assert "temperature=0.6, top_k=20, top_p=0.95" in outcome.steps[0].cause.what
    assert outcome.rest.mismatches == 0
    assert names(run(dump(Softmax(), SamplingParams(top_k=9)), generation=fields)) == ["top_k=9"]


def ratio_kept(logits: np.ndarray) -> np.ndarray:
    """A transform that scoring doesn't know: logits pulled together, the more the less likely."""
    return np.sign(logits) * np.abs(logits) ** 0.8


def test_the_nearest_value_is_no_cause_where_much_is_left():
    scorer = Softmax()
    made = []
    for sequence in dump(scorer):
        log_p = log_softmax(ratio_kept(filtered(scorer.logits(sequence, NATIVE), SamplingParams())))
        values = log_p[np.arange(len(log_p)), sequence.token_ids].astype(np.float32)
        made.append(replace(sequence, logprobs=values))
    outcome = run(made)
    assert outcome.steps == () and not outcome.explained
    assert outcome.nearest is not None and outcome.nearest.cause.guessed
    assert "leaves too much to be the whole cause" in outcome.verdict


def test_a_guess_is_believed_although_some_tokens_are_left():
    made = dump(Softmax(), SamplingParams(temperature=0.7), NATIVE)
    values = made[2].logprobs.copy()
    values[10:] -= np.linspace(0.5, 1.5, len(values) - 10, dtype=np.float32)
    outcome = run([*made[:2], replace(made[2], logprobs=values), *made[3:]])
    assert names(outcome) == ["temperature=0.7"]
    assert not outcome.explained
    assert [(f.name, f.where[0]) for f in outcome.findings] == [("from_position", (2, 10))]
    assert "rounding explains all but 14 tokens" in outcome.verdict


def test_a_common_value_of_the_config_is_a_guess_and_another_checkpoints_is_none():
    changes = [("rope_theta", 500000.0, "a common value"), ("rms_norm_eps", 1e-3, "as previous model 1")]
    other_base = ScoreSettings(config=(("rope_theta", 500000.0),))
    outcome = run(mixed(other_base, 0.7), config_changes=changes)
    assert outcome.steps == ()
    assert outcome.nearest is not None and outcome.nearest.cause.name == "config.rope_theta=500000.0"
    assert names(run(dump(Softmax(), settings=other_base), config_changes=changes)) == ["config.rope_theta=500000.0"]


def mixed(settings: ScoreSettings, share: float) -> list[DumpSequence]:
    """Log-probs between those of ``settings`` and the plain ones: no way of scoring gives them."""
    other = dump(Softmax(), settings=settings)
    plain = Softmax()(other, ScoreSettings())
    return [
        replace(s, logprobs=np.float32(share) * s.logprobs + np.float32(1 - share) * values)
        for s, values in zip(other, plain, strict=True)
    ]


def test_a_cause_that_leaves_much_unexplained_is_only_the_nearest():
    padding = ScoreSettings(padding="left_seen")
    outcome = run(mixed(padding, 0.8))
    assert outcome.steps == () and not outcome.explained
    assert outcome.nearest is not None and outcome.nearest.cause.name == "padding.left"
    assert names(run(mixed(padding, 1.0))) == ["padding.left"]


@pytest.mark.parametrize(("share", "nearest"), [(0.7, "config.rope_theta=500000.0"), (0.3, None)])
def test_a_guess_that_leaves_most_is_not_even_near(share, nearest):
    changes = [("rope_theta", 500000.0, "a common value")]
    outcome = run(mixed(ScoreSettings(config=(("rope_theta", 500000.0),)), share), config_changes=changes)
    assert outcome.steps == ()
    assert (outcome.nearest and outcome.nearest.cause.name) == nearest


def test_filters_that_an_engine_leaves_out_by_default_are_put_back_by_their_flag():
    """As SGLang's: after temperature, but not renormalised. This engine did, and the request says over what."""
    params = SamplingParams(temperature=0.8, min_p=0.1)
    made = [replace(one, sampling=params, processed=True) for one in dump(Softmax(), params)]
    outcome = run(made, base=ScoreSettings(ignore=frozenset({"top_k", "top_p", "min_p"})))
    assert names(outcome) == ["processed"]
    assert outcome.rest.mismatches == 0
    assert "--processed" in outcome.steps[0].cause.remedy


def test_older_weights_are_kept_where_half_of_the_difference_is_theirs():
    stale = ScoreSettings(weights=1)
    assert names(run(mixed(stale, 0.8), num_previous=1)) == ["stale_weights[1]"]
    assert names(run(mixed(stale, 0.55), num_previous=1)) == []


def test_sequences_that_are_as_near_as_the_others_are_named():
    """Older weights that scoring doesn't have are wrong with all; log-probs of others' with two."""
    made = dump(Softmax(), settings=ScoreSettings(weights=1))
    swapped = [made[0], replace(made[1], logprobs=made[2].logprobs), replace(made[2], logprobs=made[1].logprobs)]
    outcome = run([*swapped, *made[3:]])
    assert [(step.cause.name, step.sequences) for step in outcome.steps] == [("swapped_sequences", (1, 2))]
    assert not outcome.explained


def test_values_that_complete_each_other_are_kept():
    outcome = run(dump(Softmax(), SamplingParams(1.2, top_k=20, min_p=0.05)))
    assert names(outcome) == ["top_k=20", "temperature=1.2,min_p=0.05"]
    assert outcome.rest.mismatches == 0 and outcome.nearest is None


def test_tokens_that_do_not_count_are_not_fitted_to(monkeypatch):
    monkeypatch.setattr(softmax_scorer, "COUNT", 30)
    made = dump(Softmax(), SamplingParams(temperature=0.8))
    hidden = [replace(s, mask=np.zeros(len(s.token_ids), np.bool_)) for s in made[:22]]
    assert names(run([*hidden, *made[22:]])) == ["temperature=0.8"]


@pytest.mark.parametrize(
    ("halves", "found"),
    [
        ([SamplingParams(), SamplingParams(temperature=0.6)], ["temperature=0.6"]),
        ([SamplingParams(), SamplingParams(top_p=0.8)], ["top_p=0.8"]),
        ([SamplingParams(temperature=0.6), SamplingParams(temperature=1.3)], ["temperature=0.6", "temperature=1.3"]),
    ],
)
def test_what_holds_of_half_of_the_sequences(halves, found):
    made = [dump(Softmax(), halves[i % 2])[i] for i in range(softmax_scorer.COUNT)]
    outcome = run(made)
    assert sorted(names(outcome)) == found
    assert outcome.rest.mismatches == 0
    for step in outcome.steps:
        mine = [f"temperature={one.temperature:g}" == step.cause.name or one.top_p < 1 for one in halves].index(True)
        assert step.sequences == tuple(range(mine, softmax_scorer.COUNT, 2))


def test_swapped_sequences_are_fitted_as_a_whole(monkeypatch):
    monkeypatch.setattr(softmax_scorer, "COUNT", 30)
    made = dump(Softmax(), SamplingParams(temperature=0.8))
    swapped = [replace(s, logprobs=made[(i + 15) % 30].logprobs) for i, s in enumerate(made)]
    assert sorted(names(run(swapped))) == ["swapped_sequences", "temperature=0.8"]


@pytest.mark.parametrize("params", [SamplingParams(temperature=0.6), SamplingParams(temperature=1.5, top_k=5)])
def test_a_swap_is_seen_through_what_sampling_does_to_all(params):
    made = dump(Softmax(), params)
    swapped = [replace(s, logprobs=made[i ^ 1].logprobs) for i, s in enumerate(made)]
    outcome = run(swapped)
    values = {"temperature": params.temperature} | ({"top_k": params.top_k} if params.top_k else {})
    assert sorted(names(outcome)) == ["swapped_sequences", ",".join(f"{name}={v:g}" for name, v in values.items())]
    assert outcome.rest.mismatches == 0


def test_log_probs_that_are_like_nobodys_are_not_swapped():
    made = dump(Softmax(), SamplingParams(temperature=0.3))
    noise = np.random.default_rng(0).exponential(2.0, size=(len(made), len(made[0].token_ids)))
    unlike = [replace(s, logprobs=-noise[i].astype(np.float32)) for i, s in enumerate(made)]
    assert names(run(unlike)) == []


@pytest.mark.parametrize(
    "fields", [{"temperature": 0.0}, {"top_k": -1}, {"top_p": 0}, {"temperature": "warm"}, {"min_p": None}], ids=str
)
def test_an_odd_generation_config_is_no_cause_and_no_error(fields):
    assert names(run(dump(Softmax(), SamplingParams(top_k=9)), generation=fields)) == ["top_k=9"]


@pytest.mark.parametrize("refused", ["weights", "temperature", "top_k"])
def test_what_the_scorer_refuses_is_not_fitted(refused):
    outcome = attribute(planted(), Numbers([refused]), num_previous=1, decode=False)
    assert outcome.equal
    rounded = planted(catalogue.numeric_causes("float32", decode=False)[0])
    assert names(attribute(rounded, Numbers([refused]), num_previous=1)) == ["logits.bfloat16"]
