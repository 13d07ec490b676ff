"""Who works on which tile: a list for each multiprocessor, made before the kernel is compiled.

A causal tile's work grows with its place in the sequence, so that equal shares by number are not
equal by time. Tiles go, longest first, to whoever is free soonest, which a simulation knows; heads
are taken a few at a time, so that what a tile reads of keys and values is still in the L2 cache.
"""

import functools
import heapq
import itertools

import numpy as np
from jaxtyping import Int

L2_BYTES = 24 << 20  # of a section of heads; half of a Hopper's cache, which has two halves
OVERHEAD = 1.0  # of a tile beside its steps, in steps: its first load, and its store


@functools.lru_cache(maxsize=64)
def longest_first(
    steps: tuple[int, ...], heads: int, section: int, blocks: int
) -> Int[np.ndarray, "blocks width"]:
    """Tile numbers of each block, head x len(steps) + tile, in order; -1 pads the rows.

    steps[t] is the work of tile t, the same for every head; up to `section` heads are dealt out
    together.
    """
    order = sorted(range(len(steps)), key=lambda tile: -steps[tile])
    free = [(0.0, block) for block in range(blocks)]
    rows: list[list[int]] = [[] for _ in range(blocks)]
    # Even sections: a last one with few heads could not fill the blocks.
    for first, end in itertools.pairwise(even_bounds(heads, section)):
        for tile in order:
            for head in range(first, end):
                time, block = free[0]
                rows[block].append(head * len(steps) + tile)
                heapq.heapreplace(free, (time + steps[tile] + OVERHEAD, block))
    width = max(map(len, rows)) + 1  # one more: a block reads the entry after its last
    return np.array([row + [-1] * (width - len(row)) for row in rows], np.int32)


def even_bounds(heads: int, most: int) -> list[int]:
    """Where parts of up to `most` heads begin and the last one ends, as even as may be."""
    parts = -(-heads // most)
    return [heads * i // parts for i in range(parts + 1)]


def section_of(bytes_per_head: int, heads: int) -> int:
    """How many heads' keys and values the L2 cache holds at once."""
    return max(1, min(heads, L2_BYTES // bytes_per_head))
