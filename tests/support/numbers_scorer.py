"""A scorer made of numbers, and dumps of it: what each switch of scoring does is known, and no model is needed."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from rlalign.config import SamplingParams
from rlalign.verifier import causes as catalogue
from rlalign.verifier.attribute import attribute
from rlalign.verifier.attribution import Attribution
from rlalign.verifier.causes import Cause
from rlalign.verifier.dumps.record import DumpSequence
from rlalign.verifier.score import ScoreSettings, UnsupportedSetting, effective_sampling

LENGTHS = (20, 17, 20, 12)
SAMPLING = SamplingParams(temperature=0.7, top_k=20, top_p=0.9, min_p=0.1)
BASE = ScoreSettings()
CONFIG = [("rope_theta", 5e5, "a common value"), ("rms_norm_eps", 1e-5, "as previous model 1")]
# how far a switch moves a log-prob, at most
_SIZE = {
    "native": 1e-4,
    "logits": 1e-2,
    "dtype": 1e-3,
    "batch": 1e-5,
    "phase": 1e-5,
    "chunk": 1e-5,
    "position_offset": 1e-4,
}


class Numbers:
    """Log-probs that are a hash of the sequence, plus another for each switch: no setting gives what another does."""

    def __init__(self, refuses: Sequence[str] = ()) -> None:
        self.refuses = refuses
        self.calls: list[ScoreSettings] = []

    def __call__(self, sequences: Sequence[DumpSequence], settings: ScoreSettings) -> list[np.ndarray]:
        self.calls.append(settings)
        for name in self.refuses:
            if getattr(settings, name) != getattr(BASE, name):
                raise UnsupportedSetting(f"no {name} here")
        return [self._one(sequence, settings) for sequence in sequences]

    def _one(self, sequence: DumpSequence, settings: ScoreSettings) -> np.ndarray:
        length = len(sequence.token_ids)
        found = noise(sequence.id, "", length) * 3 - 40
        params = effective_sampling(sequence, settings)
        for name in ("temperature", "top_k", "top_p", "min_p"):
            if (value := getattr(params, name)) != getattr(SamplingParams(), name):
                # as a smooth function of the value, so that a temperature can be fitted
                found = found + noise(sequence.id, name, length) * (float(value) - getattr(SamplingParams(), name))
        for name in settings.__dataclass_fields__:
            value = getattr(settings, name)
            if name in ("processed", "ignore", "temperature", "slack") or value == getattr(BASE, name):
                continue
            shown = "+".join(sorted(value)) if isinstance(value, frozenset) else str(value)
            found = found + noise(sequence.id, f"{name}={shown}", length) * _SIZE.get(name, 1.0)
        return found.astype(np.float32)


@cache
def noise(sequence: str, what: str, length: int) -> np.ndarray:
    return np.random.default_rng([zlib.crc32(f"{sequence}/{what}".encode())]).uniform(-1, 1, length)


def sequences(sampling: SamplingParams | None = SAMPLING) -> list[DumpSequence]:
    return [
        DumpSequence(str(i), np.arange(3), np.arange(n), np.zeros(n, np.float32), sampling=sampling, source=f"d:{i}")
        for i, n in enumerate(LENGTHS)
    ]


def reported(found: Sequence[DumpSequence], logprobs: Sequence[np.ndarray]) -> list[DumpSequence]:
    return [replace(s, logprobs=values.astype(np.float32)) for s, values in zip(found, logprobs, strict=True)]


def planted(*causes: Cause, sampling: SamplingParams | None = SAMPLING) -> list[DumpSequence]:
    """A dump whose log-probs are those of scoring with these causes."""
    found = sequences(sampling)
    way = catalogue.Way()
    for cause in causes:
        way = cause.change(way, 0)
    return reported(found, Numbers()(found, way.settings))


def run(dump: Sequence[DumpSequence], **options: object) -> Attribution:
    given = {"dtype": "float32", "num_previous": 2, "config_changes": CONFIG} | options
    return attribute(dump, Numbers(), **given)
