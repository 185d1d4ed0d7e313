"""Faults of an engine, planted in dumps, with the name that ``attribute`` must give each: the same on CPU and GPU.

The dumps are of a policy that is passed in, an engine that isn't ours for instance; scoring is another one's. Legend: L
response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlalign.cli.policies import Policies
from rlalign.cli.scoring import PolicyScorer
from rlalign.config import SamplingParams
from rlalign.engine import Engine
from rlalign.modeling import PackedContext, Policy, load_policy
from rlalign.verifier.attribution import Attribution
from rlalign.verifier.dumps import MISSING, DumpSequence
from rlalign.verifier.score import OPERATORS, ScoreSettings
from support.models import tiny_model

PROMPTS = ([3, 14, 15, 9], [2, 71, 82, 8, 18, 28], [1, 61, 80, 33, 9, 88, 7], [57, 72])
COOL = SamplingParams(temperature=0.7, top_p=0.8, max_tokens=12, seed=3)
PLAIN = SamplingParams(max_tokens=12, seed=3)


def save_models(path: Path) -> Path:
    """``model`` and ``older`` (one step behind) are checkpoints below ``path``."""
    model = tiny_model("qwen3")
    model.save_pretrained(path / "model")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 1e-3)
    model.save_pretrained(path / "older")
    return path


def engine_dump(policy: Policy, params: SamplingParams) -> list[DumpSequence]:
    """What our engine samples from ``PROMPTS`` with any policy."""
    groups = Engine(policy, None).generate(PROMPTS, replace(params, raw_logprobs=True))
    return [
        DumpSequence(
            str(i), np.array(prompt), c.token_ids, c.logprobs, sampling=params, processed=True, source=f"dump:{i}"
        )
        for i, (prompt, [c]) in enumerate(zip(PROMPTS, groups, strict=True))
    ]


@torch.no_grad()
def logits_of(policy: Policy, sequence: DumpSequence, *, pads: int = 0, shift: int = 0, late: int = 0) -> torch.Tensor:
    """float32 [L, V] of the response's rows, by a forward of this file's own."""
    ids = [0] * pads + sequence.prompt_token_ids.tolist() + sequence.token_ids.tolist()
    first, device = pads + len(sequence.prompt_token_ids), policy.device
    positions = torch.arange(len(ids), device=device) + shift
    positions[first:] += late
    context = PackedContext(torch.tensor([0, len(ids)], dtype=torch.int32, device=device))
    hidden = policy.hidden(torch.tensor(ids, device=device), positions, context)
    return hidden[first - 1 : -1] @ policy.head.weight.T


def relabel(dump: Sequence[DumpSequence], score: Callable[[DumpSequence], torch.Tensor]) -> list[DumpSequence]:
    """The dump with log-softmax of ``score``'s logits at the sampled tokens."""
    made = []
    for sequence in dump:
        values = torch.log_softmax(score(sequence).float(), -1)
        ids = torch.from_numpy(sequence.token_ids).to(values.device)
        picked = values.gather(1, ids[:, None])[:, 0]
        made.append(replace(sequence, logprobs=picked.cpu().numpy().astype(np.float32)))
    return made


class Remembering:
    """The scorer, which is asked the same of the same tokens by most tests; it never looks at the log-probs."""

    def __init__(self, scorer: PolicyScorer) -> None:
        self.policies, self._scorer, self._known = scorer.policies, scorer, {}

    def __call__(self, sequences: Sequence[DumpSequence], settings: ScoreSettings) -> list[np.ndarray]:
        asked = [(s.prompt_token_ids.tobytes(), s.token_ids.tobytes(), s.sampling, s.processed) for s in sequences]
        key = (settings, *asked)
        if key not in self._known:
            self._known[key] = self._scorer(sequences, settings)
        return self._known[key]


@dataclass(frozen=True)
class Stand:
    """An engine with its dumps: ``plain`` at temperature 1, ``cool`` at 0.7 and top-p 0.8."""

    folder: Path
    policy: Policy
    plain: list[DumpSequence]
    cool: list[DumpSequence]

    @classmethod
    def of(cls, folder: Path, **options: Any) -> Stand:
        """options: of ``load_policy``."""
        policy = load_policy(folder / "model", **options)
        return cls(folder, policy, engine_dump(policy, PLAIN), engine_dump(policy, COOL))


def _other_config(stand: Stand, name: str, value: float) -> list[DumpSequence]:
    native = OPERATORS if stand.policy.backend == "native" else ()
    policies = Policies([stand.folder / "model"], "float32", stand.policy.device.type)
    with policies.using(ScoreSettings(config=((name, value),), native=native)) as policy:
        return relabel(stand.plain, lambda one: logits_of(policy, one))


def _swapped(stand: Stand) -> list[DumpSequence]:
    a, b, c, d = stand.plain
    return [a, replace(b, logprobs=c.logprobs), replace(c, logprobs=b.logprobs), d]


def _older(stand: Stand) -> list[DumpSequence]:
    numerics = "native" if stand.policy.backend == "native" else "invariant"
    older = load_policy(stand.folder / "older", numerics=numerics, device=stand.policy.device.type)
    return relabel(stand.plain, lambda one: logits_of(older, one))


def _one_padded(stand: Stand) -> list[DumpSequence]:
    """One row of the batch, as long as the longest prompt, whose padding attention sees."""
    longest = max(len(prompt) for prompt in PROMPTS)
    padded = relabel(stand.plain, lambda s: logits_of(stand.policy, s, pads=longest - len(s.prompt_token_ids)))
    return [*stand.plain[:3], padded[3]]


# fault: (how it is planted, the name of its cause)
FAULTS: dict[str, tuple[Callable[[Stand], list[DumpSequence]], str]] = {
    "a shifted token index": (
        lambda s: [replace(one, logprobs=np.roll(one.logprobs, -1)) for one in s.plain], "shifted_index[+1]",
    ),
    "a swapped pair of sequences": (_swapped, "swapped_sequences"),
    "off-by-one position ids": (
        lambda s: relabel(s.plain, lambda one: logits_of(s.policy, one, late=1)), "response_positions[+1]",
    ),
    "stale weights by one step": (_older, "stale_weights[1]"),
    "temperature not applied": (
        lambda s: relabel([replace(one, sampling=replace(COOL, top_p=1.0)) for one in s.cool],
                          lambda one: logits_of(s.policy, one)), "temperature",
    ),
    "top-p not renormalised": (lambda s: relabel(s.cool, lambda one: logits_of(s.policy, one) / 0.7), "top_p"),
    "a padded row": (_one_padded, "padding.left"),
    "bf16 logits": (
        lambda s: relabel(s.plain, lambda one: logits_of(s.policy, one).bfloat16()), "logits.bfloat16",
    ),
    "another RoPE base": (
        lambda s: _other_config(s, "rope_parameters.rope_theta", 1e6), "config.rope_parameters.rope_theta=1000000.0",
    ),
}  # fmt: skip


def found_name(found: Attribution) -> str:
    """The cause that was kept first; what comes behind it must be arithmetic."""
    assert found.steps, found.verdict
    assert all(step.cause.kind == "numerics" for step in found.steps[1:]), found.verdict
    return found.steps[0].cause.name


def damaged(dump: Sequence[DumpSequence], kind: str) -> list[DumpSequence]:
    """The dump with the sixth log-prob of its second sequence one ULP lower, missing, NaN or -inf."""
    values = dump[1].logprobs.copy()
    values[5] = {
        "one ULP": np.nextafter(values[5], np.float32(-np.inf)), "missing": MISSING, "NaN": np.nan, "-inf": -np.inf,
    }[kind]  # fmt: skip
    return [dump[0], replace(dump[1], logprobs=values), *dump[2:]]
