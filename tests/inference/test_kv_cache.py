"""The page pool: no page has two owners, none is lost, and asking too much takes nothing."""

import numpy as np
import pytest

from dsv3_jax.inference.kv_cache import NO_PAGE, OutOfPages, PagePool, pool_for


def owners(pool: PagePool) -> list[int]:
    held = pool.table[pool.table != NO_PAGE]
    return sorted([*held.tolist(), *pool._free])


def test_every_page_has_one_owner_whatever_happens():
    rng = np.random.default_rng(0)
    pool = PagePool(pages=9, slots=4, width=5, page=8)
    for _ in range(200):
        slot = int(rng.integers(4))
        if rng.random() < 0.3:
            pool.release(slot)
        else:
            before = pool.table.copy()
            try:
                pool.reserve(slot, int(rng.integers(0, 41)))
            except OutOfPages:
                np.testing.assert_array_equal(pool.table, before)
        assert owners(pool) == list(range(9))


def test_a_sequence_grows_by_whole_pages_and_keeps_those_it_has():
    pool = PagePool(pages=4, slots=2, width=3, page=8)
    assert pool.reserve(0, 8) and not pool.reserve(0, 3)
    first = pool.held(0).tolist()
    assert pool.reserve(0, 9)
    assert pool.held(0).tolist()[:1] == first and len(pool.held(0)) == 2
    assert pool.free_pages == 2
    pool.release(0)
    assert pool.free_pages == 4 and not len(pool.held(0))


def test_what_does_not_fit_is_refused_with_the_numbers():
    pool = PagePool(pages=2, slots=2, width=3, page=8)
    pool.reserve(0, 16)
    with pytest.raises(OutOfPages, match="slot 1 needs 1 more pages for 5 tokens, and 0 are free"):
        pool.reserve(1, 5)
    with pytest.raises(ValueError, match="tokens=25 need 4 pages of 8; a table entry holds 3"):
        pool.reserve(0, 25)
    with pytest.raises(ValueError, match="pages=0"):
        PagePool(pages=0, slots=1, width=1)


def test_a_pool_for_known_lengths_has_no_page_too_many():
    pool = pool_for([1, 130, 64])
    assert pool.free_pages == 0
    assert [len(pool.held(slot)) for slot in range(3)] == [1, 3, 1]
