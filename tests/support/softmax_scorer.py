"""A scorer whose log-probs are those of a softmax over known logits: sampling parameters do what they do in truth."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from rlalign.config import SamplingParams
from rlalign.verifier.dumps.record import DumpSequence
from rlalign.verifier.score import ScoreSettings, effective_sampling

VOCAB, LENGTH, COUNT = 60, 24, 6
# of the settings that give other logits, how much other
_MOVES = {"weights": 0.1, "config": 0.5, "native": 1e-6, "phase": 1e-6, "batch": 1e-6, "padding": 0.5}
# and of dtypes
_COARSE = {"bfloat16": 0.03, "float16": 0.004}


@dataclass
class Softmax:
    """rounding: what another order of summation does to a logit."""

    rounding: float = 1e-6

    def __call__(self, sequences: Sequence[DumpSequence], settings: ScoreSettings) -> list[np.ndarray]:
        return [self._one(sequence, settings) for sequence in sequences]

    def _one(self, sequence: DumpSequence, settings: ScoreSettings) -> np.ndarray:
        log_p = log_softmax(filtered(self.logits(sequence, settings), effective_sampling(sequence, settings)))
        return log_p[np.arange(len(log_p)), sequence.token_ids].astype(np.float32)

    def logits(self, sequence: DumpSequence, settings: ScoreSettings) -> np.ndarray:
        """float64 [L, V]."""
        found = 2.0 * _normal(sequence.id, "")
        for name, size in _MOVES.items():
            if (value := getattr(settings, name)) != getattr(ScoreSettings(), name):
                size = self.rounding if size == 1e-6 else size
                found = found + size * _normal(sequence.id, f"{name}={sorted(value) if name == 'native' else value}")
        if settings.dtype in _COARSE:
            found = found + _COARSE[settings.dtype] * _normal(sequence.id, settings.dtype)
        return found


def dump(
    scorer: Softmax, params: SamplingParams | None = None, settings: ScoreSettings | None = None
) -> list[DumpSequence]:
    """What an engine with these settings samples with ``params``, which the dump doesn't name."""
    params, settings = params or SamplingParams(), settings or ScoreSettings()
    found = []
    for index in range(COUNT):
        empty = np.zeros(LENGTH, np.int64)
        one = DumpSequence(f"r{index}", np.arange(3), empty, empty.astype(np.float32), source=f"dump:{index}")
        log_p = log_softmax(filtered(scorer.logits(one, settings), params))
        noise = np.random.default_rng(index).gumbel(size=log_p.shape)
        one = replace(one, token_ids=np.argmax(log_p + noise, 1))
        [values] = scorer([replace(one, sampling=params)], settings)
        found.append(replace(one, logprobs=values))
    return found


def filtered(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Temperature, top-k, top-p (the crossing token stays), min-p; -inf for what is left out."""
    if params.greedy:
        return logits
    logits = logits / params.temperature
    order = np.argsort(-logits, 1)
    sorted_p = np.take_along_axis(np.exp(log_softmax(logits)), order, 1)
    keep = np.ones_like(sorted_p, bool)
    if params.top_k:
        keep[:, params.top_k :] = False
    sorted_p = np.where(keep, sorted_p, 0)
    sorted_p /= sorted_p.sum(1, keepdims=True)
    keep &= sorted_p.cumsum(1) - sorted_p < params.top_p
    keep &= sorted_p >= params.min_p * sorted_p[:, :1]
    kept = np.zeros_like(keep)
    np.put_along_axis(kept, order, keep, 1)
    return np.where(kept, logits, -np.inf)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


@cache
def _normal(sequence: str, what: str) -> np.ndarray:
    return np.random.default_rng([zlib.crc32(f"{sequence}/{what}".encode())]).normal(size=(LENGTH, VOCAB))
