"""Which pages of the latent cache belong to which sequence: the policy beside `PagedCache`.

Sequences differ in length and end at different times; a contiguous cache must give each the room of
the longest. Here each holds whole pages, the last one partly filled, and hands them back when it
ends. All of it is host-side bookkeeping in NumPy; arrays on devices are `model.cache`'s.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from dsv3_jax.kernels.mla_decode.kv_splits import PAGE

NO_PAGE = -1


class OutOfPages(RuntimeError):
    """The pool has fewer free pages than a sequence asks for; none were taken."""


class PagePool:
    """A free list of `pages` pages and the table of which of them each of `slots` sequences holds.

    `table` is what a `PagedCache` is given: int32 [slots, width], page numbers in token order and
    -1 past a sequence's last page. `width` bounds a sequence's length at width x page tokens.
    """

    def __init__(self, pages: int, slots: int, width: int, page: int = PAGE):
        if min(pages, slots, width, page) < 1:
            raise ValueError(f"{pages=}, {slots=}, {width=} and {page=} must be positive")
        self.page = page
        self.table = np.full((slots, width), NO_PAGE, np.int32)
        # Taken from the end: the page that was handed back last is the likeliest to be in a cache.
        self._free = list(range(pages))[::-1]

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def held(self, slot: int) -> Int[np.ndarray, " n"]:
        """The pages of the sequence in a slot, in token order."""
        row = self.table[slot]
        return row[row != NO_PAGE]

    def reserve(self, slot: int, tokens: int) -> bool:
        """Makes sure that a slot has room for so many tokens; True when its table entry changed.

        Raises OutOfPages, and takes nothing, when too few pages are free, and ValueError when the
        table is too narrow.
        """
        have, need = len(self.held(slot)), -(-tokens // self.page)
        if need > self.table.shape[1]:
            raise ValueError(
                f"{tokens=} need {need} pages of {self.page}; a table entry holds "
                f"{self.table.shape[1]}"
            )
        if need - have > len(self._free):
            raise OutOfPages(
                f"slot {slot} needs {need - have} more pages for {tokens} tokens, and "
                f"{len(self._free)} are free"
            )
        for place in range(have, need):
            self.table[slot, place] = self._free.pop()
        return need > have

    def release(self, slot: int) -> None:
        """Hands back all pages of a slot."""
        self._free += self.held(slot)[::-1].tolist()
        self.table[slot] = NO_PAGE


def pool_for(lengths: Sequence[int], page: int = PAGE) -> PagePool:
    """A pool with exactly the pages that sequences of these lengths need, already theirs."""
    needs = [max(-(-length // page), 1) for length in lengths]
    pool = PagePool(sum(needs), len(needs), max(needs), page)
    for slot, length in enumerate(lengths):
        pool.reserve(slot, max(length, 1))
    return pool
