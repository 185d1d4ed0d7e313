"""Pages, holders, known prefixes and the order of eviction."""

from __future__ import annotations

import pytest

from rlalign.engine.block_pool import BlockPool


def known_pages(pool: BlockPool, token_ids: list[int]) -> list[int]:
    """Pages computed for ``token_ids`` (full pages), registered and released."""
    digests: list[bytes] = []
    pool.extend_digests(digests, token_ids, len(token_ids) // pool.page_size)
    pages = pool.allocate(len(digests))
    for page, digest in zip(pages, digests, strict=True):
        pool.register(page, digest)
    pool.release(pages)
    return pages


def match(pool: BlockPool, token_ids: list[int]) -> list[int]:
    digests: list[bytes] = []
    pool.extend_digests(digests, token_ids, len(token_ids) // pool.page_size)
    return pool.match(digests)


def test_a_page_is_free_again_when_its_last_holder_lets_go() -> None:
    pool = BlockPool(4, 2)
    pages = pool.allocate(3)
    pool.retain(pages[:1])
    assert pool.is_shared(pages[0]) and not pool.is_shared(pages[1])
    pool.release(pages)
    assert pool.num_free == 3
    pool.release(pages[:1])
    assert pool.num_free == 4


def test_too_large_an_allocation_is_refused() -> None:
    pool = BlockPool(4, 2)
    pool.allocate(3)
    with pytest.raises(ValueError, match="count=2: only 1 of 4"):
        pool.allocate(2)
    assert pool.num_free == 1


def test_releasing_a_free_page_is_refused() -> None:
    pool = BlockPool(4, 2)
    with pytest.raises(ValueError, match="page 3 is released but nobody holds it"):
        pool.release([3])


def test_the_longest_common_prefix_matches() -> None:
    pool = BlockPool(8, 2)
    pages = known_pages(pool, [1, 2, 3, 4, 5, 6])
    assert match(pool, [1, 2, 3, 4, 9, 9]) == pages[:2]
    assert match(pool, [1, 2, 3, 4, 5, 6, 7, 8]) == pages


def test_the_same_block_after_another_beginning_is_another_block() -> None:
    pool = BlockPool(8, 2)
    first = known_pages(pool, [1, 2, 3, 4])
    known_pages(pool, [5, 6, 7, 8])
    assert match(pool, [1, 2, 7, 8]) == first[:1]


def test_digits_of_neighbouring_ids_are_not_confused() -> None:
    pool = BlockPool(8, 2)
    known_pages(pool, [1, 23])
    assert match(pool, [12, 3]) == []


def test_least_recently_released_goes_first_and_deep_pages_before_shallow() -> None:
    pool = BlockPool(6, 1)
    old, new = known_pages(pool, [1, 2, 3]), known_pages(pool, [7, 8])
    pool.retain(old[:1])
    pool.release(old[:1])  # used again: now the latest
    assert pool.allocate(1) not in ([p] for p in old + new)  # a page that knows nothing goes before any known one
    assert [pool.allocate(1)[0] for _ in range(5)] == [old[2], old[1], new[1], new[0], old[0]]
    assert pool.num_evictions == 5
    assert match(pool, [1, 2, 3]) == []


def test_a_released_page_that_knows_nothing_goes_before_known_ones() -> None:
    pool = BlockPool(3, 1)
    blank = pool.allocate(1)
    known_pages(pool, [1, 2])
    pool.release(blank)
    assert pool.allocate(1) == blank


def test_a_held_known_page_is_not_evicted() -> None:
    pool = BlockPool(3, 1)
    pages = known_pages(pool, [1, 2])
    pool.retain(pages)
    assert pool.num_free == 1
    pool.allocate(1)
    assert match(pool, [1, 2]) == pages


def test_reset_forgets_everything_and_changes_the_root() -> None:
    pool = BlockPool(4, 2, weights_version=0)
    digests: list[bytes] = []
    pool.extend_digests(digests, [1, 2], 1)
    known_pages(pool, [1, 2])
    pool.reset(weights_version=1)
    assert pool.num_known == 0
    assert match(pool, [1, 2]) == []
    under_new: list[bytes] = []
    pool.extend_digests(under_new, [1, 2], 1)
    assert under_new != digests


def test_reset_is_refused_while_pages_are_held() -> None:
    pool = BlockPool(4, 2)
    pool.allocate(1)
    with pytest.raises(ValueError, match="1 pages are still held"):
        pool.reset(1)


def test_without_a_prefix_cache_nothing_is_registered() -> None:
    pool = BlockPool(4, 2, prefix_cache=False)
    known_pages(pool, [1, 2, 3, 4])
    assert pool.num_known == 0
