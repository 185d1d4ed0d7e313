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
    rollout, train, sample, position, missing = _flattened(pairs)
    nonfinite = missing | ~np.isfinite(rollout) | ~np.isfinite(train)
    delta = np.full(len(rollout), np.nan, np.float32)
    np.subtract(train, rollout, out=delta, where=~nonfinite)
    mismatch = missing | (rollout.view(np.int32) != train.view(np.int32))
    ulp, apart = -nonfinite.astype(np.int64), mismatch & ~nonfinite
    ulp[apart] = ulp_distance(rollout[apart], train[apart])  # equal bits are 0 apart
    return Comparison(
        rollout=rollout,
        train=train,
        sample=sample,
        position=position,
        missing=missing,
        nonfinite=nonfinite,
        mismatch=mismatch,
        delta=delta,
        ulp=ulp,
        versions=np.array([pair.weights_version for pair in pairs], np.int64)[sample],
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


def _flattened(pairs: Sequence[LogprobPair]) -> tuple[np.ndarray, ...]:
    """(rollout, train, sample, position, missing) of all pairs, as ``Comparison`` has them."""
    for index, pair in enumerate(pairs):
        _check(index, pair)
    counts = np.array([(p.num_tokens, len(p.rollout), len(p.train)) for p in pairs], np.int64).reshape(-1, 3)
    lengths = counts.max(axis=1)
    sample = np.repeat(np.arange(len(pairs), dtype=np.int64), lengths)
    position = np.arange(len(sample), dtype=np.int64) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    # surplus log-probs belong to no token: they count as missing on the other side rather than being cut off
    expected, *present = (position < np.repeat(count, lengths) for count in counts.T)
    rollout = _padded([pair.rollout for pair in pairs], present[0])
    train = _padded([pair.train for pair in pairs], present[1])
    flat = rollout, train, sample, position, ~(expected & present[0] & present[1])
    if any(pair.mask is not None for pair in pairs):
        keep = np.ones(len(sample), np.bool_)
        keep[expected] = np.concatenate([np.ones(p.num_tokens, np.bool_) if p.mask is None else p.mask for p in pairs])
        flat = tuple(values[keep] for values in flat)
    return flat


def _check(index: int, pair: LogprobPair) -> None:
    for name, side in (("rollout", pair.rollout), ("train", pair.train)):
        if side.dtype != np.float32 or side.ndim != 1:
            raise ValueError(
                f"{name} log-probs of sample {index} are {side.dtype} of shape {side.shape}; only one-dimensional "
                "float32 is compared, since a cast would hide or invent differences"
            )
    if pair.mask is not None and (pair.mask.dtype != np.bool_ or pair.mask.shape != (pair.num_tokens,)):
        raise ValueError(
            f"mask of sample {index} must be bool of shape ({pair.num_tokens},), is {pair.mask.dtype} "
            f"of shape {pair.mask.shape}"
        )


def _padded(parts: list[np.ndarray], present: np.ndarray) -> np.ndarray:
    """The parts where ``present``, bool [N], NaN elsewhere: float32 [N]."""
    flat = np.full(len(present), np.nan, np.float32)
    flat[present] = np.concatenate([*parts, flat[:0]])  # an empty one more: numpy refuses none at all
    return flat
