"""What the backward kernels of attention on Hopper share: the operands, and a ring of slots.

A block keeps some rows in shared memory, and others pass by in a ring that its memory warpgroup
keeps full by TMA; its math warpgroups hand every slot back.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels.attention.hopper_parts import (
    MATH_WARPGROUPS,
    Columns,
    Offset,
    arrive_at,
    over_tiles,
    wait_for,
)
from dsv3_jax.kernels.hopper import plgpu


@dataclass(frozen=True)
class BackwardTile:
    """Sizes of one block's work: 128 rows that stay, and `step` rows that pass by."""

    step: int = 64
    stages: int = 3
    memory_registers: int = 24
    math_registers: int = 240

    @property
    def stay(self) -> int:
        """Rows that stay."""
        return 64 * MATH_WARPGROUPS


def shared_memory(tile: BackwardTile, key_dim: int, value_dim: int) -> int:
    """Bytes of shared memory that a block needs, of the kernel that needs more."""
    ring = tile.stages * (tile.step * (key_dim + value_dim) * 2 + 2 * 4 * tile.step)
    staging = tile.stay * 64 * 2
    return tile.stay * (key_dim + value_dim) * 2 + ring + staging + 2048


class Given(NamedTuple):
    """What the gradients are computed from; T is padded to 128 in `start_s` and `start_dp`.

    start_s is -lse / scale, start_dp is -D. Query t sees the keys from starts[t] (0 without) to
    offset + t, so that key s is seen by the queries from s - offset to ends[s] (T without).
    """

    q: Float[Array, "B T N P"]
    keys: tuple[Columns, ...]  # beside each other, the P columns of the keys
    values: Columns
    dout: Float[Array, "B T N U"]
    start_s: Float[Array, "B N T"]
    start_dp: Float[Array, "B N T"]
    offset: Offset
    starts: Int[Array, "B T"] | None
    ends: Int[Array, "B S"] | None
    scale: float

    @property
    def heads(self) -> int:
        """Heads of all rows of the batch."""
        return self.q.shape[0] * self.q.shape[2]

    @property
    def length(self) -> int:
        """Rows of queries."""
        return self.q.shape[1]

    @property
    def key_length(self) -> int:
        """Rows of keys."""
        return self.values.array.shape[1]

    @property
    def guess(self) -> int:
        """The offset by which work is shared out."""
        return self.offset.guess(self.length, self.key_length)


class Place(NamedTuple):
    """Where a block's tile is: its head of the batch's B x N, its first row, its steps."""

    head: Any
    row: Any
    first: Any
    end: Any
    heads: int  # N

    @property
    def at(self) -> tuple[Any, Any]:
        """Row of the batch, and head of it."""
        heads = jnp.int32(self.heads)
        return lax.div(self.head, heads), lax.rem(self.head, heads)


Copies = Iterable[tuple[Any, Any]]  # from where, and to where


class Ring(NamedTuple):
    """How a block goes through its tiles: rows that stay, and a ring of slots for others."""

    stages: int
    table: Any
    count: Any
    chunk: Any  # whose lists are worked through
    there: Any  # what stays is; None where nothing does
    free: Any  # and is done with
    full: Any  # a slot holds what passes by
    empty: Any  # and is done with

    def over_tiles(self, body: Callable[[Any, Any], Any]) -> None:
        """Calls body(entry, steps before) for each of the block's tiles; it returns its steps."""
        over_tiles(self.table, self.count, self.chunk, body)

    def slot(self, step: Any) -> Any:
        """The slot of a step, counted over all tiles."""
        return lax.rem(step, jnp.int32(self.stages))

    def load(
        self,
        registers: int,
        place: Callable[[Any], Place],
        passing: Callable[[Place, Any, Any], Copies],
        staying: Callable[[Place], Copies] | None = None,
    ) -> None:
        """The memory warpgroup: copies staying(place), and passing(place, step, slot) each step."""
        plgpu.set_max_registers(registers, action="decrease")

        def one_tile(entry, done):
            tile = place(entry)
            if staying is not None:
                plgpu.barrier_wait(self.free)
                for source, target in staying(tile):
                    plgpu.copy_gmem_to_smem(source, target, self.there)

            @pl.loop(tile.first, tile.end)
            def _(step):
                slot = self.slot(done + step - tile.first)
                plgpu.barrier_wait(self.empty.at[slot])
                for source, target in passing(tile, step, slot):
                    plgpu.copy_gmem_to_smem(source, target, self.full.at[slot])

            return tile.end - tile.first

        self.over_tiles(one_tile)
        if staying is not None:
            plgpu.barrier_wait(self.free)
        wait_for((self.empty,), self.stages)

    def begin(self, registers: int) -> None:
        """What a math warpgroup does first: takes its registers, and hands back what it owns."""
        plgpu.set_max_registers(registers, action="increase")
        if self.free is not None:
            plgpu.barrier_arrive(self.free)
        arrive_at((self.empty,), self.stages)

    def skip(
        self, first: Any, end: Any, before: Any, also: Callable[[Any], None] = lambda step: None
    ) -> None:
        """Hands back what passes by in steps that are no concern of a math warpgroup.

        also(step) is done in each of them.
        """

        @pl.loop(first, end)
        def _(step):
            at = self.slot(before + step)
            plgpu.barrier_wait(self.full.at[at])
            plgpu.barrier_arrive(self.empty.at[at])
            also(step)


def rows_of(ref: Any, place: Place, row: Any, first: int) -> Callable[[int, int], Any]:
    """Where `store` sends 64 rows from `row` on, in columns from `first` on."""
    batch, head = place.at
    return lambda left, width: ref.at[batch, pl.ds(row, 64), head, pl.ds(first + left, width)]
