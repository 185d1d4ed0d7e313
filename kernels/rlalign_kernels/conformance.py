"""What this process may do without changing a bit: measured verdicts, cached; and what every operator must do.

A plan's *defining* schedule is always available. A faster schedule (a taller row tile, a batched product, an unblocked
``exp``) is used for exactly those shapes for which a probe on random data has found it bitwise equal here. Verdicts
depend on the machine's libraries and thread count, hence live per process and are no part of the fingerprint.

A ``Subject`` is an operator at one shape with what must hold of its bits (``claims/`` has them all); ``examine`` looks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


class Conformance:
    """Verdicts by key; a missing one is measured at first use.

    Keys are tuples that start with the kind of probe and name everything the verdict may depend on.
    """

    def __init__(self) -> None:
        self._verdicts: dict[tuple[Any, ...], Any] = {}
        self._notes: dict[str, Any] = {}

    def note(self, name: str, value: Any) -> None:
        """Something else about the schedules of this process that ``report`` should say; JSON-ready."""
        self._notes[name] = value

    def get(self, key: tuple[Any, ...], probe: Callable[[], Any]) -> Any:
        """Verdict for ``key`` at the current thread count; ``probe`` measures it once."""
        full = (*key, torch.get_num_threads())
        found = self._verdicts.get(full)
        if found is None:
            with torch.no_grad():
                found = self._verdicts[full] = probe()
        return found

    def report(self) -> dict[str, Any]:
        """Verdicts as a JSON-ready dict, for ``summary.json``."""
        verdicts = {",".join(str(part) for part in key): _plain(value) for key, value in self._verdicts.items()}
        return verdicts | self._notes

    def clear(self) -> None:
        """Forgets verdicts; notes stay."""
        self._verdicts.clear()


def _plain(value: Any) -> Any:
    return value.report() if hasattr(value, "report") else value


@dataclass(frozen=True)
class Claim:
    """Something that must hold bit for bit. ``cases`` looks: None per case that holds, else what differs."""

    name: str
    cases: Callable[[], Iterable[str | None]]


@dataclass(frozen=True)
class Subject:
    """An operator at one shape; ``claims`` makes its data, and what must hold of its bits."""

    operator: str
    shape: str
    claims: Callable[[], Iterable[Claim]]


@dataclass(frozen=True)
class Verdict:
    """What looking at one claim came to.

    holds: None where the operator is not there on this backend, or nothing was looked at. found: the first difference,
    or the error that kept the operator from running; where holds is None, why. num_differing: of ``num_cases``.
    """

    operator: str
    shape: str
    claim: str
    holds: bool | None
    num_cases: int = 0
    num_differing: int = 0
    found: str = ""
    seconds: float = 0.0


def examine(subject: Subject) -> Iterator[Verdict]:
    """One verdict per claim. An operator that is not there is said so; one that can't run does not hold."""
    name, shape = subject.operator, subject.shape
    try:
        claims = list(subject.claims())
    except NotImplementedError as error:
        yield Verdict(name, shape, "runs", None, found=_first_line(error))
        return
    except Exception as error:  # whatever keeps an operator from running here is what the caller asked for
        yield Verdict(name, shape, "runs", False, 1, 1, f"{type(error).__name__}: {_first_line(error)}")
        return
    for claim in claims:
        yield _verdict(name, shape, claim)


def _verdict(operator: str, shape: str, claim: Claim) -> Verdict:
    begin, num_cases, differing, failed = time.perf_counter(), 0, [], 0
    try:
        for found in claim.cases():
            num_cases += 1
            differing += [] if found is None else [found]
    except NotImplementedError as error:
        return Verdict(operator, shape, claim.name, None, found=_first_line(error))
    except Exception as error:
        failed, differing = 1, [*differing, f"{type(error).__name__}: {_first_line(error)}"]
    seconds, found = time.perf_counter() - begin, differing[0] if differing else ""
    holds = not differing if num_cases + failed else None
    return Verdict(operator, shape, claim.name, holds, num_cases + failed, len(differing), found, seconds)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bitwise equality of shape, dtype and content: ±0 and NaN payloads told apart."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def _bits(x: torch.Tensor) -> torch.Tensor:
    x = x.detach().contiguous()
    return x.view(_INTEGERS[x.element_size()]) if x.is_floating_point() else x


_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def difference(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor], where: str) -> str | None:
    """None if all are the same bits; else ``where``, how many numbers differ and by how much."""
    for one, other in zip(found, expected, strict=True):
        if same_bits(one, other):
            continue
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"{where}: {one.dtype} {tuple(one.shape)} and {other.dtype} {tuple(other.shape)}"
        unequal = _bits(one) != _bits(other)
        a, b = one.detach()[unequal].double(), other.detach()[unequal].double()
        gap = float(((a - b).abs() / torch.maximum(a.abs(), b.abs())).max())
        return f"{where}: {int(unequal.sum()):,} of {one.numel():,} numbers differ by up to {gap:.1g}, relative"
    return None


def probe_data(*shape: int, seed: int) -> torch.Tensor:
    """float32 normal values over six decades of scale: sums of them round at nearly every step."""
    return hard_data(*shape, seed=seed)


def hard_data(
    *shape: int, seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", octaves: int = 10
) -> torch.Tensor:
    """Normal values times a power of two from 2^-octaves to 2^octaves; made on ``device``, rounded to ``dtype``."""
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.randn(shape, generator=generator, device=device)
    if octaves:
        exponents = torch.randint(-octaves, octaves + 1, shape, generator=generator, device=device)
        values = values * torch.exp2(exponents.float())
    return values.to(dtype)


CONFORMANCE = Conformance()
