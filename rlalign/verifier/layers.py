"""Which layer's output differs first between rollout and trainer, found from digests, measured on a few rows.

The same question as ``bisect``'s, asked of two processes while a run lasts: all rows of all sites are compared by one
number each, and only the rows where a difference begins are fetched, of the outputs that layers hand on.
Legend: S sites, T rows of all excerpts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlalign.verifier.bisect import Site, compare_site
from rlalign.verifier.periodic import Excerpt, Inspects, SiteDigests

# rows whose values travel: those in which one site or another differs first
_MAX_ROWS = 16


@dataclass(frozen=True, slots=True)
class LayerCheck:
    """sites: all S. differing: int64 [S], rows whose bits differ, of ``num_rows``. first: the first site that differs.

    stations: orders of the sites on the way up: what each layer hands on, and all outside of the layers. max_ulp: of
    each station, over the rows that were looked at: 0 where all bits are equal, at least 1 elsewhere, inf where a value
    is not finite. where: (excerpt, row) at which ``first`` begins to differ.
    """

    sites: tuple[Site, ...]
    differing: np.ndarray
    num_rows: int
    stations: tuple[int, ...]
    max_ulp: tuple[float, ...]
    where: tuple[str, int] | None

    @property
    def first(self) -> Site | None:
        return next((site for site, count in zip(self.sites, self.differing, strict=True) if count), None)

    @property
    def equal(self) -> bool:
        return self.first is None

    def metrics(self) -> dict[str, float]:
        """``align/bisect/*``."""
        layers = {site.layer for site in self.sites if site.layer is not None}
        bad = [site.order for site, count in zip(self.sites, self.differing, strict=True) if count]
        below = {s.layer for s in self.sites if s.layer is not None and bad and s.order >= bad[0]}
        return {
            "align/bisect/sites_differ": float(len(bad)),
            "align/bisect/equal_layers": float(len(layers - below)),
        }

    @property
    def verdict(self) -> str:
        if self.first is None or self.where is None:
            return f"all {len(self.sites):,} outputs of {self.num_rows:,} rows are bit for bit equal"
        count = int(self.differing[self.first.order])
        return (
            f"outputs differ first at {self.first}, on {count:,} of {self.num_rows:,} rows, from sample "
            f"{self.where[0]} row {self.where[1]} on"
        )


def check_layers(rollout: Inspects, train: Inspects, excerpts: Sequence[Excerpt]) -> LayerCheck:
    """Compare both sides on ``excerpts``. Raises ValueError if they do not have the same modules in the same order."""
    a, b = rollout.site_digests(excerpts), train.site_digests(excerpts)
    if a.sites != b.sites:
        odd = next((str(x) for x, y in zip(a.sites, b.sites, strict=False) if x != y), "their number")
        raise ValueError(f"rollout and trainer do not have the same modules in the same order: {odd} is not on both")
    differs = a.digests != b.digests
    stations = _stations(a)
    touched = [order for order in stations if differs[order].any()]
    found = dict.fromkeys(stations, 0.0)
    if touched:
        rows = _rows(differs)
        values = [side.site_values(excerpts, touched, rows) for side in (rollout, train)]
        for order, x, y in zip(touched, *values, strict=True):
            difference = compare_site(x, y, len(rows))
            # digests know of all rows: one that was not fetched may be the only one that differs here
            found[order] = float("inf") if np.isinf(difference.max_abs) else float(max(1, difference.max_ulp))
    counts = differs.sum(axis=1)
    return LayerCheck(
        a.sites, counts, differs.shape[1], stations, tuple(found[order] for order in stations),
        _where(excerpts, differs[int(counts.astype(bool).argmax())]) if counts.any() else None,
    )  # fmt: skip


def _stations(found: SiteDigests) -> tuple[int, ...]:
    last_of = {site.layer: site.order for site in found.sites if site.layer is not None}
    return tuple(s.order for s in found.sites if s.layer is None or last_of[s.layer] == s.order)


def _rows(differs: np.ndarray) -> list[int]:
    """The first row in which each site differs; of many such, an even choice."""
    rows = np.unique([int(row.argmax()) for row in differs if row.any()])
    chosen = np.linspace(0, len(rows) - 1, min(_MAX_ROWS, len(rows))).round().astype(np.int64)
    return rows[np.unique(chosen)].tolist()


def _where(excerpts: Sequence[Excerpt], differs: np.ndarray) -> tuple[str, int]:
    lengths = [len(excerpt.prompt_ids) + len(excerpt.response_ids) - 1 for excerpt in excerpts]
    row, ends = int(differs.argmax()), np.cumsum(lengths)
    which = int(np.searchsorted(ends, row, side="right"))
    return excerpts[which].name, row - int(ends[which]) + lengths[which]
