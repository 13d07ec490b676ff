"""One block of Hopper's paged attention: its sizes, and what its three warpgroups share.

A block has 64 rows (heads x new tokens) and the pages of one part of the schedule. Two slots of
shared memory hold a page each, or three an FP8 page. A warpgroup loads (`hopper_load`); each of the
two others scores every other page and holds half of the output's columns (`hopper_softmax`), or,
where pages are FP8, a third one scores all of them (`hopper_fp8`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import hopper
from dsv3_jax.kernels.hopper import WGMMA, plgpu
from dsv3_jax.kernels.mla_decode import columns
from dsv3_jax.kernels.mla_decode.kv_splits import PAGE

ROWS = 64  # of a block: heads x new tokens
LATENT_TILES = 8
TILES = 9  # of 64 columns each: latent, then rope
ROPE_TILE = 8
ORDER = (ROPE_TILE, *range(8))  # rope first, whose place is the first to be free
GROUPS = (8, 0, 4)  # the first tile of each group that is handed back at once
SLOTS, FP8_SLOTS = 2, 3  # pages in shared memory
HALVES = (0, 1)  # the same of FP8 pages: two groups of 128 columns each
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
    k_empty: Any
    weights_ready: Any


class SharedFp8(NamedTuple):
    """The same where pages are FP8; `hopper_fp8` says who uses what."""

    q: Any  # [LATENT_TILES, ROWS, 64], two E4M3 numbers for each after `split_queries`
    q_rope: Any  # [1, ROWS, 64]
    k: Any  # [SLOTS, 4 groups, PAGE, 128] bytes
    rope: Any  # [SLOTS, PAGE, 64]
    scales: Any  # [SLOTS, PAGE]
    weights: Any  # [2, PAGE, ROWS] float16, of even and odd pages
    columns: Any  # [warps, ROWS], what each warp has of a vector of columns
    largest: Any  # [warps], of the queries that each warp has split
    top: Any  # [ROWS], of the weights' exponents
    decay: Any  # [2, ROWS], what they make of earlier weights, where a page raised one
    risen: Any  # [2], whether it did
    q_full: Any
    q_empty: Any
    k_full: Any  # of each slot
    k_empty: Any  # of each slot, and each half of the groups
    weights_ready: Any  # of each of `weights`
    weights_free: Any
    sums_ready: Any  # `columns` and `top` at the end of a piece
    sums_free: Any


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
    shared: Any  # Shared or SharedFp8
    part: Any
    row: Any  # the first of its rows
    low: Any  # the part's pages on the line of all pages: from here
    high: Any  # to here

    def for_each_piece(self, body: Callable[[Any, Any, Any], Any]) -> None:
        """body(sequence, first page, one past the last page) for each of this part's pieces."""

        def step(sequence, begin, end, carry):
            body(sequence, begin, end)
            return carry

        self.fold_pieces(step, 0)

    def fold_pieces(self, body: Callable[..., Any], init: Any) -> Any:
        """The same with something carried along: body(sequence, first page, last page, carry)."""
        starts, first, last = self.inputs.starts, self.inputs.first, self.inputs.last

        def step(sequence, carry):
            start = starts[sequence]
            begin = lax.max(self.low, start) - start
            end = lax.min(self.high, starts[sequence + 1]) - start
            return body(sequence, begin, end, carry)

        part = self.part
        some = (self.high > self.low).astype(jnp.int32)
        end = first[part] + (last[part] - first[part]) * some
        return lax.fori_loop(first[part], end, step, init)

    @property
    def columns(self) -> int:
        """Of FP8 scores, which are transposed: rows that have work, in sixteens."""
        return min(ROWS, pl.cdiv(self.call.new * self.call.heads, 16) * 16)

    def vector(self, numbers: Any) -> Any:
        """A vector of columns that is in shared memory."""
        return plgpu.load(numbers.at[: self.columns], layout=columns.LAYOUT)

    @property
    def groups(self) -> tuple[int, ...]:
        """What of a slot is handed back at once, each by its first tile or half."""
        return HALVES if self.call.fp8 else GROUPS

    def room(self, slot: Any, group: int) -> Any:
        """The barrier of a slot's group, named as in `groups`: that it may be written."""
        return self.shared.k_empty.at[slot * len(self.groups) + self.groups.index(group)]

    def masked(self, s: Any, length: Any, page: Any, end: Any, tokens: int) -> Any:
        """Scores of a page, its tokens along dim `tokens` and the block's rows along the other.

        -inf where a row must not look, and all over from page `end` on.
        """
        new, heads = self.call.new, self.call.heads
        # To the last new token.
        visible = lax.select(page < end, length - page * PAGE, 0)

        def mask(s):
            token = plgpu.broadcasted_iota(jnp.int32, s.shape, tokens, layout=WGMMA)
            if new == 1:
                limit = visible
            else:
                place = plgpu.broadcasted_iota(jnp.int32, s.shape, 1 - tokens, layout=WGMMA)
                asking = lax.div(place + self.row, jnp.int32(heads))
                limit = asking + (visible - (new - 1))
            return jnp.where(token < limit, s, -jnp.inf)

        return lax.cond(visible - (new - 1) < PAGE, mask, lambda s: s, s)
