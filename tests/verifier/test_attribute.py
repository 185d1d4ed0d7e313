"""Every cause planted with a scorer made of numbers: it is named, alone and beside another, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from support.numbers_scorer import BASE, CONFIG, LENGTHS, Numbers, noise, planted, reported, run, sequences

from rlalign.config import SamplingParams
from rlalign.verifier import causes as catalogue
from rlalign.verifier.attribute import attribute
from rlalign.verifier.config_causes import config_causes, config_changes
from rlalign.verifier.dumps.record import MISSING, DumpSequence
from rlalign.verifier.score import OPERATORS, ScoreSettings

CAUSES = {
    cause.name: cause
    for cause in (
        *catalogue.sampling_causes(), *catalogue.weight_causes(2), *config_causes(CONFIG),
        *catalogue.token_causes(), *catalogue.position_causes(), *catalogue.numeric_causes("float32", decode=True),
    )
    if cause.name != "processed"
}  # fmt: skip


def test_a_dump_that_agrees_has_no_cause():
    dump = planted()
    found = run(dump)
    assert found.equal
    assert (found.effects, found.steps, found.rest.mismatches) == ((), (), 0)
    assert found.verdict == "bit for bit equal on 69 tokens: nothing to attribute"


@pytest.mark.parametrize("name", CAUSES)
def test_each_cause_is_named_alone(name):
    found = run(planted(CAUSES[name]))
    assert [step.cause.name for step in found.steps] == [name]
    assert (found.rest.mismatches, found.steps[0].sequences) == (0, None)
    assert found.explained
    assert found.verdict.endswith("nothing is left")
    [effect] = [effect for effect in found.effects if effect.cause.name == name]
    assert effect.removes == 1.0
    assert effect.moves == effect.before.mean_abs > 0
    assert found.steps[0].cause.remedy


@pytest.mark.parametrize(
    "names",
    [("temperature", "stale_weights[1]"), ("prompt.with_bos", "logits.bfloat16"), ("top_p", "target_shift[+1]")],
)
def test_two_causes_are_separated(names):
    found = run(planted(*(CAUSES[name] for name in names)))
    assert {step.cause.name for step in found.steps} == set(names)
    assert found.rest.mismatches == 0
    means = [step.before.mean_abs for step in found.steps]
    assert means == sorted(means, reverse=True)


@pytest.mark.parametrize(("shift", "name"), [(1, "shifted_index[+1]"), (-1, "shifted_index[-1]")])
def test_a_shifted_index_is_named(shift, name):
    found = sequences()
    scored = Numbers()(found, BASE)
    outcome = run(reported(found, [np.roll(values, -shift) for values in scored]))
    assert [step.cause.name for step in outcome.steps] == [name]
    assert outcome.rest.mismatches == 0
    # the token at the end has nobody's log-prob to be compared with
    assert outcome.rest.tokens == sum(LENGTHS) - len(LENGTHS)


def test_a_swapped_pair_is_named():
    found = [replace(s, id=f"r{s.id}") for s in sequences()]
    scored = Numbers()(found, BASE)
    scored[0], scored[2] = scored[2], scored[0]
    outcome = run(reported(found, scored))
    assert [(step.cause.name, step.sequences) for step in outcome.steps] == [("swapped_sequences", (0, 2))]
    assert "r0 carries those of r2, r2 carries those of r0" in outcome.steps[0].cause.what
    assert outcome.rest.mismatches == 0


def test_a_cause_of_some_sequences_is_found_in_these():
    found = [replace(s, id=f"r{s.id}") for s in sequences()]
    stale, fresh = (Numbers()(found, replace(BASE, weights=n)) for n in (1, 0))
    outcome = run(reported(found, [*fresh[:1], *stale[1:2], *fresh[2:]]))
    assert [(step.cause.name, step.sequences) for step in outcome.steps] == [("stale_weights[1]", (1,))]
    assert "(in sequence r1)" in outcome.verdict


def test_few_tokens_left_are_a_fault_unless_a_cause_of_arithmetic_came_before():
    def off_by_an_ulp(dump: Sequence[DumpSequence]) -> list[DumpSequence]:
        values = dump[1].logprobs.copy()
        values[11:13] = np.nextafter(values[11:13], np.float32(0))
        return [dump[0], replace(dump[1], logprobs=values), *dump[2:]]

    outcome = run(off_by_an_ulp(planted(CAUSES["batch"])))
    assert [step.cause.name for step in outcome.steps] == ["batch"]
    assert outcome.rest.mismatches == 2 and outcome.explained and outcome.findings == ()
    alone = run(off_by_an_ulp(planted()))
    assert alone.steps == () and not alone.explained
    assert [(f.name, f.where) for f in alone.findings] == [("isolated", ((1, 11), (1, 12)))]


@pytest.mark.parametrize(
    ("store", "grid"),
    [
        (lambda x: np.float32(np.float16(x)), "float16"),
        (lambda x: (x.view(np.int32) & np.int32(-65536)).view(np.float32), "bfloat16"),
        (lambda x: np.float32(np.round(np.float64(x), 3)), "3 decimals"),
        (lambda x: np.nextafter(x, np.float32(0)), None),
    ],
)
def test_log_probs_on_a_grid_were_stored_with_fewer_digits(store, grid):
    sizes = [replace(s, logprobs=store(s.logprobs / 8)) for s in planted()]
    outcome = run(sizes)
    assert not outcome.explained
    told = [each.what for each in outcome.findings if each.name == "stored"]
    assert len(told) == (grid is not None) and all(f"fits into {grid}:" in what for what in told)


def test_an_unnamed_temperature_is_fitted():
    found = sequences(SamplingParams(temperature=0.85))
    dump = [replace(s, sampling=None) for s in reported(found, Numbers()(found, BASE))]
    outcome = run(dump)
    assert [step.cause.name for step in outcome.steps] == ["temperature=0.85"]
    assert outcome.rest.mismatches == 0


def plant_values(change: Callable[[np.ndarray], None], place: int = 1) -> list[DumpSequence]:
    dump = planted()
    values = dump[place].logprobs.copy()
    change(values)
    dump[place] = replace(dump[place], logprobs=values)
    return dump


def put(position: int, value: float) -> Callable[[np.ndarray], None]:
    def change(values: np.ndarray) -> None:
        values[position] = value

    return change


@pytest.mark.parametrize(
    ("value", "name"), [(MISSING, "missing"), (np.float32(np.nan), "nan"), (-np.inf, "-inf"), (0.5, "positive")]
)
def test_a_log_prob_that_is_no_number_is_named_with_its_place(value, name):
    outcome = run(plant_values(put(4, value)))
    assert [(f.name, f.tokens, f.where) for f in outcome.broken] == [(name, 1, ((1, 4),))]
    assert not outcome.equal
    assert name in outcome.verdict


def test_one_ulp_at_one_token_is_named():
    dump = plant_values(lambda values: values.__setitem__(6, np.nextafter(values[6], np.float32(0))))
    outcome = run(dump)
    assert outcome.steps == ()
    assert [(f.name, f.tokens, f.where) for f in outcome.findings] == [("isolated", 1, ((1, 6),))]
    assert "up to 1 ULP" in outcome.findings[0].what
    # far less than rounding gives, but rounding spares no token
    assert not outcome.explained
    assert "tokens, not 1; not rounding: unexplained" in outcome.verdict


def test_a_difference_from_one_token_on_is_named():
    def change(values: np.ndarray) -> None:
        values[7:] -= np.linspace(0.1, 0.4, len(values) - 7, dtype=np.float32)

    outcome = run(plant_values(change))
    assert [(f.name, f.tokens, f.where[0]) for f in outcome.findings] == [("from_position", 10, (1, 7))]
    assert "KV block" in outcome.findings[0].what
    assert not outcome.explained


def test_a_whole_sequence_is_named():
    outcome = run(plant_values(lambda values: values.__isub__(noise("x", "y", len(values)).astype(np.float32) ** 2)))
    assert [(f.name, f.where[0]) for f in outcome.findings] == [("sequence", (1, 0))]


def test_a_mask_leaves_tokens_out():
    dump = plant_values(put(4, np.nan))
    mask = np.ones(LENGTHS[1], np.bool_)
    mask[4] = False
    dump[1] = replace(dump[1], mask=mask)
    outcome = run(dump)
    assert outcome.equal
    assert outcome.base.tokens == sum(LENGTHS) - 1


def noisy(seed: int, size: float) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    found = sequences()
    return [v + generator.normal(0, size, len(v)) for v in Numbers()(found, BASE)]


def test_scoring_by_pytorch_has_ours_as_the_other_order():
    native = ScoreSettings(native=OPERATORS)
    dump = reported(sequences(), Numbers()(sequences(), native))
    assert run(dump, base=native).equal
    outcome = run(planted(CAUSES["stale_weights[1]"]), base=native)
    assert [step.cause.name for step in outcome.steps] == ["stale_weights[1]", "operators.invariant"]
    outcome = run(reported(sequences(), noisy(0, 5e-5)), base=native)
    assert outcome.explained
    assert not any(effect.cause.name.startswith("operator.") for effect in outcome.effects)


def test_noise_has_no_cause_and_is_unexplained_if_it_is_larger_than_rounding():
    outcome = run(reported(sequences(), noisy(0, 0.05)))
    assert outcome.steps == ()
    assert not outcome.explained
    assert outcome.rounding.other_order < 1e-4
    assert "unexplained" in outcome.verdict


def test_noise_as_large_as_rounding_is_explained_by_it():
    outcome = run(reported(sequences(), noisy(0, 5e-5)))
    assert outcome.steps == ()
    assert outcome.explained
    assert "rounding explains it" in outcome.verdict and "would not show" not in outcome.verdict


@pytest.mark.parametrize("times", [0.0, 6.0])
def test_errors_unlike_those_of_16_bits_are_not_theirs(times):
    """Of their size but their own way; their way but six times their size, of which a sixth would go."""
    found = sequences()
    narrow, exact = (Numbers()(found, replace(BASE, dtype=dtype)) for dtype in ("bfloat16", None))
    own = noisy(0, 6e-4)
    scored = [e + times * (n - e) if times else v for n, e, v in zip(narrow, exact, own, strict=True)]
    outcome = run(reported(found, scored))
    assert outcome.steps == ()
    assert not outcome.explained


def test_errors_of_16_bits_beside_others_are_named():
    found = sequences()
    narrow = Numbers()(found, replace(BASE, dtype="bfloat16"))
    generator = np.random.default_rng(0)
    outcome = run(reported(found, [v + generator.normal(0, 6e-4, len(v)) for v in narrow]))
    assert [step.cause.name for step in outcome.steps] == ["dtype.bfloat16"]


def test_against_bfloat16_both_sides_are_held_against_float32():
    found = sequences()
    exact = Numbers()(found, replace(BASE, dtype="float32"))
    generator = np.random.default_rng(0)
    outcome = run(reported(found, [v + generator.normal(0, 6e-4, len(v)) for v in exact]), dtype="bfloat16")
    assert outcome.rounding.engine_error == pytest.approx(5e-4, rel=0.3)
    assert outcome.rounding.own_error == pytest.approx(5e-4, rel=0.3)
    assert "a fault that is no larger would not show" in outcome.verdict
    assert outcome.explained


def test_what_a_scorer_can_not_do_is_listed_with_the_reason():
    dump = planted(CAUSES["temperature"])
    outcome = attribute(dump, Numbers(refuses=("prompt", "tokens")), num_previous=1)
    assert [step.cause.name for step in outcome.steps] == ["temperature"]
    skipped = {e.cause.name: e.skipped for e in outcome.effects if e.skipped is not None}
    assert skipped["prompt.with_bos"] == "no prompt here"
    assert skipped["tokenisation"] == "no tokens here"


def test_transforms_that_no_sequence_had_are_not_tried():
    outcome = run(planted(CAUSES["stale_weights[1]"], sampling=SamplingParams()))
    skipped = {e.cause.name: e.skipped for e in outcome.effects if e.skipped is not None}
    none = "no sequence of the dump was sampled with "
    assert {name for name, why in skipped.items() if why == f"{none}it"} == {
        "temperature", "top_p", "top_k", "min_p", "filters",
    }  # fmt: skip
    assert (skipped["raw"], skipped["filters_first"]) == (
        f"{none}any transform",
        f"{none}both a temperature and a filter",
    )
    assert skipped["processed"] == "the log-probs are taken as processed to begin with"
    assert [step.cause.name for step in outcome.steps] == ["stale_weights[1]"]


COOL = SamplingParams(temperature=0.7, top_p=0.9)
ALL = ("temperature", "top_p", "filters", "filters_first")


@pytest.mark.parametrize(
    ("sampling", "processed", "ignore", "names", "why"),
    [
        (COOL, False, (), ALL, "raw log-probs don't depend on it"),
        (COOL, False, (), ["raw"], "the log-probs are taken as raw to begin with"),
        (COOL, False, (), ["top_k", "min_p"], "no sequence of the dump was sampled with it"),
        (COOL, True, ("top_p", "top_k", "min_p"), ["top_p", "filters", "filters_first"],
         "the log-probs are taken without it to begin with"),
        (replace(COOL, temperature=0), True, (), ALL[:3], "no sequence of the dump was sampled with it"),
    ],
)  # fmt: skip
def test_why_a_transform_is_not_tried_is_the_true_reason(sampling, processed, ignore, names, why):
    dump = [replace(s, processed=processed) for s in planted(CAUSES["stale_weights[1]"], sampling=sampling)]
    outcome = run(dump, base=ScoreSettings(ignore=ignore))
    skipped = {e.cause.name: e.skipped for e in outcome.effects}
    assert {skipped[name] for name in names} == {why}
    left_out = not processed or len(ignore) > 0
    assert (skipped["processed"] is None) == (left_out and not sampling.greedy)


def test_a_transform_that_some_sequences_have_in_their_log_probs_is_tried():
    dump = [replace(s, processed=i > 0) for i, s in enumerate(planted(CAUSES["stale_weights[1]"], sampling=COOL))]
    assert {e.cause.name: e.skipped for e in run(dump).effects}["top_p"] is None


def test_equal_causes_are_said_to_be():
    # with a temperature alone, raw log-probs are those without it
    outcome = run(planted(CAUSES["raw"], sampling=SamplingParams(temperature=0.7)))
    assert [step.cause.name for step in outcome.steps] == ["temperature"]
    assert {e.cause.name: e.same_as for e in outcome.effects}["raw"] == "temperature"


def test_nothing_to_compare_is_said():
    outcome = run([])
    assert not outcome.equal
    assert outcome.verdict.startswith("nothing was compared")
    blank = [replace(s, logprobs=np.full(len(s.token_ids), MISSING)) for s in sequences()]
    assert run(blank).broken[0].tokens == sum(LENGTHS)


def test_a_scorer_that_fails_on_the_plain_case_fails():
    def scorer(_sequences: Sequence[DumpSequence], _settings: ScoreSettings) -> list[np.ndarray]:
        raise ValueError("d:1: token id 99 is outside the model's vocabulary of 10")

    with pytest.raises(ValueError, match="token id 99"):
        attribute(planted(), scorer)


def test_no_setting_is_scored_twice():
    scorer = Numbers()
    attribute(planted(CAUSES["top_p"], CAUSES["stale_weights[1]"]), scorer, num_previous=2, config_changes=CONFIG)
    assert len(scorer.calls) == len(set(scorer.calls))


def test_config_changes_are_those_of_other_checkpoints_and_common_ones():
    own = {"rope_parameters": {"rope_theta": 1e4}, "rms_norm_eps": 1e-6, "num_layers": 2, "dtype": "float32"}
    other = {"rope_parameters": {"rope_theta": 3e4}, "rms_norm_eps": 1e-6, "num_layers": 3, "dtype": "bfloat16"}
    found = config_changes(own, [other])
    assert found[0] == ("rope_parameters.rope_theta", 3e4, "as previous model 1")
    assert {(name, value) for name, value, _ in found[1:]} == {
        ("rope_parameters.rope_theta", 5e5), ("rope_parameters.rope_theta", 1e6), ("rms_norm_eps", 1e-5),
    }  # fmt: skip


def test_a_field_that_is_null_elsewhere_is_a_change() -> None:
    clipped, whole = {"clip_qkv": 0.5, "sliding_window": None}, {"clip_qkv": None, "sliding_window": 9}
    found = {(name, value) for name, value, _ in config_changes(clipped, [whole])}
    assert found == {("clip_qkv", None), ("sliding_window", 9)}
    assert config_changes(clipped, []) == [("clip_qkv", None, "switched off")]


@pytest.mark.parametrize("name", ["norm_epsilon", "layer_norm_epsilon", "layer_norm_eps"])
def test_an_epsilon_is_known_by_any_of_its_names(name: str):
    assert config_changes({name: 1e-5, "embd_pdrop": 1e-5}, []) == [(name, 1e-6, "a common value")]


def test_an_object_of_which_several_fields_are_others_is_one_change():
    own = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    other = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0}}
    found = config_changes(own, [other])
    whole = (("rope_type", "llama3"), ("factor", 8.0))
    assert found[0] == ("rope_parameters", whole, "as previous model 1")
    [cause, *_] = config_causes(found)
    assert cause.name == "config.rope_parameters" and not cause.guessed
    expected = (("rope_parameters.rope_type", "llama3"), ("rope_parameters.factor", 8.0))
    assert cause.change(catalogue.Way(), 0).settings.config == expected
    assert ("rope_parameters.rope_type", "default", "switched off") in config_changes(other, [])
    assert ("rope_scaling.type", "default", "switched off") in config_changes({"rope_scaling": {"type": "yarn"}}, [])
    assert config_changes({}, [{"id2label": {"0": "a", "1": "b"}}]) == []


def test_operators_together_are_native():
    settings = catalogue.setting_cause("", "numerics", "", "", native=OPERATORS).change(catalogue.Way(), 0).settings
    assert settings.numerics == "native"


def test_rounding_beside_pytorchs_operators_is_that_of_ours():
    """Another order of summation than the one that was kept: not the same once more, which gives 0."""
    found, scorer = sequences(), Numbers()
    scored = scorer(found, replace(BASE, native=OPERATORS, batch="alone"))
    rest = [noise(s.id, "rest", len(values)) * 2e-5 for s, values in zip(found, scored, strict=True)]
    result = attribute(reported(found, [a + b for a, b in zip(scored, rest, strict=True)]), scorer, decode=False)
    assert [step.cause.name for step in result.steps] == ["operators.native"]
    assert result.rounding.other_order > 0
    assert result.explained


class OneToken(Numbers):
    """Positions that start at -1 move one token, and no other."""

    def _one(self, sequence: DumpSequence, settings: ScoreSettings) -> np.ndarray:
        found = super()._one(sequence, replace(settings, position_offset=0))
        if settings.position_offset == -1 and sequence.id == "1":
            found[5] += 0.01
        return found


def test_one_token_that_a_cause_brings_close_is_chance():
    found, scorer = sequences(), OneToken()
    scored = [
        values + noise(s.id, "rest", len(values)) * 5e-5 for s, values in zip(found, scorer(found, BASE), strict=True)
    ]
    scored[1][5] += 0.01
    result = attribute(reported(found, scored), scorer, decode=False)
    assert result.steps == ()
