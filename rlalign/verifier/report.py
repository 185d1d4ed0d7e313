"""What a person reads about a comparison: a one-line verdict and the worst tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from rlalign.records import Sample
from rlalign.verifier.compare import Comparison
from rlalign.verifier.words import counted, shown_ulp

Kind = Literal["differs", "nonfinite", "missing"]
_CONTEXT_TOKENS = 6


@dataclass(frozen=True, slots=True)
class WorstToken:
    """One token on which rollout and trainer disagree, with what one needs to find it again.

    key: (step, prompt, sample). position: in the response. delta: train - rollout, NaN unless kind is "differs".
    ulp: -1 unless kind is "differs". sequence_length: prompt and response. batch_size: sequences in the forward that
    drew the token, -1 when the engine did not say.
    """

    kind: Kind
    key: tuple[int, int, int]
    position: int
    token_id: int
    context: str
    rollout: float
    train: float
    delta: float
    ulp: int
    sequence_length: int
    batch_size: int
    weights_version: int
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Report:
    """Outcome of one comparison, small enough to travel inside an exception."""

    num_tokens: int
    num_samples: int
    mismatch_count: int
    nonfinite_count: int
    max_abs_delta: float
    worst: tuple[WorstToken, ...]
    beyond: tuple[str, ...] = ()
    """What differs besides the sampled tokens' log-probs, a line each: all logits, outputs of layers."""

    @property
    def equal(self) -> bool:
        return self.num_tokens > 0 and self.mismatch_count == 0 and self.nonfinite_count == 0 and not self.beyond

    @property
    def verdict(self) -> str:
        """One line: what was compared, and where it is worst."""
        if self.num_tokens == 0:
            return "nothing was compared: no sample has a response token"
        return "; ".join([self._tokens_verdict, *self.beyond])

    @property
    def _tokens_verdict(self) -> str:
        if self.mismatch_count == self.nonfinite_count == 0:
            size = f"{counted(self.num_tokens, 'token')} of {counted(self.num_samples, 'sample')}"
            return f"rollout and trainer agree bit for bit on {size}"
        line = (
            f"rollout and trainer differ on {self.mismatch_count:,} of {self.num_tokens:,} tokens "
            f"({self.nonfinite_count:,} non-finite or missing), max |Δlogp| {self.max_abs_delta:.3g}"
        )
        return f"{line}; worst: {_where(self.worst[0])}" if self.worst else line

    def table(self) -> Table:
        """Rich table of the worst tokens, two lines each; readable from 80 columns on."""
        title = f"Worst {len(self.worst)} of {counted(self.mismatch_count, 'differing token')}"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in ("step/prompt\n/sample", "pos"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("token in context", overflow="fold", ratio=1)
        for name in ("rollout\ntrain", "Δ\nULP"):
            table.add_column(name, justify="right", no_wrap=True)
        for token in self.worst:
            table.add_row(*_cells(token))
        return table


def _cells(token: WorstToken) -> tuple[str, ...]:
    batch = "batch unknown" if token.batch_size < 0 else f"batch of {token.batch_size}"
    details = f"of {token.sequence_length}, {batch}, weights {token.weights_version}, {token.finish_reason}"
    differs = token.kind == "differs"
    return (
        "/".join(map(str, token.key)),
        str(token.position),
        f"{escape(token.context)}\n[dim]{details}[/dim]",
        # float32 needs nine digits to be told apart from its neighbours
        f"{token.rollout:.9g}\n{token.train:.9g}",
        f"{token.delta:+.2e}\n{shown_ulp(token.ulp)}" if differs else token.kind,
    )


def build_report(
    comparison: Comparison,
    samples: Sequence[Sample],
    *,
    worst_tokens: int = 10,
    decode: Callable[[Sequence[int]], str] | None = None,
) -> Report:
    """Report of a comparison of ``samples``, given in the order of the comparison's pairs.

    decode: token ids to text; without it the context shows ids. Raises ValueError if the counts disagree.
    """
    if comparison.num_samples != len(samples):
        raise ValueError(f"comparison holds {comparison.num_samples} samples, got {len(samples)}")
    worst = [_worst_token(comparison, int(i), samples, decode or _ids) for i in worst_first(comparison)[:worst_tokens]]
    return Report(
        num_tokens=comparison.num_tokens,
        num_samples=comparison.num_samples,
        mismatch_count=comparison.mismatch_count,
        nonfinite_count=comparison.nonfinite_count,
        max_abs_delta=comparison.max_abs_delta,
        worst=tuple(worst),
    )


def worst_first(comparison: Comparison) -> np.ndarray:
    """Flat indices, int64, of the tokens that differ or are not finite: missing, non-finite, then by |delta| and ULP.

    Ties keep the order of the samples, so the same comparison always gives the same list.
    """
    bad = np.flatnonzero(comparison.mismatch | comparison.nonfinite)
    if not len(bad):
        return bad
    size = np.where(comparison.nonfinite[bad], np.inf, np.abs(comparison.delta[bad].astype(np.float64)))
    order = np.lexsort((-comparison.ulp[bad], -size, ~comparison.missing[bad]))
    return bad[order]


def record(token: WorstToken) -> dict[str, Any]:
    """The token as a flat dict of JSON's own types: what tables, files and dashboards show."""
    values = {name: getattr(token, name) for name in WorstToken.__slots__}
    return values | {"key": "/".join(map(str, token.key))}


def _worst_token(
    comparison: Comparison, i: int, samples: Sequence[Sample], decode: Callable[[Sequence[int]], str]
) -> WorstToken:
    sample = samples[int(comparison.sample[i])]
    completion, position = sample.completion, int(comparison.position[i])
    kind: Kind = "missing" if comparison.missing[i] else "nonfinite" if comparison.nonfinite[i] else "differs"
    in_response = position < len(completion.token_ids)
    return WorstToken(
        kind=kind,
        key=sample.key,
        position=position,
        token_id=int(completion.token_ids[position]) if in_response else -1,
        context=_context(sample, position, decode),
        rollout=float(comparison.rollout[i]),
        train=float(comparison.train[i]),
        delta=float(comparison.delta[i]),
        ulp=int(comparison.ulp[i]),
        sequence_length=sample.num_tokens,
        batch_size=int(completion.batch_sizes[position]) if position < len(completion.batch_sizes) else -1,
        weights_version=completion.weights_version,
        finish_reason=completion.finish_reason,
    )


def _context(sample: Sample, position: int, decode: Callable[[Sequence[int]], str]) -> str:
    """The token between brackets, with a few tokens on either side; newlines made visible."""
    ids = [int(i) for i in (*sample.completion.prompt_ids, *sample.completion.token_ids)]
    at = len(sample.completion.prompt_ids) + position
    parts = (ids[max(0, at - _CONTEXT_TOKENS) : at], ids[at : at + 1], ids[at + 1 : at + 1 + _CONTEXT_TOKENS])
    before, token, after = (decode(part) if part else "" for part in parts)
    return f"{before}⟦{token}⟧{after}".replace("\n", "⏎")


def _ids(token_ids: Sequence[int]) -> str:
    return f" {' '.join(map(str, token_ids))} "


def _where(token: WorstToken) -> str:
    step, prompt, sample = token.key
    what = f"Δ {token.delta:+.3g} ({token.ulp:,} ULP)" if token.kind == "differs" else token.kind
    place = f"step {step} prompt {prompt} sample {sample} position {token.position}"
    return f"{place}, token {token.token_id} in {token.context!r}: {what}"
