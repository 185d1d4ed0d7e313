"""Bitwise comparison of rollout and train log-probs, token by token.

Legend: L response tokens of one sample, N tokens of all samples, S samples.

Two log-probs are equal when their 32 bits are: there is no epsilon, +0 differs from -0, and a NaN equals only a NaN of
the same payload. A log-prob that is absent, or not finite, is counted and reported; it never leaves the denominator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlalign.records import Sample


@dataclass(frozen=True, slots=True)
class LogprobPair:
    """Both log-probs of one sample's response.

    rollout, train: float32 [<= L]; num_tokens: L, what both should have. mask: bool [L] of the tokens that the loss
    sees, None for all. weights_version: of the weights that sampled.
    """

    rollout: np.ndarray
    train: np.ndarray
    num_tokens: int
    mask: np.ndarray | None = None
    weights_version: int = 0


@dataclass(frozen=True, slots=True)
class Comparison:
    """Every compared token, flattened in the order of the pairs.

    rollout, train: float32 [N], NaN where missing. sample, position: int64 [N], index of the pair and of the token in
    its response. missing, nonfinite, mismatch: bool [N]; nonfinite includes missing, mismatch is "32 bits differ or one
    is missing". delta: float32 [N], train - rollout, NaN where nonfinite. ulp: int64 [N], 0 exactly where the bits are
    equal, -1 where nonfinite. versions: int64 [N].

    Example:
        >>> a, b = np.float32([-1.0, -0.0]), np.float32([-1.0, 0.0])
        >>> compare([LogprobPair(rollout=a, train=b, num_tokens=2)]).mismatch.tolist()
        [False, True]
    """

    rollout: np.ndarray
    train: np.ndarray
    sample: np.ndarray
    position: np.ndarray
    missing: np.ndarray
    nonfinite: np.ndarray
    mismatch: np.ndarray
    delta: np.ndarray
    ulp: np.ndarray
    versions: np.ndarray
    num_samples: int

    @property
    def num_tokens(self) -> int:
        return len(self.rollout)

    @property
    def mismatch_count(self) -> int:
        return int(self.mismatch.sum())

    @property
    def nonfinite_count(self) -> int:
        return int(self.nonfinite.sum())

    @property
    def equal(self) -> bool:
        """True if something was compared and every token is finite and bitwise equal."""
        return self.num_tokens > 0 and self.mismatch_count == 0 and self.nonfinite_count == 0

    @property
    def max_abs_delta(self) -> float:
        """Largest |delta|; inf as soon as one log-prob is missing or not finite; 0 when nothing was compared."""
        if self.nonfinite.any():
            return float("inf")
        return float(np.abs(self.delta).max()) if self.num_tokens else 0.0


def compare(pairs: Sequence[LogprobPair]) -> Comparison:
    """Compare all pairs at once. Raises ValueError for arrays that are not one-dimensional float32."""
    sides = [_padded(index, pair) for index, pair in enumerate(pairs)]
    rollout, train, missing, position = (_joined([side[i] for side in sides], dtype) for i, dtype in enumerate(_DTYPES))
    lengths = [len(side[0]) for side in sides]
    nonfinite = missing | ~np.isfinite(rollout) | ~np.isfinite(train)
    delta = np.full(len(rollout), np.nan, np.float32)
    np.subtract(train, rollout, out=delta, where=~nonfinite)
    return Comparison(
        rollout=rollout,
        train=train,
        sample=np.repeat(np.arange(len(pairs), dtype=np.int64), lengths),
        position=position,
        missing=missing,
        nonfinite=nonfinite,
        mismatch=missing | (rollout.view(np.int32) != train.view(np.int32)),
        delta=delta,
        ulp=np.where(nonfinite, -1, ulp_distance(rollout, train)),
        versions=np.repeat(np.array([pair.weights_version for pair in pairs], np.int64), lengths),
        num_samples=len(pairs),
    )


def pairs_from_samples(samples: Sequence[Sample], train_logprobs: Sequence[np.ndarray]) -> list[LogprobPair]:
    """One pair per sample, in order. train_logprobs: float32 [L] each, from the trainer's own forward."""
    if len(samples) != len(train_logprobs):
        raise ValueError(f"train_logprobs has {len(train_logprobs)} entries for {len(samples)} samples")
    return [
        LogprobPair(
            rollout=sample.completion.logprobs,
            train=train,
            num_tokens=len(sample.completion.token_ids),
            weights_version=sample.completion.weights_version,
        )
        for sample, train in zip(samples, train_logprobs, strict=True)
    ]


def ulp_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Float32 values between a and b, counted along the number line: int64, the shape of a.

    +0 and -0 are one apart, so that 0 means equal bits and nothing else. Meaningless for NaN.
    """
    return np.abs(_number_line(a) - _number_line(b))


def _number_line(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.int32).astype(np.int64)
    # negative floats ascend in magnitude as their bits do: mirror them below zero
    return np.where(bits < 0, ~(bits & 0x7FFFFFFF), bits)


_DTYPES = (np.float32, np.float32, np.bool_, np.int64)


def _padded(index: int, pair: LogprobPair) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(rollout, train, missing, position) of one sample, each as long as the longest of the three lengths."""
    for name, side in (("rollout", pair.rollout), ("train", pair.train)):
        if side.dtype != np.float32 or side.ndim != 1:
            raise ValueError(
                f"{name} log-probs of sample {index} are {side.dtype} of shape {side.shape}; only one-dimensional "
                "float32 is compared, since a cast would hide or invent differences"
            )
    # surplus log-probs belong to no token: they count as missing on the other side rather than being cut off
    length = max(pair.num_tokens, len(pair.rollout), len(pair.train))
    missing = np.arange(length) >= min(pair.num_tokens, len(pair.rollout), len(pair.train))
    sides = [np.full(length, np.nan, np.float32) for _ in range(2)]
    sides[0][: len(pair.rollout)] = pair.rollout
    sides[1][: len(pair.train)] = pair.train
    keep = np.ones(length, np.bool_)
    if pair.mask is not None:
        if pair.mask.dtype != np.bool_ or pair.mask.shape != (pair.num_tokens,):
            raise ValueError(
                f"mask of sample {index} must be bool of shape ({pair.num_tokens},), is {pair.mask.dtype} "
                f"of shape {pair.mask.shape}"
            )
        keep[: pair.num_tokens] = pair.mask
    return sides[0][keep], sides[1][keep], missing[keep], np.arange(length)[keep]


def _joined(parts: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)
