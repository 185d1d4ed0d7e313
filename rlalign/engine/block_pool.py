"""Pages of the KV cache: who holds them, which of them hold a known prefix, which go first. No tensors.

A page is free (nobody holds it) or held by one or more sequences. A full page may also be *known*: registered under
the digest of everything up to its end, so that a later sequence with the same beginning takes it over. Known pages stay
known when they fall free, until they are evicted, least recently used first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Reference-counted pages with a prefix cache of chained block digests.

    Digests start from the weights version: pages computed under other weights can never match.
    """

    def __init__(self, num_pages: int, page_size: int, *, prefix_cache: bool = True, weights_version: int = 0) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.prefix_cache = prefix_cache
        self.num_evictions = 0
        self._holders = [0] * num_pages
        # Order is eviction order: pages without a digest in front, then known pages by time of release.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_pages))
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self._root = _root_digest(weights_version)

    @property
    def num_free(self) -> int:
        """Pages that ``allocate`` can hand out, known ones included."""
        return len(self._free)

    @property
    def num_known(self) -> int:
        return len(self._page_of)

    def num_pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def is_shared(self, page: int) -> bool:
        return self._holders[page] > 1

    def holds_nothing(self, page: int) -> bool:
        """True for a free page without a known prefix: its content will never be read."""
        return self._holders[page] == 0 and page not in self._digest_of

    def allocate(self, count: int) -> list[int]:
        """``count`` pages for one holder, evicting known prefixes if need be. Raises ValueError if too few are free."""
        if count > self.num_free:
            raise ValueError(f"count={count}: only {self.num_free} of {self.num_pages} pages are free")
        pages = [self._free.popitem(last=False)[0] for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
            self._forget(page)
        return pages

    def retain(self, pages: Iterable[int]) -> None:
        """One more holder for each page; free known pages come back into use."""
        for page in pages:
            if self._holders[page] == 0:
                del self._free[page]
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less for each page of a sequence, in its order."""
        # From the end: the deeper a page, the fewer sequences can share it, so it is evicted first.
        for page in reversed(pages):
            if self._holders[page] == 0:
                raise ValueError(f"page {page} is released but nobody holds it")
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free[page] = None
                self._free.move_to_end(page, last=page in self._digest_of)

    def extend_digests(self, digests: list[bytes], token_ids: Sequence[int], num_pages: int) -> None:
        """Append to ``digests`` until it covers the first ``num_pages`` full pages of ``token_ids``."""
        for index in range(len(digests), num_pages):
            block = token_ids[index * self.page_size : (index + 1) * self.page_size]
            parent = digests[-1] if digests else self._root
            digests.append(hashlib.sha256(parent + ",".join(map(str, block)).encode()).digest())

    def match(self, digests: Sequence[bytes]) -> list[int]:
        """Pages that hold the longest known prefix. They are not retained."""
        pages = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def register(self, page: int, digest: bytes) -> None:
        """Make a full page known. The first page of a digest stays: two sequences may compute the same block."""
        if self.prefix_cache and digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def reset(self, weights_version: int) -> None:
        """Forget every prefix, as new weights need. Raises ValueError while pages are held."""
        if held := self.num_pages - self.num_free:
            raise ValueError(f"{held} pages are still held: prefixes can be dropped only between requests")
        self._page_of.clear()
        self._digest_of.clear()
        self._root = _root_digest(weights_version)

    def _forget(self, page: int) -> None:
        digest = self._digest_of.pop(page, None)
        if digest is not None:
            del self._page_of[digest]
            self.num_evictions += 1


def _root_digest(weights_version: int) -> bytes:
    return hashlib.sha256(f"weights {weights_version}".encode()).digest()
