"""What must hold of every operator whose rows stand alone: said once, for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from rlalign_kernels.conformance import Claim, difference

Tensors = tuple[torch.Tensor, ...]
Run = Callable[[], Tensors]
_REPEATS = 3


@dataclass(frozen=True)
class Rows:
    """An operator as a function of its rows: ``call(*inputs)``, the first axis of each input and output being the row.

    The first input may hold NaN in other rows, unless ``poisonable`` is False.
    """

    call: Callable[..., Tensors]
    inputs: Tensors
    poisonable: bool = True

    def part(self, rows: slice) -> Tensors:
        return self.call(*(x[rows] for x in self.inputs))


def row_claims(operator: Rows, sizes: Sequence[int]) -> list[Claim]:
    """A row alone is the row among others, whatever those hold."""
    claims = [Claim("rows", lambda: _alone_and_among_others(operator, sizes))]
    if operator.poisonable:
        claims.append(Claim("neighbours", lambda: _beside_anything(operator, sizes)))
    return claims


@torch.no_grad()
def _alone_and_among_others(operator: Rows, sizes: Sequence[int]) -> Iterator[str | None]:
    """First, middle and last row of batches of ``sizes``, against each of them alone."""
    alone: dict[int, Tensors] = {}
    for size in sizes:
        batch = operator.part(slice(size))
        for row in sorted({0, size // 2, size - 1}):
            if row not in alone:
                alone[row] = operator.part(slice(row, row + 1))
            found = [x[row : row + 1] for x in batch]
            yield difference(found, alone[row], f"row {row} alone and in {size} rows")


@torch.no_grad()
def _beside_anything(operator: Rows, sizes: Sequence[int]) -> Iterator[str | None]:
    """Every second row holds NaN, or infinities: the others are as they were."""
    size = next((n for n in sizes if n > 16), sizes[-1])
    expected = [x[::2] for x in operator.part(slice(size))]
    for poison in (torch.nan, torch.inf):
        first, *rest = (x[:size] for x in operator.inputs)
        hostile = first.clone()
        hostile[1::2] = poison
        found = [x[::2] for x in operator.call(hostile, *rest)]
        yield difference(found, expected, f"{size} rows, every second of them {poison}")


def backward_claim(run: Callable[..., torch.Tensor | Tensors], inputs: Sequence[torch.Tensor]) -> Claim:
    """The gradients of ``run(*inputs)`` in every input, for a random cotangent, are the same again and again."""

    def cases() -> Iterator[str | None]:
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        out = run(*leaves)
        out = [out] if isinstance(out, torch.Tensor) else list(out)
        generator = torch.Generator(inputs[0].device).manual_seed(91)
        cotangents = [torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype) for x in out]
        first = torch.autograd.grad(out, leaves, cotangents)
        for time in range(1, _REPEATS):
            again = run(*leaves)
            again = [again] if isinstance(again, torch.Tensor) else list(again)
            found = torch.autograd.grad(again, leaves, cotangents)
            yield difference(found, first, f"gradients, run {time + 1} and run 1")

    return Claim("backward", cases)


def schedules_claim(*tables: tuple[Run, Sequence[tuple[object, Run]]]) -> Claim:
    """In each table, a run of the chosen schedule and (schedule, run) of all others: all give the same bits.

    One that needs more shared memory than this GPU's processors have is no schedule here.
    """

    @torch.no_grad()
    def cases() -> Iterator[str | None]:
        for chosen, others in tables:
            expected = chosen()
            for schedule, run in others:
                try:
                    found = run()
                except Exception as error:
                    if type(error).__name__ != "OutOfResources":
                        raise
                    continue
                yield difference(found, expected, f"{schedule} and the chosen schedule")

    return Claim("schedules", cases)
