"""What must hold of ``linear_logprob`` and ``linear_sample``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from rlalign_kernels.claims.rows import Rows, Run, Tensors, backward_claim, row_claims, schedules_claim
from rlalign_kernels.claims.shapes import Setting, Shapes
from rlalign_kernels.conformance import Claim, Subject, difference, hard_data
from rlalign_kernels.linear_logprob import linear_logprob
from rlalign_kernels.rows import SamplingRows
from rlalign_kernels.sampling import linear_sample

_MOST_ROWS = 257
_SCHEDULED_ROWS = 193
# Ids that are enough to compare schedules by: blocks, groups of them and a tail.
_SCHEDULED_IDS = 40_000
# Products are of twelve decades.
_OCTAVES = 10
_MEAN_SQUARE = sum(4.0**octave for octave in range(-_OCTAVES, _OCTAVES + 1)) / (2 * _OCTAVES + 1)


def subjects(shapes: Shapes, setting: Setting) -> Iterator[Subject]:
    vocab, depth = shapes.head
    for name, claims in (("linear_logprob", _score_claims), ("linear_sample", _draw_claims)):
        yield Subject(name, f"{vocab} ids x {depth}", partial(claims, vocab, depth, setting))


def _problem(vocab: int, depth: int, setting: Setting) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Hidden rows, the weight, row counts. Logits of a few units: larger ones leave a single id to look at."""
    sizes = [n for n in setting.rows if n <= _MOST_ROWS]
    where = {"dtype": setting.dtype, "device": setting.device, "octaves": _OCTAVES}
    # shared by both factors: float16 has room for the octaves of each
    scale = (2 * depth**-0.5 / _MEAN_SQUARE) ** 0.5
    hidden = hard_data(sizes[-1], depth, seed=11, **where) * scale
    weight = hard_data(vocab, depth, seed=12, **where) * scale
    return hidden, weight, sizes


def _settings(num_rows: int, device: torch.device, *, mixed: bool = False, temperature: float = 0.6) -> Tensors:
    """temperature, top_k, top_p, min_p of SamplingRows; ``mixed``: another sampling in every row."""
    index = torch.arange(num_rows, device=device)

    def pick(dtype: torch.dtype, *values: float) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)[index % len(values)]

    if not mixed:
        return (
            pick(torch.float32, temperature), pick(torch.int64, 0), pick(torch.float32, 1.0), pick(torch.float32, 0.0)
        )  # fmt: skip
    return (
        pick(torch.float32, 0.6, 0.0, 1.0, 1.3), pick(torch.int64, 0, 0, 5, 40, 0),
        pick(torch.float32, 1.0, 0.9, 1.0), pick(torch.float32, 0.0, 0.0, 0.02),
    )  # fmt: skip


def _score_claims(vocab: int, depth: int, setting: Setting) -> list[Claim]:
    hidden, weight, sizes = _problem(vocab, depth, setting)
    num_rows, device = hidden.shape[0], setting.device
    targets = torch.arange(num_rows, device=device) * 7919 % vocab

    def score(hidden: torch.Tensor, targets: torch.Tensor, *settings: torch.Tensor) -> Tensors:
        rows = SamplingRows(*settings)
        out = linear_logprob(hidden, weight, targets, rows=rows, backend=setting.backend)
        return out.logprob, out.entropy, out.logsumexp

    claims = row_claims(Rows(score, (hidden, targets, *_settings(num_rows, device))), sizes)
    mixed = Rows(score, (hidden, targets, *_settings(num_rows, device, mixed=True)), poisonable=False)
    claims.append(Claim("truncated", row_claims(mixed, sizes[:5])[0].cases))
    if setting.backend == "triton" and setting.schedules:
        claims.append(_schedules(hidden[:_SCHEDULED_ROWS], weight[:_SCHEDULED_IDS], vocab))
    few = sizes[-1] // 2
    plain = SamplingRows(*_settings(few, device), truncates=False)

    def learn(hidden: torch.Tensor, weight: torch.Tensor) -> Tensors:
        out = linear_logprob(hidden, weight, targets[:few], rows=plain, backend=setting.backend)
        return out.logprob, out.entropy

    claims.append(backward_claim(learn, (hidden[:few], weight)))
    return claims


def _draw_claims(vocab: int, depth: int, setting: Setting) -> list[Claim]:
    hidden, weight, sizes = _problem(vocab, depth, setting)
    num_rows, device = hidden.shape[0], setting.device
    seeds = torch.arange(num_rows, device=device) * 977 + 5

    def draw(hidden: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor, *settings: torch.Tensor) -> Tensors:
        rows = SamplingRows(*settings)
        out = linear_sample(hidden, weight, rows=rows, seeds=seeds, positions=positions, backend=setting.backend)
        return out.token, out.logprob

    positions = torch.arange(num_rows, device=device) % 31
    inputs = (hidden, seeds, positions, *_settings(num_rows, device, mixed=True))
    claims = row_claims(Rows(draw, inputs, poisonable=False), sizes)
    claims.append(Claim("scored", lambda: _drawn_and_scored(draw, inputs, weight, setting)))
    return claims


@torch.no_grad()
def _drawn_and_scored(
    draw: Callable[..., Tensors], inputs: Tensors, weight: torch.Tensor, setting: Setting
) -> Iterator[str | None]:
    """The log-prob of a draw is that of ``linear_logprob``."""
    token, logprob = draw(*inputs)
    for size in (1, len(token)):
        rows = SamplingRows(*(x[:size] for x in inputs[3:]))
        scored = linear_logprob(inputs[0][:size], weight, token[:size], rows=rows, backend=setting.backend).logprob
        yield difference([scored], [logprob[:size]], f"{size} rows, drawn and scored")


def _schedules(hidden: torch.Tensor, weight: torch.Tensor, vocab: int) -> Claim:
    """``weight``: of some of the ``vocab`` ids."""
    from rlalign_kernels import tuned
    from rlalign_kernels.gpu import architecture
    from rlalign_kernels.vocab import space
    from rlalign_kernels.vocab import triton_launches as launches

    head, num_rows = launches.Head.of(weight, None, None), hidden.shape[0]
    settings = launches.Settings(*_settings(num_rows, hidden.device))
    numbers = torch.arange(num_rows, device=hidden.device)

    def run(sample: bool, tile: object = None) -> Tensors:
        drawing = {"seeds": numbers * 977, "positions": numbers} if sample else {}
        return (launches.scan(hidden, head, settings, None, tile=tile, **drawing),)

    def table(sample: bool) -> tuple[Run, list[tuple[object, Run]]]:
        where = hidden.dtype, architecture(hidden.device)
        tiles = dict.fromkeys([*space.table(*where, sample), *tuned.head_tiles(vocab, hidden.shape[1], *where, sample)])
        return partial(run, sample), [(tile, partial(run, sample, tile)) for tile in tiles]

    return schedules_claim(table(False), table(True))
