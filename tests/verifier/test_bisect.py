"""Recordings made by hand: the first site that differs, by how much, and how it grows."""

from __future__ import annotations

import numpy as np
import pytest

from rlalign.verifier.bisect import Recording, Site, Tokens, bisect

TOKENS = Tokens(np.array([0, 0, 1]), np.array([0, 1, 0]), np.array([5, 6, 7]))
SITES = (
    Site(0, None, "embed", "embedding"), Site(1, 0, "layers.0.q", "linear"), Site(2, 0, "layers.0", "residual sum"),
    Site(3, 1, "layers.1", "residual sum"), Site(4, None, "log-prob", "head"),
)  # fmt: skip


def pairs(*, at: int | None = None, dtype: str = "float32"):
    """Sites of random values; from site ``at`` on, the second token's third feature is one float32 step away."""
    for site in SITES:
        values = np.random.default_rng(site.order).normal(size=(3, 4)).astype(np.float32)
        other = values.copy()
        if at is not None and site.order >= at:
            other[1, 2] = np.nextafter(other[1, 2], np.float32(np.inf))
        yield Recording(site, values, dtype), Recording(site, other, dtype)


def test_equal_sites_have_no_first():
    found = bisect(pairs(), TOKENS)
    assert found.equal
    assert found.first is None
    assert found.verdict == "bit for bit equal at all 5 outputs of 3 tokens"
    assert not found.heat_map().any()


@pytest.mark.parametrize("at", range(len(SITES)))
def test_the_first_site_is_named_with_its_token_and_distance(at):
    found = bisect(pairs(at=at), TOKENS)
    assert found.first is not None
    assert found.first.site == SITES[at]
    assert (found.first.token, found.first.differing, found.first.max_ulp, found.first.tokens_differing) == (1, 1, 1, 1)
    assert found.first.share == 1 / 12
    assert f"{SITES[at]}, sequence 0 position 1: 1 of 12 elements differ, by at most 1 ULP" in found.verdict
    assert [d.site.order for d in found.sites if d.differing] == list(range(at, len(SITES)))


def test_depth_has_one_station_per_layer():
    found = bisect(pairs(at=1), TOKENS)
    assert [d.site.module for d in found.depth] == ["embed", "layers.0", "layers.1", "log-prob"]
    heat = found.heat_map()
    assert heat.shape == (4, 3)
    assert (heat > 0).tolist() == [[False] * 3] + [[False, True, False]] * 3
    assert found.record()["heat_map"]["max_abs"] == heat.tolist()


def test_ulp_is_counted_in_the_coarser_dtype():
    site = SITES[0]
    a = np.array([[1.0], [1.0], [2.0]], np.float32)
    b = np.array([[1.0078125], [1.0], [2.0]], np.float32)  # one bfloat16 step above 1
    for dtypes, expected in ((("bfloat16", "bfloat16"), 1), (("float32", "bfloat16"), 1), (("float32",) * 2, 1 << 16)):
        sides = [Recording(site, values, dtype) for values, dtype in zip((a, b), dtypes, strict=True)]
        [difference] = bisect([tuple(sides)], TOKENS).sites
        assert difference.max_ulp == expected


def test_a_nan_on_one_side_differs_and_on_both_does_not():
    site = SITES[0]
    a = np.array([[np.nan, 1.0], [2.0, np.nan], [3.0, 4.0]], np.float32)
    b = a.copy()
    assert bisect([(Recording(site, a), Recording(site, b))], TOKENS).equal
    b[1, 1] = 5.0
    first = bisect([(Recording(site, a), Recording(site, b))], TOKENS).first
    assert first is not None
    assert (first.differing, first.nonfinite, first.max_abs, first.token) == (1, 2, np.inf, 1)


def test_signed_zeros_differ():
    a, b = np.zeros((3, 1), np.float32), np.full((3, 1), -0.0, np.float32)
    first = bisect([(Recording(SITES[0], a), Recording(SITES[0], b))], TOKENS).first
    assert first is not None
    assert (first.max_abs, first.max_ulp, first.differing) == (0.0, 1, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"site": SITES[1]}, "recordings of two sites"),
        ({"values": np.zeros((2, 4), np.float32)}, r"float32 \[3, F\]"),
        ({"values": np.zeros((3, 5), np.float32)}, "shape"),
        ({"values": np.zeros((3, 4))}, "float64"),
        ({"dtype": "int8"}, "dtype 'int8' is not supported"),
    ],
)
def test_recordings_that_do_not_fit_are_refused(change, message):
    good = {"site": SITES[0], "values": np.zeros((3, 4), np.float32), "dtype": "float32"}
    with pytest.raises(ValueError, match=message):
        bisect([(Recording(**good), Recording(**{**good, **change}))], TOKENS)


def test_one_token_is_no_plural():
    same = [(Recording(site, np.zeros((1, 4), np.float32), "float32"),) * 2 for site in SITES]
    found = bisect(same, Tokens(np.array([0]), np.array([0]), np.array([5])))
    assert found.verdict == "bit for bit equal at all 5 outputs of 1 token"


def test_nothing_compared_is_not_equal():
    found = bisect([], TOKENS)
    assert not found.equal
    assert found.verdict.startswith("nothing was compared")
