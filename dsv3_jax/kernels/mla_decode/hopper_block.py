"""One block of Hopper's paged attention: its sizes, and what its three warpgroups share.

A block has 64 rows (heads x new tokens) and the pages of one part of the schedule. Two slots of
shared memory hold a page each. A warpgroup loads (`hopper_load`); each of the two others scores the
pages of one slot and holds half of the output's columns (`hopper_softmax`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import hopper

ROWS = 64  # of a block: heads x new tokens
LATENT_TILES = 8
TILES = 9  # of 64 columns each: latent, then rope
ROPE_TILE = 8
ORDER = (ROPE_TILE, *range(8))  # rope first, whose place is the first to be free
GROUPS = (8, 0, 4)  # the first tile of each group that is handed back at once
HALF = 4  # tiles of the output that a math warpgroup holds


def parts_of(rows: int) -> int:
    """Parts of a schedule for so many rows (heads x new tokens): blocks that read other pages."""
    return max(hopper.multiprocessors() // row_tiles(rows), 1)


def reads(width: int, rope: int, dtype: Any) -> bool:
    """Whether rows of `width` latent and `rope` rotated numbers are what the kernel is made for."""
    return (width, rope) == (LATENT_TILES * 64, 64) and jnp.dtype(dtype) == jnp.bfloat16


def row_tiles(rows: int) -> int:
    """Blocks beside each other that so many rows take."""
    return pl.cdiv(rows, ROWS)


@dataclass(frozen=True)
class Tuning:
    """How a block works; none of it changes the result but for rounding."""

    cluster: int = 2  # blocks of other heads that share each read of a page (TMA multicast)
    rise: float = 8.0  # the running maximum moves only when scores exceed it by so much (log2)


class Inputs(NamedTuple):
    """What the kernel reads from memory. `pool` is the latents of all pages, or FP8 and scales."""

    q_latent: Any
    q_rope: Any
    pool: tuple[Any, ...]
    rope: Any
    table: Any
    lengths: Any
    starts: Any  # of the schedule, as all below
    cuts: Any
    first: Any
    last: Any


class Outputs(NamedTuple):
    """What it writes: results of sequences that a part reads alone, and partial ones."""

    out: Any
    lse: Any
    partial: Any
    partial_lse: Any


class Shared(NamedTuple):
    """A block's shared memory, and its barriers."""

    q: Any  # [TILES, ROWS, 64]
    k: Any  # [2 slots, TILES, PAGE, 64]
    weights: Any  # [ROWS, PAGE], those that one warpgroup hands to the other
    own_weights: Any  # those that it keeps, where the interpreter has no registers for them
    rows: Any  # [4, ROWS]: running maxima of both, then their sums
    q_full: Any
    q_empty: Any
    k_full: Any
    k_ready: Any
    k_empty: Any
    weights_ready: Any


@dataclass(frozen=True)
class Call:
    """What is fixed when the kernel is traced."""

    scale: float
    new: int
    heads: int
    fp8: bool
    tuning: Tuning


@dataclass(frozen=True)
class Block:
    """What the warpgroups of a block share while they are traced."""

    call: Call
    inputs: Inputs
    outputs: Outputs
    shared: Shared
    part: Any
    row: Any  # the first of its rows
    low: Any  # the part's pages on the line of all pages: from here
    high: Any  # to here

    def for_each_piece(self, body: Callable[[Any, Any, Any], Any]) -> None:
        """body(sequence, first page, one past the last page) for each of this part's pieces."""
        starts, first, last = self.inputs.starts, self.inputs.first, self.inputs.last

        def step(sequence, carry):
            start = starts[sequence]
            begin = lax.max(self.low, start) - start
            end = lax.min(self.high, starts[sequence + 1]) - start
            body(sequence, begin, end)
            return carry

        part = self.part
        some = (self.high > self.low).astype(jnp.int32)
        lax.fori_loop(first[part], first[part] + (last[part] - first[part]) * some, step, 0)

    def room(self, slot: Any, group: int) -> Any:
        """The barrier of a slot's group of tiles, named by its first: that they may be written."""
        return self.shared.k_empty.at[slot * len(GROUPS) + GROUPS.index(group)]
