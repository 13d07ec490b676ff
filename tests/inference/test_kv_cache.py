"""The page pool: no page has two owners, none is lost, and asking too much takes nothing."""

import numpy as np
import pytest

from dsv3_jax.inference.kv_cache import NO_PAGE, OutOfPages, PagePool, Shared


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


TEXT = list(range(100, 150))


def written(pool: PagePool, slot: int, ids: list[int]) -> list[int]:
    """A sequence that was written whole and has ended; its pages."""
    pool.reserve(slot, len(ids))
    held = pool.held(slot).tolist()
    pool.remember(slot, ids, partly=True)
    pool.release(slot)
    return held


def test_whole_pages_that_begin_alike_are_shared_and_the_next_one_is_copied():
    pool = PagePool(pages=8, slots=3, width=6, page=8)
    held = written(pool, 0, TEXT[:20])
    other = [*TEXT[:18], 7, 7, 7]
    assert pool.share(1, other) == Shared(18, (held[2], pool.held(1)[2]))
    assert pool.held(1).tolist()[:2] == held[:2] and pool.held(1)[2] not in held
    # While one holds them another may, too, and nobody takes them.
    assert pool.share(2, other).tokens == 18
    assert pool.free_pages == 8 - 4
    pool.release(1)
    assert pool.held(2).tolist()[:2] == held[:2] and pool.free_pages == 8 - 3


def test_the_last_token_of_a_prompt_is_never_shared():
    pool = PagePool(pages=8, slots=2, width=6, page=8)
    written(pool, 0, TEXT[:24])
    assert pool.share(1, TEXT[:16], copies=False).tokens == 8
    pool.release(1)
    assert pool.share(1, TEXT[:16]).tokens == 15


def test_what_nobody_holds_is_forgotten_when_its_pages_are_needed_the_oldest_ends_first():
    pool = PagePool(pages=4, slots=2, width=4, page=8)
    held = written(pool, 0, TEXT[:24])
    assert pool.free_pages == 4
    pool.reserve(1, 16)  # the free page, and the last of those
    assert pool.share(0, TEXT[:24]).tokens == 16
    assert pool.held(0).tolist() == held[:2] and pool.free_pages == 0
    with pytest.raises(OutOfPages):
        pool.reserve(0, 24)


def test_sharing_and_forgetting_lose_no_page():
    """Random sequences over few tokens, so that most begin alike; tiny pool."""
    rng = np.random.default_rng(1)
    pool = PagePool(pages=12, slots=4, width=5, page=4)
    ids: dict[int, list[int]] = {}
    content = np.full((12, 4), -1)  # what a model would have written
    for _ in range(2000):
        slot = int(rng.integers(4))
        if slot in ids:
            pool.remember(slot, ids.pop(slot), partly=bool(rng.integers(2)))
            pool.release(slot)
        else:
            text = rng.integers(0, 2, rng.integers(2, 20)).tolist()
            found = pool.share(slot, text)
            assert found.tokens < len(text)
            try:
                pool.reserve(slot, len(text))
            except OutOfPages:
                pool.release(slot)
                continue
            if found.copy is not None:
                content[found.copy[1]] = content[found.copy[0]]
            held, ids[slot] = pool.held(slot), text
            seen = [content[held[i // 4], i % 4] for i in range(found.tokens)]
            assert seen == text[: found.tokens], "what is shared is what was written"
            for i in range(found.tokens, len(text)):
                content[held[i // 4], i % 4] = text[i]
        busy = {page for s in range(4) for page in pool.held(s).tolist()}
        idle = [*pool._idle, *pool._free]
        assert len(set(idle)) == len(idle) and not busy & set(idle)
        assert sorted([*busy, *idle]) == list(range(12))
