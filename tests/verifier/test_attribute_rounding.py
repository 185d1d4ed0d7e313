"""What rounding may look like: its size where no other implementation can be asked, and its few tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.numbers_scorer import BASE, Numbers, reported, sequences

from rlalign.verifier.attribute import attribute
from rlalign.verifier.dumps.record import DumpSequence
from rlalign.verifier.score import OPERATORS, ScoreSettings, UnsupportedSetting
from rlalign.verifier.scores import last_place

NATIVE = ScoreSettings(native=OPERATORS)


class NotExact(Numbers):
    """A model that our operators can't take. Its log-probs are near 0, where their own last place is far below 1's."""

    def _one(self, sequence: DumpSequence, settings: ScoreSettings) -> np.ndarray:
        if settings.native != frozenset(OPERATORS):
            raise UnsupportedSetting("not exact")
        return super()._one(sequence, settings) / np.float32(2**10)


class Shapeless(NotExact):
    """One that computes the same whatever the shapes, so that no other order of summation is to be had."""

    def _one(self, sequence: DumpSequence, settings: ScoreSettings) -> np.ndarray:
        return super()._one(sequence, replace(settings, phase="prefill", batch="together"))


def off(scorer: Numbers, settings: ScoreSettings, tokens: int, by: float) -> list[DumpSequence]:
    """A dump of ``scorer``, but for the first few tokens of sequence 1."""
    scored = scorer(sequences(), settings)
    scored[1][:tokens] += np.float32(by)
    return reported(sequences(), scored)


@pytest.mark.parametrize("scorer", [NotExact(), Shapeless()], ids=["shapes", "nothing to measure"])
@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_last_place_of_1_is_rounding_by_pytorchs_operators(scorer: Numbers, decode: bool, tokens: int) -> None:
    found = attribute(off(scorer, NATIVE, tokens, 2.0**-23), scorer, base=NATIVE, decode=decode)
    assert found.rest.mismatches == tokens
    assert (found.steps, found.explained, found.findings) == ((), True, ())
    assert "rounding explains it" in found.verdict
    assert "a fault as small" not in found.verdict


@pytest.mark.parametrize("scorer", [NotExact(), Shapeless()], ids=["shapes", "nothing to measure"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_few_tokens_beyond_it_are_a_fault(scorer: Numbers, tokens: int) -> None:
    found = attribute(off(scorer, NATIVE, tokens, 1e-5), scorer, base=NATIVE)
    assert not found.explained
    assert [(each.name, each.tokens) for each in found.findings] == [("isolated", tokens)]


def test_few_tokens_as_small_as_rounding_are_named_by_pytorchs_operators() -> None:
    """Nobody can tell a fault from rounding there, so both are said; ``Numbers`` moves native log-probs by 1e-4."""
    found = attribute(off(Numbers(), NATIVE, 12, 2e-5), Numbers(), base=NATIVE, decode=False)
    assert found.rounding.in_doubt(found.rest)
    assert [(each.name, each.tokens) for each in found.findings] == [("sequence", 12)]
    assert found.explained
    assert "a fault as small would look so too" in found.verdict


@pytest.mark.parametrize("decode", [True, False])
def test_other_shapes_are_the_other_order_where_ours_are_refused(decode: bool) -> None:
    scorer = NotExact()
    found = attribute(off(scorer, NATIVE, 1, 2.0**-23), scorer, base=NATIVE, decode=decode)
    # as far as ``Numbers`` moves them, and no forward per token unless it may be
    assert 0 < found.rounding.other_order < 1e-5 / 2**10
    assert any(each.phase == "decode" for each in scorer.calls) == decode


def test_the_same_last_place_is_a_fault_under_our_operators() -> None:
    found = attribute(off(Numbers(), BASE, 1, 2.0**-18), Numbers(), decode=False)
    assert not found.explained
    assert [(each.name, each.where) for each in found.findings] == [("isolated", ((1, 0),))]


def test_the_last_place_is_at_least_that_of_1() -> None:
    places = last_place(np.float32([0.0, -1e-6, -0.99, -1.0, -3.0, -40.0]))
    assert places.tolist() == [2.0**-23] * 4 + [2.0**-22, 2.0**-18]
