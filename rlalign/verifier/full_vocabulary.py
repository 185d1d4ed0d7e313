"""Do both sides give the same distribution over the whole vocabulary, not just the same log-prob of the sampled token?

One number per token says whether all V logits have equal bits; only where it differs do logits travel, those of a few
tokens. Legend: N response tokens of all excerpts, K of them chosen evenly, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlalign.verifier.periodic import Excerpt, Inspects


@dataclass(frozen=True, slots=True)
class FullVocabulary:
    """tokens: N. differing: of them, tokens with another logit anywhere. first: (excerpt, position) of the first one.

    kl, max_abs: float64 [K] of the chosen tokens: KL(rollout ‖ train) in nats, at temperature 1 with nothing cut off,
    and the largest difference of a log-prob over the vocabulary. Both are exactly 0 where all bits are equal.
    """

    tokens: int
    differing: int
    first: tuple[str, int] | None
    kl: np.ndarray
    max_abs: np.ndarray

    @property
    def equal(self) -> bool:
        return self.differing == 0

    def metrics(self) -> dict[str, float]:
        """``align/full_vocab/*``."""
        values = {
            "tokens": float(self.tokens),
            "hash_match_frac": 1.0 - self.differing / self.tokens,
            "kl/mean": float(self.kl.mean()),
            "kl/max": float(self.kl.max()),
            "logp_abs_diff/max": float(self.max_abs.max()),
        }
        return {f"align/full_vocab/{name}": value for name, value in values.items()}

    @property
    def verdict(self) -> str:
        if self.first is None:
            return f"all logits of {self.tokens:,} tokens are bit for bit equal"
        name, position = self.first
        return (
            f"logits over the whole vocabulary differ on {self.differing:,} of {self.tokens:,} tokens, first in sample "
            f"{name} position {position}; KL(rollout ‖ train) mean {self.kl.mean():.3g}, max {self.kl.max():.3g}"
        )


def check_full_vocabulary(
    rollout: Inspects, train: Inspects, excerpts: Sequence[Excerpt], *, positions: int
) -> FullVocabulary:
    """Compare both sides on ``excerpts``; ``positions`` is K. Raises ValueError if there is no response token."""
    lengths = [len(excerpt.response_ids) for excerpt in excerpts]
    if not sum(lengths):
        raise ValueError("the excerpts have no response token: no logits to compare")
    differs = rollout.logit_digests(excerpts) != train.logit_digests(excerpts)
    # at least 1 apart: none comes twice
    chosen = np.linspace(0, len(differs) - 1, min(positions, len(differs))).round().astype(np.int64)
    kl, max_abs = np.zeros(len(chosen)), np.zeros(len(chosen))
    asked = np.flatnonzero(differs[chosen])
    if len(asked):
        places = chosen[asked].tolist()
        kl[asked], max_abs[asked] = divergence(rollout.logits_at(excerpts, places), train.logits_at(excerpts, places))
    return FullVocabulary(len(differs), int(differs.sum()), _first(excerpts, lengths, differs), kl, max_abs)


def divergence(rollout: np.ndarray, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(KL(rollout ‖ train), largest |Δ| of a log-prob), float64 [K], of logits float32 [K, V]; inf where one is NaN."""
    p, q = _log_softmax(rollout), _log_softmax(train)
    with np.errstate(invalid="ignore"):
        # an id that the rollout can't draw adds nothing, whatever the trainer says of it
        terms = np.where(np.isneginf(p), 0.0, np.exp(p) * (p - q))
        size = np.where(p == q, 0.0, np.abs(p - q))
    kl, largest = terms.sum(axis=1), size.max(axis=1)
    return np.where(np.isnan(kl), np.inf, np.maximum(kl, 0.0)), np.where(np.isnan(largest), np.inf, largest)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    values = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        shifted = values - values.max(axis=1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _first(excerpts: Sequence[Excerpt], lengths: Sequence[int], differs: np.ndarray) -> tuple[str, int] | None:
    if not differs.any():
        return None
    place = int(differs.argmax())
    ends = np.cumsum(lengths)
    which = int(np.searchsorted(ends, place, side="right"))
    return excerpts[which].name, place - int(ends[which]) + lengths[which]
