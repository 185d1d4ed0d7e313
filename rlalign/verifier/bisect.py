"""Where do two settings of one model part? Their recorded outputs, site by site, from the embedding to the log-prob.

A site is one module's output (or attention's input) in the order in which the model computes them. Recordings come as
an iterable of pairs, so that only one pair need be in memory at a time. Legend: T tokens, F features, S sites.

All sites before the first one that differs have equal bits, so the operator found is the one that made the difference,
not one that passed it on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlalign.verifier.compare import ulp_distance
from rlalign.verifier.words import counted

# bfloat16 values are the float32 values whose last 16 bits are zero
_FLOAT32_PER_ULP = {"float32": 1, "bfloat16": 1 << 16, "float16": 1 << 13}


@dataclass(frozen=True, slots=True)
class Site:
    """One output of the model. layer: None outside the decoder layers. module: its path, such as model.norm."""

    order: int
    layer: int | None
    module: str
    operator: str

    @classmethod
    def of(cls, order: int, module: str, operator: str, count: int, layer: int | None) -> Site:
        """count: how often the module ran before in the same forward; its second run is a site of its own."""
        return cls(order, layer, module if count == 0 else f"{module} (call {count + 1})", operator)

    def __str__(self) -> str:
        where = "" if self.layer is None else f"layer {self.layer}, "
        return f"{where}{self.module} ({self.operator})"


@dataclass(frozen=True, slots=True)
class Recording:
    """values: float32 [T, F], a row per token, in an order that both sides share. dtype: what they were computed in."""

    site: Site
    values: np.ndarray
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class SiteDifference:
    """Both sides' outputs at one site.

    differing: elements whose bits differ, of ``elements``. max_abs: inf where only one side is finite. max_ulp: in the
    coarser of the two dtypes, over what is finite. token_abs: float64 [T], largest difference of each token's row.
    token: first row that differs, -1 if none does. first: (a, b), its first differing values.
    """

    site: Site
    elements: int
    differing: int
    nonfinite: int
    max_abs: float
    max_ulp: int
    token_abs: np.ndarray
    tokens_differing: int
    token: int
    first: tuple[float, float]

    @property
    def share(self) -> float:
        return self.differing / self.elements if self.elements else 0.0


@dataclass(frozen=True, slots=True)
class Tokens:
    """Which token each row is: sequence, position (in the sequence) and token_id, int64 [T]. names: of the sequences,
    for people; () where they have none but their number."""

    sequence: np.ndarray
    position: np.ndarray
    token_id: np.ndarray
    names: tuple[str, ...] = ()

    def place(self, row: int) -> str:
        """Sequence and position in words."""
        number = int(self.sequence[row])
        return f"sequence {self.names[number] if self.names else number} position {self.position[row]}"


@dataclass(frozen=True, slots=True)
class Bisection:
    """Every site's difference, in the model's order."""

    sites: tuple[SiteDifference, ...]
    tokens: Tokens

    @property
    def first(self) -> SiteDifference | None:
        """The site where the two sides part; None if they never do."""
        return next((site for site in self.sites if site.differing), None)

    @property
    def equal(self) -> bool:
        return bool(self.sites) and self.first is None

    @property
    def depth(self) -> tuple[SiteDifference, ...]:
        """One site per station on the way up: what each layer hands on, and what lies before and after the layers."""
        last_of = {d.site.layer: d.site.order for d in self.sites if d.site.layer is not None}
        return tuple(d for d in self.sites if d.site.layer is None or last_of[d.site.layer] == d.site.order)

    def heat_map(self) -> np.ndarray:
        """float64 [stations of ``depth``, T]: largest absolute difference of each token."""
        rows = [d.token_abs for d in self.depth]
        return np.stack(rows) if rows else np.zeros((0, len(self.tokens.sequence)))

    @property
    def verdict(self) -> str:
        """One line: where, by how much, and what becomes of it."""
        if not self.sites:
            return "nothing was compared: there is no token"
        first, last = self.first, self.sites[-1]
        count = f"{counted(len(self.sites), 'output')} of {counted(len(self.tokens.sequence), 'token')}"
        if first is None:
            return f"bit for bit equal at all {count}"
        place = self.tokens.place(first.token)
        return (
            f"first difference at {first.site}, {place}: {first.differing:,} of {first.elements:,} elements differ, by "
            f"at most {first.max_ulp:,} ULP (max |Δ| {first.max_abs:.3g}); at {last.site.module} max |Δ| is "
            f"{last.max_abs:.3g}, {last.tokens_differing:,} of {len(last.token_abs):,} tokens differ"
        )

    def record(self) -> dict[str, Any]:
        """Everything as plain values, the heat map's data included."""
        first = self.first
        return {
            "equal": self.equal,
            "verdict": self.verdict,
            "first": None if first is None else _plain(first, self.tokens),
            "depth": [_plain(d, self.tokens) for d in self.depth],
            "sites": [_plain(d, self.tokens) for d in self.sites],
            "heat_map": {
                "stations": [d.site.module for d in self.depth],
                "sequence": self.tokens.sequence.tolist(),
                "position": self.tokens.position.tolist(),
                "token_id": self.tokens.token_id.tolist(),
                "max_abs": self.heat_map().tolist(),
            },
        }


def bisect(pairs: Iterable[tuple[Recording, Recording]], tokens: Tokens) -> Bisection:
    """Compare recordings pair by pair, in the order given, which must be the model's.

    Raises ValueError if a pair's sites, shapes or number of rows are not the same.
    """
    return Bisection(tuple(compare_site(a, b, len(tokens.sequence)) for a, b in pairs), tokens)


def compare_site(a: Recording, b: Recording, num_tokens: int) -> SiteDifference:
    """One pair of recordings. Raises ValueError if they are not of the same site, shape and number of tokens."""
    if (a.site.module, a.site.operator) != (b.site.module, b.site.operator):
        raise ValueError(f"recordings of two sites are compared: {a.site} and {b.site}")
    for side in (a, b):
        if side.values.dtype != np.float32 or side.values.ndim != 2 or len(side.values) != num_tokens:
            what = f"{side.values.dtype} of shape {side.values.shape}"
            raise ValueError(f"{side.site}: a recording is float32 [{num_tokens}, F], this one is {what}")
        if side.dtype not in _FLOAT32_PER_ULP:
            raise ValueError(f"{side.site}: dtype {side.dtype!r} is not supported; use {sorted(_FLOAT32_PER_ULP)}")
    if a.values.shape != b.values.shape:
        raise ValueError(f"{a.site}: shape {a.values.shape} on one side, {b.values.shape} on the other")
    return _difference(a, b)


def _difference(a: Recording, b: Recording) -> SiteDifference:
    differs = a.values.view(np.int32) != b.values.view(np.int32)
    finite = np.isfinite(a.values) & np.isfinite(b.values)
    size = np.zeros(differs.shape, np.float64)
    np.subtract(a.values, b.values, out=size, where=finite, dtype=np.float64)
    np.abs(size, out=size)
    size[differs & ~finite] = np.inf
    unit = max(_FLOAT32_PER_ULP[a.dtype], _FLOAT32_PER_ULP[b.dtype])
    # a distance between two dtypes need not be whole: rounded up, so that 0 means equal and nothing else
    ulp = -(-ulp_distance(a.values, b.values)[differs & finite] // unit)
    rows = differs.any(axis=1)
    token = int(rows.argmax()) if rows.any() else -1
    element = int(differs[token].argmax()) if token >= 0 else -1
    return SiteDifference(
        site=a.site,
        elements=differs.size,
        differing=int(differs.sum()),
        nonfinite=int((~finite).sum()),
        max_abs=float(size.max(initial=0.0)),
        max_ulp=int(ulp.max(initial=0)),
        token_abs=size.max(axis=1, initial=0.0),
        tokens_differing=int(rows.sum()),
        token=token,
        first=(float(a.values[token, element]), float(b.values[token, element])) if token >= 0 else (np.nan, np.nan),
    )


def _plain(difference: SiteDifference, tokens: Tokens) -> dict[str, Any]:
    row = difference.token
    return {
        "layer": difference.site.layer,
        "module": difference.site.module,
        "operator": difference.site.operator,
        "elements": difference.elements,
        "differing": difference.differing,
        "share": difference.share,
        "nonfinite": difference.nonfinite,
        "max_abs": difference.max_abs,
        "max_ulp": difference.max_ulp,
        "tokens_differing": difference.tokens_differing,
        "sequence": int(tokens.sequence[row]) if row >= 0 else None,
        "position": int(tokens.position[row]) if row >= 0 else None,
        "a": difference.first[0] if row >= 0 else None,
        "b": difference.first[1] if row >= 0 else None,
    }
