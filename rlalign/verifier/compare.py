"""Bitwise comparison of rollout and train log-probs, token by token.

Legend: L response tokens of one sample, N tokens of all samples, S samples.

Two log-probs are equal when their 32 bits are: there is no epsilon, +0 differs from -0, and a NaN equals only a NaN of
the same payload. A log-prob that is absent, or not finite, is counted and reported; it never leaves the denominator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rlalign.records import Sample

_NONE = np.zeros(0, np.float32)


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


@dataclass(frozen=True)
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

    @cached_property
    def mismatch_count(self) -> int:
        return int(np.count_nonzero(self.mismatch))

    @cached_property
    def nonfinite_count(self) -> int:
        return int(np.count_nonzero(self.nonfinite))

    @property
    def equal(self) -> bool:
        """True if something was compared and every token is finite and bitwise equal."""
        return self.num_tokens > 0 and self.mismatch_count == 0 and self.nonfinite_count == 0

    @property
    def max_abs_delta(self) -> float:
        """Largest |delta|; inf as soon as one log-prob is missing or not finite; 0 when nothing was compared."""
        if self.nonfinite_count:
            return float("inf")
        return float(np.abs(self.delta).max()) if self.mismatch_count else 0.0


def compare(pairs: Sequence[LogprobPair]) -> Comparison:
    """Compare all pairs at once. Raises ValueError for arrays that are not one-dimensional float32."""
    masks = [pair.mask for pair in pairs]
    return _compare(
        [pair.rollout for pair in pairs],
        [pair.train for pair in pairs],
        [pair.num_tokens for pair in pairs],
        [pair.weights_version for pair in pairs],
        masks if any(mask is not None for mask in masks) else None,
    )


def compare_samples(samples: Sequence[Sample], train_logprobs: Sequence[np.ndarray]) -> Comparison:
    """Compare all samples, in order. train_logprobs: float32 [L] each, from the trainer's own forward."""
    if len(samples) != len(train_logprobs):
        raise ValueError(f"train_logprobs has {len(train_logprobs)} entries for {len(samples)} samples")
    completions = [sample.completion for sample in samples]
    return _compare(
        [completion.logprobs for completion in completions],
        train_logprobs,
        [len(completion.token_ids) for completion in completions],
        [completion.weights_version for completion in completions],
    )


def _compare(
    rollouts: Sequence[np.ndarray],
    trains: Sequence[np.ndarray],
    num_tokens: Sequence[int],
    versions: Sequence[int],
    masks: Sequence[np.ndarray | None] | None = None,
) -> Comparison:
    """Columns of pairs, as ``LogprobPair`` has them; masks: None for none at all."""
    rollout, train = _joined("rollout", rollouts), _joined("train", trains)
    counts = np.array([num_tokens, [*map(len, rollouts)], [*map(len, trains)]], np.int64)
    lengths = counts.max(axis=0)
    sample = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(len(sample)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    missing = np.zeros(len(sample), np.bool_)
    if (counts != lengths).any():
        # surplus log-probs belong to no token: they count as missing on the other side rather than being cut off
        expected, *present = (position < np.repeat(count, lengths) for count in counts)
        rollout, train = _padded(rollout, present[0]), _padded(train, present[1])
        missing = ~(expected & present[0] & present[1])
    if masks is not None:
        keep = _kept(masks, position < np.repeat(counts[0], lengths), counts[0])
        sample, position, rollout, train, missing = (v[keep] for v in (sample, position, rollout, train, missing))
    nonfinite = missing | ~(np.isfinite(rollout) & np.isfinite(train))
    mismatch = missing | (rollout.view(np.int32) != train.view(np.int32))
    delta = np.full(len(rollout), np.nan, np.float32)
    np.subtract(train, rollout, out=delta, where=~nonfinite)
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
        versions=np.array(versions, np.int64)[sample],
        num_samples=len(lengths),
    )


def ulp_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Float32 values between a and b, counted along the number line: int64, the shape of a.

    +0 and -0 are one apart, so that 0 means equal bits and nothing else. Meaningless for NaN.
    """
    return np.abs(_number_line(a) - _number_line(b))


def _number_line(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.int32).astype(np.int64)
    # negative floats ascend in magnitude as their bits do: mirror them below zero
    return np.where(bits < 0, ~(bits & 0x7FFFFFFF), bits)


def _joined(name: str, sides: Sequence[np.ndarray]) -> np.ndarray:
    """One after another: float32 [their lengths]."""
    try:
        # no cast; an empty one more: numpy refuses none at all, and it is of one dimension
        return np.concatenate([*sides, _NONE], dtype=np.float32, casting="no")
    except (TypeError, ValueError):
        index = next(i for i, side in enumerate(sides) if side.dtype != np.float32 or side.ndim != 1)
    raise ValueError(
        f"{name} log-probs of sample {index} are {sides[index].dtype} of shape {sides[index].shape}; only "
        "one-dimensional float32 is compared, since a cast would hide or invent differences"
    )


def _padded(values: np.ndarray, present: np.ndarray) -> np.ndarray:
    """The values where ``present``, bool [N], NaN elsewhere: float32 [N]."""
    flat = np.full(len(present), np.nan, np.float32)
    flat[present] = values
    return flat


def _kept(masks: Sequence[np.ndarray | None], expected: np.ndarray, num_tokens: np.ndarray) -> np.ndarray:
    """Bool [N]: what no mask leaves out. expected: bool [N] of the tokens that masks are of, num_tokens each."""
    for index, (mask, count) in enumerate(zip(masks, num_tokens.tolist(), strict=True)):
        if mask is not None and (mask.dtype != np.bool_ or mask.shape != (count,)):
            raise ValueError(
                f"mask of sample {index} must be bool of shape ({count},), is {mask.dtype} of shape {mask.shape}"
            )
    full = [np.ones(n, np.bool_) if mask is None else mask for mask, n in zip(masks, num_tokens, strict=True)]
    keep = np.ones(len(expected), np.bool_)
    keep[expected] = np.concatenate(full)
    return keep
