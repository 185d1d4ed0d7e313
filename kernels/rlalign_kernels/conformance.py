"""What this process may do without changing a bit: measured verdicts, cached.

A plan's *defining* schedule is always available. A faster schedule (a taller row tile, a batched product, an unblocked
``exp``) is used for exactly those shapes for which a probe on random data has found it bitwise equal here. Verdicts
depend on the machine's libraries and thread count, hence live per process and are no part of the fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Conformance:
    """Verdicts by key; a missing one is measured at first use.

    Keys are tuples that start with the kind of probe and name everything the verdict may depend on.
    """

    def __init__(self) -> None:
        self._verdicts: dict[tuple[Any, ...], Any] = {}

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
        return {",".join(str(part) for part in key): _plain(value) for key, value in self._verdicts.items()}

    def clear(self) -> None:
        self._verdicts.clear()


def _plain(value: Any) -> Any:
    return value.report() if hasattr(value, "report") else value


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bitwise equality of two float32 tensors: ±0 and NaN payloads told apart."""
    return torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def probe_data(*shape: int, seed: int) -> torch.Tensor:
    """float32 normal values over six decades of scale: sums of them round at nearly every step."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return values * torch.exp2(torch.randint(-10, 11, shape, generator=generator).float())


CONFORMANCE = Conformance()
