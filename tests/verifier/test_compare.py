from __future__ import annotations

import numpy as np
import pytest

from rlalign.verifier.compare import LogprobPair, compare, ulp_distance


def pair(rollout: list[float], train: list[float], num_tokens: int | None = None, **more: object) -> LogprobPair:
    return LogprobPair(np.float32(rollout), np.float32(train), num_tokens or len(rollout), **more)


def from_bits(*bits: int) -> np.ndarray:
    return np.array(bits, np.uint32).view(np.float32)


def test_equal_bits_are_equal() -> None:
    values = -np.random.default_rng(0).exponential(size=200).astype(np.float32)
    result = compare([LogprobPair(values, values.copy(), 200)])
    assert result.equal
    assert result.mismatch_count == 0
    assert result.max_abs_delta == 0.0
    assert not result.ulp.any()


@pytest.mark.parametrize("bit", range(32))
def test_any_single_flipped_bit_is_seen(bit: int) -> None:
    values = -np.random.default_rng(bit).exponential(size=50).astype(np.float32)
    other = values.copy()
    other.view(np.uint32)[17] ^= np.uint32(1 << bit)
    result = compare([LogprobPair(values, other, 50)])
    assert not result.equal
    assert np.flatnonzero(result.mismatch).tolist() == [17]


def test_signed_zeros_differ() -> None:
    result = compare([pair([0.0, -0.0], [-0.0, -0.0])])
    assert result.mismatch.tolist() == [True, False]
    assert result.delta.tolist() == [0.0, 0.0]
    assert result.ulp.tolist() == [1, 0]
    assert not result.equal


def test_nan_payloads_differ_and_nan_is_never_agreement() -> None:
    quiet, other = 0x7FC00000, 0x7FC00001
    same = compare([LogprobPair(from_bits(quiet), from_bits(quiet), 1)])
    assert same.mismatch_count == 0
    assert same.nonfinite_count == 1
    assert not same.equal
    different = compare([LogprobPair(from_bits(quiet), from_bits(other), 1)])
    assert different.mismatch_count == 1
    assert different.train.view(np.uint32).tolist() == [other]
    assert different.ulp.tolist() == [-1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["rollout", "train"])
def test_nonfinite_on_either_side_is_counted(bad: float, side: str) -> None:
    sides = {"rollout": [-1.0, -2.0], "train": [-1.0, -2.0]}
    sides[side][1] = bad
    result = compare([pair(sides["rollout"], sides["train"])])
    assert (result.nonfinite_count, result.mismatch_count, result.num_tokens) == (1, 1, 2)
    assert result.max_abs_delta == np.inf


@pytest.mark.parametrize(("rollout", "train", "tokens", "missing"), [
    ([-1.0, -2.0, -3.0], [-1.0, -2.0], 3, [2]),
    ([-1.0], [-1.0, -2.0, -3.0], 3, [1, 2]),
    ([-1.0, -2.0], [-1.0, -2.0], 3, [2]),
    ([-1.0, -2.0], [-1.0, -2.0], 1, [1]),
])  # fmt: skip
def test_length_mismatch_counts_every_missing_token(
    rollout: list[float], train: list[float], tokens: int, missing: list[int]
) -> None:
    result = compare([pair([-5.0], [-5.0]), pair(rollout, train, tokens)])
    assert result.position[result.missing].tolist() == missing
    assert result.sample[result.missing].tolist() == [1] * len(missing)
    assert result.nonfinite_count == result.mismatch_count == len(missing)
    assert not result.equal


def test_mask_leaves_out_tokens_but_not_their_positions() -> None:
    mask = np.array([False, True, True])
    result = compare([pair([-1.0, -2.0, -3.0], [-9.0, -2.0, -3.5], mask=mask)])
    assert result.position.tolist() == [1, 2]
    assert result.mismatch.tolist() == [False, True]


def test_mask_reaches_neither_surplus_nor_other_samples() -> None:
    surplus = pair([-1.0, -2.0, -3.0], [-1.0, -2.0], 2, mask=np.array([False, True]))
    result = compare([pair([-4.0], [-4.0]), surplus, pair([], [-5.0], 1), pair([-6.0, -7.0], [-6.0, -7.0])])
    assert list(zip(result.sample.tolist(), result.position.tolist(), strict=True)) == [
        (0, 0), (1, 1), (1, 2), (2, 0), (3, 0), (3, 1)
    ]  # fmt: skip
    assert result.missing.tolist() == [False, False, True, True, False, False]
    assert result.train[~np.isnan(result.train)].tolist() == [-4.0, -2.0, -5.0, -6.0, -7.0]


def test_delta_is_rounded_to_float32() -> None:
    a, b = np.float32([-1.0]), np.float32([-0.1])
    assert compare([LogprobPair(a, b, 1)]).delta[0] == b[0] - a[0]
    assert compare([LogprobPair(a, b, 1)]).delta.dtype == np.float32


def test_ulp_counts_floats_between() -> None:
    one = np.float32([-1.0, -1.0, 1.0, 0.0])
    steps = np.nextafter(one, np.float32([0.0, -2.0, 2.0, -1.0]))
    # 0 -> the first negative denormal passes -0 on its way
    assert ulp_distance(one, steps).tolist() == [1, 1, 1, 2]
    assert ulp_distance(np.float32([-1.0]), np.float32([-2.0])).tolist() == [2**23]


@pytest.mark.parametrize("bad", [
    np.zeros(3), np.zeros((3, 1), np.float32), np.zeros((), np.float32), np.zeros(3, np.float16), np.zeros(3, np.bool_),
    np.zeros(3, ">f4"),
])  # fmt: skip
def test_other_dtypes_and_shapes_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="train log-probs of sample 1"):
        compare([pair([-1.0], [-1.0]), LogprobPair(np.zeros(3, np.float32), bad, 3)])


def test_nothing_compared_is_not_equal() -> None:
    assert not compare([]).equal
    assert not compare([LogprobPair(np.zeros(0, np.float32), np.zeros(0, np.float32), 0)]).equal
