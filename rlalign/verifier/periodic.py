"""What a run checks now and then beyond the sampled tokens' log-probs, on a few sequences of a step.

Both sides compute the same excerpts with their own weights, operators and way of running; the verifier gets digests of
what they found and asks for numbers only where digests differ. Legend: P prompt tokens, L response tokens, N response
tokens of all excerpts, T rows of all excerpts (every token but the last of each), S sites, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rlalign.records import Sample, derive_seed
from rlalign.verifier.bisect import Recording, Site

# sets this purpose apart from others of the same run seed
_CHOICE = 0x63686B73


@dataclass(frozen=True, slots=True)
class Excerpt:
    """A sequence, or a part of one from its beginning: ids int64 [P] that are prefilled, and [L] that are decoded."""

    name: str
    prompt_ids: np.ndarray
    response_ids: np.ndarray


@dataclass(frozen=True, slots=True)
class SiteDigests:
    """digests: int64 [S, T], one number of all the bits that a site gives for a row; equal bits, equal numbers."""

    sites: tuple[Site, ...]
    digests: np.ndarray


class Inspects(Protocol):
    """One side, wherever it runs. No call may depend on an earlier one."""

    def logit_digests(self, excerpts: Sequence[Excerpt]) -> np.ndarray:
        """int64 [N]: one number of all V logits that each response token was drawn from."""

    def logits_at(self, excerpts: Sequence[Excerpt], places: Sequence[int]) -> np.ndarray:
        """float32 [len(places), V]: the logits themselves, of some of the N."""

    def site_digests(self, excerpts: Sequence[Excerpt]) -> SiteDigests:
        """Every module's output, in the model's order."""

    def site_values(self, excerpts: Sequence[Excerpt], orders: Sequence[int], rows: Sequence[int]) -> list[Recording]:
        """Outputs of the sites ``orders``, float32 [len(rows), F] each, for some of the T rows."""


def due(every: int, step: int) -> bool:
    """Whether a check falls due: in step 1 and then every so many; 0 switches it off."""
    return every > 0 and (step == 1 or step % every == 0)


def choose_excerpts(samples: Sequence[Sample], *, count: int, tokens: int, seed: int, step: int) -> list[Excerpt]:
    """``count`` samples that have a response, by hash of (seed, step, key), in order of key.

    tokens: most response tokens that are decoded. Of a longer response, so many from a place that the hash chooses:
    what comes before is prefilled with the prompt. So the cost has a bound, and late positions get their turn.
    """
    able = [sample for sample in samples if len(sample.completion.token_ids) and len(sample.completion.prompt_ids)]
    ranked = sorted(able, key=lambda sample: (derive_seed(seed, step, _CHOICE, *sample.key), sample.key))
    return [_excerpt(sample, tokens, seed) for sample in sorted(ranked[:count], key=lambda sample: sample.key)]


def _excerpt(sample: Sample, tokens: int, seed: int) -> Excerpt:
    prompt, response = sample.completion.prompt_ids, sample.completion.token_ids
    spare = len(response) - tokens
    begin = 0 if spare <= 0 else derive_seed(seed, _CHOICE, *sample.key) % (spare + 1)
    name = "/".join(map(str, sample.key))
    return Excerpt(name, np.concatenate([prompt, response[:begin]]), response[begin : begin + tokens])
