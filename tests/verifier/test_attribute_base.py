"""Logarithms to another base than e: named where all values are off by its factor, and where nothing else does that."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from support.numbers_scorer import BASE, LENGTHS, Numbers, noise, planted, reported, run, sequences

from rlalign.config import SamplingParams
from rlalign.verifier.attribute import attribute
from rlalign.verifier.dumps.record import DumpSequence
from rlalign.verifier.score import ScoreSettings, effective_sampling

Change = Callable[[np.ndarray], np.ndarray]


def scored(change: Change) -> list[DumpSequence]:
    return reported(sequences(), [change(values.astype(np.float64)) for values in Numbers()(sequences(), BASE)])


@pytest.mark.parametrize("base", [2, 10])
def test_another_base_is_named_with_what_removes_it(base: int) -> None:
    outcome = run(scored(lambda values: values / math.log(base)))
    [step] = outcome.steps
    assert (step.cause.name, step.sequences, outcome.rest.mismatches) == (f"log_base[{base}]", None, 0)
    assert f"multiply by ln {base} = {math.log(base):.6g}" in step.cause.remedy


def test_neither_rounding_nor_single_tokens_hide_it() -> None:
    generator = np.random.default_rng(0)
    dump = scored(lambda values: (values + generator.normal(0, 5e-5, len(values))) / math.log(2))
    values = dump[1].logprobs.copy()
    values[[3, 9]] = -1e-3, -9999.0
    outcome = run([dump[0], replace(dump[1], logprobs=values), *dump[2:]])
    assert [step.cause.name for step in outcome.steps] == ["log_base[2]"]
    assert [(each.name, each.where) for each in outcome.findings] == [("isolated", ((1, 3), (1, 9)))]


def test_the_sequences_that_have_it_are_named() -> None:
    dump = [two if place == 2 else e for place, (e, two) in enumerate(
        zip(planted(), scored(lambda values: values / math.log(2)), strict=True))]  # fmt: skip
    outcome = run(dump)
    assert [(step.cause.name, step.sequences) for step in outcome.steps] == [("log_base[2]", (2,))]
    assert outcome.rest.mismatches == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda values: values * 1.4,  # no base's factor
        lambda values: values / np.log(np.arange(len(values)) % 3 + 1.5),  # one that is near it in the middle only
        lambda values: values / math.log(2) - 9,  # its factor, and more
        lambda values: -values / math.log(2),
    ],
)
def test_other_factors_are_no_base(change: Change) -> None:
    effects = run(scored(change)).effects
    assert effects and not any(effect.cause.name.startswith("log_base") for effect in effects)


def test_a_few_tokens_are_no_proof() -> None:
    dump = scored(lambda values: values / math.log(2))
    mask = np.arange(max(LENGTHS)) < 4
    few = [replace(s, mask=mask[: len(s.token_ids)]) for s in dump]
    assert not any(effect.cause.name.startswith("log_base") for effect in run(few).effects)


class Peaked(Numbers):
    """One token has nearly all the mass, so that a temperature divides the log-probs of the others."""

    def _one(self, sequence: DumpSequence, settings: ScoreSettings) -> np.ndarray:
        size = np.abs(noise(sequence.id, "", len(sequence.token_ids))) * 9 + 1
        return (-size / effective_sampling(sequence, settings).temperature).astype(np.float32)


@pytest.mark.parametrize("named", [1.0, 0.5])
def test_what_a_temperature_explains_as_well_is_no_base(named: float) -> None:
    found = sequences(SamplingParams(temperature=named))
    dump = reported(found, [values / math.log(2) for values in Peaked()(found, BASE)])
    outcome = attribute(dump, Peaked(), decode=False)
    assert [step.cause.name for step in outcome.steps] == [f"temperature={named * math.log(2):.2g}"]
    assert not any(effect.cause.name.startswith("log_base") for effect in outcome.effects)
