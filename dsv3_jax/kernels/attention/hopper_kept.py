"""dQ of causal attention on Hopper from a dS that was kept: a plain product with the keys.

`key_gradients` has dS in its registers and sends it to device memory, bfloat16 and transposed; here
a block holds the sums of some queries, and tiles of dS and of keys pass by. 384 operations a pair
of tokens and head, where forming the logits and dP again costs 1024; in exchange 2 bytes a pair are
written and read, S^2 bytes a head, so that few heads are worked on at a time.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import hopper
from dsv3_jax.kernels.attention.hopper_parts import (
    MATH_WARPGROUPS,
    ROWS,
    Lists,
    Refs,
    beside,
    buffer,
    in_whole_tiles,
    launch,
    narrow_of,
    store,
    unique,
)
from dsv3_jax.kernels.attention.hopper_products import Sum, settle
from dsv3_jax.kernels.attention.hopper_ring import (
    Given,
    Place,
    Ring,
    rows_of,
)
from dsv3_jax.kernels.hopper import plgpu

SIDE = 128  # keys and queries of a tile of dS


class Kept(NamedTuple):
    """Where the dS of some heads lies: tiles of 128 keys by 128 queries, those of a key tile
    together, and only such as may hold a pair that is seen.

    A tile is [2, 128 keys, 64 queries], halves in which TMA and wgmma read queries as rows.
    """

    all_heads: int
    chunks: int
    key_tiles: int
    query_tiles: int
    ahead: int  # the first query tile sees so many key tiles beside one

    @classmethod
    def within(cls, size: int, given: Given) -> "Kept | None":
        """In even chunks of as many heads as fit `size` bytes; None if none does."""
        key_tiles, query_tiles = (pl.cdiv(n, SIDE) for n in (given.key_length, given.length))
        static = given.offset.static
        ahead = key_tiles if static is None else min(pl.cdiv(static, SIDE), key_tiles)
        single = cls(1, 1, key_tiles, query_tiles, ahead)
        most = size // (2 * math.prod(single.shape))
        if not most:
            return None
        return single._replace(all_heads=given.heads, chunks=pl.cdiv(given.heads, most))

    def first(self, chunk: Any) -> Any:
        """The first head of a chunk."""
        return chunk * self.all_heads // self.chunks

    @property
    def bounds(self) -> list[int]:
        """The first heads of all chunks, and where the last one ends."""
        return [self.first(chunk) for chunk in range(self.chunks + 1)]

    @property
    def heads(self) -> int:
        """Heads that are kept at a time."""
        return pl.cdiv(self.all_heads, self.chunks)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array, in bfloat16."""
        queries = self.query_tiles
        unseen = (min(max(key - self.ahead, 0), queries) for key in range(self.key_tiles))
        return (self.heads * (self.key_tiles * queries - sum(unseen)), 2, SIDE, SIDE // 2)

    @staticmethod
    def steps_of(size: int) -> int:
        """Steps of `size` queries that a tile has."""
        return SIDE // size

    def tile(self, head: Any, key_tile: Any, query_tile: Any) -> Any:
        """The number of a tile; `head` counts from the chunk's first."""
        unseen = lax.max(key_tile - self.ahead, 0)
        here = key_tile * self.query_tiles - lax.div(unseen * (unseen + 1), jnp.int32(2))
        return head * (self.shape[0] // self.heads) + here + query_tile

    def at(self, head: Any, key: Any, query: Any) -> tuple[Any, Any, Any]:
        """Tile, half of it, and place in that half of a query, for 128 keys from `key` on."""
        tile = self.tile(head, lax.div(key, jnp.int32(SIDE)), lax.div(query, jnp.int32(SIDE)))
        half = lax.rem(lax.div(query, jnp.int32(SIDE // 2)), jnp.int32(2))
        return tile, half, lax.rem(query, jnp.int32(SIDE // 2))


@dataclass(frozen=True)
class ProductTile:
    """Sizes of a block's work: `waves` x 64 queries a math warpgroup, `step` keys a step."""

    waves: int = 2
    step: int = 64
    stages: int = 3
    memory_registers: int = 24
    math_registers: int = 240

    @property
    def rows(self) -> int:
        """Queries of a block."""
        return 64 * self.waves * MATH_WARPGROUPS


def shared_memory(tile: ProductTile, key_dim: int) -> int:
    """Bytes of shared memory that a block needs."""
    ring = tile.stages * tile.step * (key_dim + tile.rows)
    return 2 * (ring + MATH_WARPGROUPS * 64 * 64) + 2048


def work(given: Given, bounds: Sequence[int], tile: ProductTile) -> Lists:
    """The lists of query tiles, for chunk after chunk of heads."""
    steps = given.offset.steps(given.length, given.key_length, tile.rows, tile.step)
    return Lists.of(steps, bounds, 2 * given.key_length * given.q.shape[-1])


def query_gradients(
    into: Any,
    ds: Any,
    given: Given,
    lists: Lists,
    tile: ProductTile,
    kept: Kept,
    chunk: Any,
) -> None:
    """Writes dQ = scale dS K to the ref `into`, for the heads whose `ds` is there."""
    keys, heads, key_length = given.keys, given.q.shape[2], given.key_length
    q_tiles = pl.cdiv(given.length, tile.rows)
    arrays, numbers = unique(keys)
    q_columns = beside(given.q, keys)
    starts = in_whole_tiles(given.starts, tile.rows)

    def kernel(*refs):
        refs = Refs(refs)
        ds_ref, chunk_ref, table_ref, count_ref = refs.some(4)
        offset_ref, starts_ref = (
            refs.one(given.offset.static is None),
            refs.one(starts is not None),
        )
        operands, dq_ref = refs.some(len(arrays)), refs.one()
        k_slots, ds_slots, out_slots = refs.some(len(keys)), refs.one(), refs.one()
        full, empty = refs.rest()
        thread = lax.axis_index("warpgroup")
        offset = given.offset.read(offset_ref)
        first_kept = kept.first(chunk_ref[0])
        ring = Ring(tile.stages, table_ref, count_ref, chunk_ref[0], None, None, full, empty)

        def steps(batch, row, rows):
            """First and end step of the keys that `rows` queries from `row` on may see."""
            end = pl.cdiv(lax.min(offset + row + rows, jnp.int32(key_length)), tile.step)
            if starts_ref is None:
                return jnp.int32(0), end
            start = starts_ref[batch, row]
            first = lax.div(start, jnp.int32(tile.step))
            return jnp.where(start < key_length, lax.min(first, end), end), end

        def place(entry):
            head = lax.div(entry, jnp.int32(q_tiles))
            row = lax.rem(entry, jnp.int32(q_tiles)) * tile.rows
            first, end = steps(lax.div(head, jnp.int32(heads)), row, tile.rows)
            return Place(head, row, first, end, heads)

        def passing(place, step, slot):
            key = step * tile.step
            batch, head = place.at
            for columns, number, slots in zip(keys, numbers, k_slots):
                rows = pl.ds(key, tile.step)
                yield columns.at(operands[number], batch, rows, head), slots.at[slot]
            key_tile = lax.div(key, jnp.int32(SIDE))
            rows = pl.ds(lax.rem(key, jnp.int32(SIDE)), tile.step)
            for number in range(tile.rows // SIDE):
                # What no query sees, and was never written, is copied and not multiplied.
                q_tile = lax.min(
                    lax.div(place.row, jnp.int32(SIDE)) + number, jnp.int32(kept.query_tiles - 1)
                )
                at = kept.tile(place.head - first_kept, key_tile, q_tile)
                for half in range(2):
                    yield ds_ref.at[at, half, rows], ds_slots.at[slot, number, half]

        @pl.when(thread == MATH_WARPGROUPS)
        def _load():
            ring.load(tile.memory_registers, place, passing)

        @pl.when(thread < MATH_WARPGROUPS)
        def _multiply():
            ring.begin(tile.math_registers)

            def one_tile(entry, done):
                my = place(entry)
                my_row = my.row + thread * (64 * tile.waves)
                begin, end = (
                    lax.clamp(my.first, step, my.end)
                    for step in steps(my.at[0], my_row, 64 * tile.waves)
                )
                pieces = [(thread * tile.waves + wave) for wave in range(tile.waves)]

                def one_step(step, held, sum_refs):
                    sums = [Sum(ref, one) for ref, one in zip(sum_refs, held)]
                    left = iter(sums)
                    at = ring.slot(done + step - my.first)
                    plgpu.barrier_wait(ring.full.at[at])
                    for piece in pieces:
                        half = ds_slots.at[
                            at, lax.div(piece, jnp.int32(2)), lax.rem(piece, jnp.int32(2))
                        ]
                        for k in k_slots:
                            next(left).add(half.T, k.at[at])
                    settle()
                    plgpu.barrier_arrive(ring.empty.at[at])
                    return tuple(one.held for one in sums)

                widths = [columns.width for _ in pieces for columns in keys]

                def run(*sum_refs):
                    ring.skip(my.first, begin, done - my.first)
                    like = plgpu.layout_cast(jnp.zeros((64,), jnp.float32), ROWS)
                    held = tuple(Sum.nothing(like, width) for width in widths)
                    add = functools.partial(one_step, sum_refs=sum_refs)
                    held = lax.fori_loop(begin, end, add, held)
                    ring.skip(end, my.end, done - my.first)
                    return [Sum(ref, one).value() for ref, one in zip(sum_refs, held)]

                accumulators = [plgpu.ACC((64, width), jnp.float32) for width in widths]
                sums = iter(pl.run_scoped(run, *accumulators))
                results = [
                    (next(sums) * given.scale, rows_of(dq_ref, my, my_row + left, columns.first))
                    for left in range(0, 64 * tile.waves, 64)
                    for columns in q_columns
                ]
                store(results, out_slots.at[thread])
                return my.end - my.first

            ring.over_tiles(one_tile)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    operands = [ds, jnp.reshape(chunk, 1), *lists, *given.offset.operands]
    if starts is not None:
        operands.append(starts)
    narrow = narrow_of((*keys, given.values))
    hopper.kernel(
        kernel,
        out_type=(),
        scratch_types=(
            *(buffer(tile.stages, tile.step, columns.width, narrow=narrow) for columns in keys),
            buffer(tile.stages, tile.rows // SIDE, 2, tile.step, SIDE // 2, narrow=narrow),
            buffer(MATH_WARPGROUPS, 1, 64, narrow, narrow=narrow),
            plgpu.Barrier(
                num_arrivals=len(keys) + 2 * (tile.rows // SIDE), num_barriers=tile.stages
            ),
            plgpu.Barrier(num_arrivals=MATH_WARPGROUPS, num_barriers=tile.stages),
        ),
        kernel_name="attention_query_products",
        **launch(lists),
    )(*operands, *arrays, into)
