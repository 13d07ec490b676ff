"""Who reads which pages: a split-KV schedule, computed on the device by plain XLA operations.

The pages of all sequences lie on one line, in order. The line is cut into as many pieces as there
are parts (groups of blocks that read different pages), so that a long sequence is shared by many
parts and short ones share a part. A cut costs: both sides start a piece of their own, and the two
partial results pass through memory and are combined. So cuts near the boundary of two sequences
are moved onto it; how near is "near" is chosen, among a few distances, by a model of the time.

The schedule depends on lengths only. It is the same for every layer of a decoding step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

PAGE = 64  # tokens
# In units of one page's time, and guesses until measured otherwise: what a piece costs beside its
# pages (loading queries, filling the pipeline, storing), and what a cut sequence adds to that.
PIECE_COST = 2.5
CUT_COST = 2.0
SNAPS = (0, 2, 6, 16, 40, 1 << 20)  # candidate distances, in pages


class KVSplits(NamedTuple):
    """Pieces of the line of pages. Part p reads pages cuts[p] to cuts[p + 1] of the line."""

    starts: Int[Array, " B+1"]  # each sequence's first page on the line; the line's length last
    cuts: Int[Array, " P+1"]
    first: Int[Array, " P"]  # the first sequence that part p reads of
    last: Int[Array, " P"]  # one past the last one
    begin: Int[Array, " B"]  # the first part that reads of sequence b
    end: Int[Array, " B"]  # one past the last one

    @property
    def parts(self) -> int:
        """Parts, a static number."""
        return self.first.shape[0]


def split_kv(lengths: Int[Array, " B"], parts: int) -> KVSplits:
    """The schedule of so many parts for sequences of these lengths (0 allowed: one empty page)."""
    pages = jnp.maximum(-(-lengths // PAGE), 1).astype(jnp.int32)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(pages, dtype=jnp.int32)])
    candidates = jax.vmap(lambda snap: _cuts(starts, pages, parts, snap))(jnp.array(SNAPS))
    times = jax.vmap(lambda cuts: _longest(starts, cuts))(candidates)
    cuts = candidates[jnp.argmin(times)]
    first = _search(starts, cuts[:-1], side="right").astype(jnp.int32) - 1
    last = _search(starts[:-1], cuts[1:], side="left").astype(jnp.int32)
    begin = _search(cuts, starts[:-1], side="right").astype(jnp.int32) - 1
    end = _search(cuts[:-1], starts[1:], side="left").astype(jnp.int32)
    return KVSplits(starts, cuts, first, jnp.maximum(last, first), begin, end)


def _cuts(starts, pages, parts: int, snap):
    """Where the line is cut into parts of equal cost, with cuts moved by up to `snap` pages."""
    costs = jnp.concatenate(
        [jnp.zeros(1), jnp.cumsum(pages.astype(jnp.float32) + jnp.float32(PIECE_COST))]
    )
    at = costs[-1] * (jnp.arange(1, parts, dtype=jnp.float32) / parts)
    sequence = jnp.clip(_search(costs, at, side="right") - 1, 0, pages.shape[0] - 1)
    length = pages[sequence]
    offset = jnp.clip(at - costs[sequence] - PIECE_COST, 0).astype(jnp.int32)
    offset = 2 * ((offset + 1) // 2)  # the kernel reads pages in pairs
    near_start, near_end = offset <= snap, length - offset <= snap
    to_start = near_start & (~near_end | (2 * offset <= length))
    offset = jnp.where(to_start, 0, jnp.where(near_end, length, jnp.minimum(offset, length)))
    cuts = starts[sequence] + offset
    # Sequences shorter than `snap` on both sides must not turn the order around, and parts that are
    # left with nothing come last.
    cuts = jax.lax.cummax(cuts.astype(jnp.int32))
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), cuts[:-1]])
    cuts = jnp.sort(jnp.where(cuts == before, starts[-1], cuts))
    return jnp.concatenate([jnp.zeros(1, jnp.int32), cuts, starts[-1:]])


def _longest(starts, cuts):
    """The time of the slowest part, in pages."""
    first = _search(starts, cuts[:-1], side="right") - 1
    last = _search(starts[:-1], cuts[1:], side="left")
    pages = (cuts[1:] - cuts[:-1]).astype(jnp.float32)
    pieces = jnp.where(pages > 0, last - first, 0)
    inside = ~(cuts[:, None] == starts).any(-1)
    cut_sides = inside[:-1].astype(jnp.float32) + inside[1:].astype(jnp.float32)
    time = pages + PIECE_COST * pieces.astype(jnp.float32) + CUT_COST * cut_sides
    return jnp.max(time)


def _search(values, at, side: str):
    """`jnp.searchsorted` in one step, not in as many as the logarithm of its size."""
    return jnp.searchsorted(values, at, side=side, method="compare_all")
