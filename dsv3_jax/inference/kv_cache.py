"""Which pages of the latent cache belong to which sequence: the policy beside `PagedCache`.

Sequences differ in length and end at different times; a contiguous cache must give each the room of
the longest. Here each holds whole pages, the last one partly filled, and hands them back when it
ends. What a page holds is remembered for as long as nobody needs the room: a later sequence that
begins with the same tokens shares it. All of it is host-side bookkeeping; arrays on devices are
`model.cache`'s.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from dsv3_jax.kernels.mla_decode.kv_splits import PAGE

NO_PAGE = -1
# Of the pages that follow one prefix, how many are compared with a new sequence's tokens.
COMPARED = 64


class OutOfPages(RuntimeError):
    """The pool has fewer free pages than a sequence asks for; none were taken."""


class Shared(NamedTuple):
    """What a new sequence finds in the pool."""

    tokens: int = 0  # rows at its beginning that it need not compute
    copy: tuple[int, int] | None = None  # (from, to): a page that it must copy and write on


@dataclass(eq=False)
class _Node:
    """A page whose rows are known: those of `tokens`, after the pages of its ancestors."""

    tokens: tuple[int, ...]
    page: int
    parent: _Node | None
    children: dict[tuple[int, ...], _Node] = field(default_factory=dict)


class PagePool:
    """A free list of `pages` pages and the table of which of them each of `slots` sequences holds.

    `table` is what a `PagedCache` is given: int32 [slots, width], page numbers in token order and
    -1 past a sequence's last page. `width` bounds a sequence's length at width x page tokens.
    """

    def __init__(self, pages: int, slots: int, width: int, page: int = PAGE):
        if min(pages, slots, width, page) < 1:
            raise ValueError(f"{pages=}, {slots=}, {width=} and {page=} must be positive")
        self.page, self.pages = page, pages
        self.table = np.full((slots, width), NO_PAGE, np.int32)
        # Taken from the end: the page that was handed back last is the likeliest to be in a cache.
        self._free = list(range(pages))[::-1]
        self._holders = np.zeros(pages, np.int32)
        self._root = _Node((), NO_PAGE, None)
        self._nodes: dict[int, _Node] = {}  # by page
        self._idle: OrderedDict[int, None] = (
            OrderedDict()
        )  # remembered, held by nobody; oldest first

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free) + len(self._idle)

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
        if need - have > self.free_pages:
            raise OutOfPages(
                f"slot {slot} needs {need - have} more pages for {tokens} tokens, and "
                f"{self.free_pages} are free"
            )
        for place in range(have, need):
            self.table[slot, place] = self._take()
        return need > have

    def release(self, slot: int) -> None:
        """Hands back all pages of a slot; what is remembered stays so until the page is taken."""
        # From the last on: what is furthest from the beginning is forgotten first.
        for page in self.held(slot)[::-1].tolist():
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._nodes:
                self._idle[page] = None
            else:
                self._free.append(page)
        self.table[slot] = NO_PAGE

    def share(self, slot: int, ids: Sequence[int], *, copies: bool = True) -> Shared:
        """Gives an empty slot the remembered pages that begin as `ids` does.

        At least the last token is left to be computed. A page that agrees in its first rows only is
        shared by copying it, if `copies` are wanted and a page is free: the caller copies.
        """
        node, place, most = self._root, 0, len(ids) - 1
        while (place + 1) * self.page <= most:
            found = node.children.get(tuple(ids[place * self.page : (place + 1) * self.page]))
            if found is None:
                break
            self._hold(slot, place, found.page)
            node, place = found, place + 1
        tokens = place * self.page
        wanted = tuple(ids[tokens : min(tokens + self.page, most)])
        best, rows = None, 0
        for child in islice(reversed(node.children.values()), COMPARED if wanted else 0):
            agree = _common(child.tokens, wanted)
            if agree > rows:
                best, rows = child, agree
        if best is None or not copies or self.free_pages - (best.page in self._idle) < 1:
            return Shared(tokens)
        self._idle.pop(best.page, None)  # not to be taken as its own copy
        own = self._take()
        if not self._holders[best.page]:
            self._idle[best.page] = None
        self.table[slot, place] = own
        return Shared(tokens + rows, (best.page, own))

    def remember(self, slot: int, ids: Sequence[int], *, partly: bool = False) -> None:
        """Says that the rows of a slot's pages hold these tokens, so that others may share them.

        Rows that were said to hold tokens must not be written again while the pages are remembered.
        With `partly` the last page counts even if the tokens do not fill it.
        """
        node, held = self._root, self.held(slot).tolist()
        for place, page in enumerate(held):
            tokens = tuple(ids[place * self.page : (place + 1) * self.page])
            if not tokens or (len(tokens) < self.page and not partly):
                return
            found = node.children.get(tokens)
            if found is None:
                if page in self._nodes:  # known with fewer tokens
                    self._forget(self._nodes[page])
                found = node.children[tokens] = self._nodes[page] = _Node(tokens, page, node)
            node = found

    def _hold(self, slot: int, place: int, page: int) -> None:
        self.table[slot, place] = page
        self._holders[page] += 1
        self._idle.pop(page, None)

    def _take(self) -> int:
        if not self._free:
            self._forget(self._nodes[next(iter(self._idle))])
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def _forget(self, node: _Node) -> None:
        """Takes a page and what follows it out of memory; those that nobody holds become free."""
        assert node.parent is not None
        del node.parent.children[node.tokens]
        stack = [node]
        while stack:
            gone = stack.pop()
            stack += gone.children.values()
            del self._nodes[gone.page]
            if gone.page in self._idle:
                del self._idle[gone.page]
                self._free.append(gone.page)


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    for number, (a, b) in enumerate(zip(left, right)):
        if a != b:
            return number
    return min(len(left), len(right))
