"""The backward pass of causal attention on Hopper, in Pallas Mosaic GPU: two kernels.

With P the probabilities, of rows t and columns s, and D the rows' sums of dO x O:

    dV = P^T dO    dP = dO V^T    dS = P x (dP - D)    dK = scale dS^T Q    dQ = scale dS K

`key_gradients` holds a tile of keys and values and walks over queries, `query_gradients` holds
queries and walks over keys. Both form the logits again, 1152 operations a pair of tokens and head
where one kernel needs 832; in exchange each sum has one owner, so that results are the same in
every run, and nothing is added up in memory.

`key_gradients` works on transposed tiles: P^T and dS^T leave the tensor core in the registers from
which the next product reads its left operand. What is constant along a row of the logits, the
log-sum-exp and D, is where the sums of S and dP start from, and takes no registers of its own.

Letters: B batch, T query rows, S key rows, N heads, P width of queries and keys, U of values.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels.attention.hopper_parts import (
    COLUMNS,
    LOG2_E,
    MATH_WARPGROUPS,
    ROWS,
    Columns,
    Lists,
    Offset,
    Product,
    Refs,
    Sum,
    arrive_at,
    beside,
    buffer,
    launch,
    multiply,
    opaque,
    over_tiles,
    settle,
    store,
    unique,
    wait_for,
)
from dsv3_jax.kernels.gemm.hopper import WGMMA, plgpu


@dataclass(frozen=True)
class BackwardTile:
    """Sizes of one block's work: 128 rows that stay, and `step` rows that pass by.

    `dp_parts`: pieces in which `key_gradients` forms dP, whose registers are then fewer.
    """

    step: int = 64
    stages: int = 3
    dp_parts: int = 1
    store_buffers: int = 1
    memory_registers: int = 24
    math_registers: int = 240

    @property
    def stay(self) -> int:
        """Rows that stay."""
        return 64 * MATH_WARPGROUPS


def shared_memory(tile: BackwardTile, key_dim: int, value_dim: int) -> int:
    """Bytes of shared memory that a block needs, of the kernel that needs more."""
    ring = tile.stages * (tile.step * (key_dim + value_dim) * 2 + 2 * 4 * tile.step)
    staging = tile.store_buffers * tile.stay * 64 * 2
    return tile.stay * (key_dim + value_dim) * 2 + ring + staging + 2048


class _Work(NamedTuple):
    """How a block goes through its tiles: rows that stay, and a ring of slots for others."""

    tile: BackwardTile
    table: Any
    count: Any
    kept: Any  # what stays is there
    free: Any  # and is done with
    full: Any  # a slot holds what passes by
    empty: Any  # and is done with

    def slot(self, step: Any) -> Any:
        """The slot of a step, counted over all tiles."""
        return lax.rem(step, jnp.int32(self.tile.stages))

    def load(self, place: Callable, staying: Callable, passing: Callable) -> None:
        """The memory warpgroup.

        staying(batch, head, row) and passing(batch, head, step) tell what to copy into which
        buffer, of which a slot for what passes by.
        """
        plgpu.set_max_registers(self.tile.memory_registers, action="decrease")

        def one_tile(entry, done):
            index, head, row, first, end = place(entry)
            plgpu.barrier_wait(self.free)
            for source, target in staying(index, head, row):
                plgpu.copy_gmem_to_smem(source, target, self.kept)

            @pl.loop(first, end)
            def _(step):
                slot = self.slot(done + step - first)
                plgpu.barrier_wait(self.empty.at[slot])
                for source, target in passing(index, head, step):
                    plgpu.copy_gmem_to_smem(source, target.at[slot], self.full.at[slot])

            return end - first

        over_tiles(self.table, self.count, one_tile)
        plgpu.barrier_wait(self.free)
        wait_for((self.empty,), self.tile.stages)

    def begin(self) -> None:
        """What a math warpgroup does first: takes its registers, and hands back what it owns."""
        plgpu.set_max_registers(self.tile.math_registers, action="increase")
        plgpu.barrier_arrive(self.free)
        arrive_at((self.empty,), self.tile.stages)

    def skip(self, first: Any, end: Any, before: Any) -> None:
        """Hands back what passes by in steps that are no concern of a math warpgroup."""

        @pl.loop(first, end)
        def _(step):
            at = self.slot(before + step)
            plgpu.barrier_wait(self.full.at[at])
            plgpu.barrier_arrive(self.empty.at[at])


def key_gradients(
    q: Float[Array, "B T N P"],
    keys: tuple[Columns, ...],
    values: Columns,
    dout: Float[Array, "B T N U"],
    start_s: Float[Array, "B N T"],
    start_dp: Float[Array, "B N T"],
    offset: int | Int[Array, ""],
    ends: Int[Array, "B S"] | None,
    scale: float,
    tile: BackwardTile,
) -> list[Array]:
    """The gradients of the arrays that `keys` and `values` are columns of, in that order.

    An array that all heads share has its gradient for each head: [B, S, N, D].
    start_s is -lse / scale and start_dp is -D, with T padded to a multiple of `tile.step`. Key s is
    seen by the queries from s - offset to ends[s] (T without).
    """
    batch, length, heads, _ = q.shape
    key_length, value_dim = values.array.shape[1], values.width
    key_tiles, q_steps = pl.cdiv(key_length, tile.stay), pl.cdiv(length, tile.step)
    place_of_first = Offset.of(offset)
    guess = place_of_first.guess(length, key_length)
    steps = [
        q_steps - min(max(i * tile.stay - guess, 0) // tile.step, q_steps) for i in range(key_tiles)
    ]
    lists = Lists.of(steps, batch * heads, 2 * length * (q.shape[-1] + value_dim))
    arrays, numbers = unique((*keys, values))
    q_columns = beside(q, keys)
    if ends is not None:
        ends = jnp.pad(ends, ((0, 0), (0, key_tiles * tile.stay - key_length)), mode="edge")

    def kernel(*refs):
        refs = Refs(refs)
        q_ref, dout_ref, start_s_ref, start_dp_ref, table_ref, count_ref = refs.some(6)
        offset_ref, ends_ref = refs.one(place_of_first.static is None), refs.one(ends is not None)
        operands, outs = refs.some(len(arrays)), refs.some(len(arrays))
        k_slots, q_slots = refs.some(len(keys)), refs.some(len(keys))
        v_slot, do_slots, s_slots, dp_slots, out_slots = refs.some(5)
        thread = lax.axis_index("warpgroup")
        offset_ = place_of_first.read(offset_ref)
        work = _Work(tile, table_ref, count_ref, *refs.rest())

        def place(entry):
            """Batch, head, first row, and first and end step of a tile."""
            key_tile = lax.rem(entry, jnp.int32(key_tiles))
            batch_head = lax.div(entry, jnp.int32(key_tiles))
            index = lax.div(batch_head, jnp.int32(heads))
            row = key_tile * tile.stay
            first = lax.div(lax.max(row - offset_, 0), jnp.int32(tile.step))
            end = jnp.int32(q_steps)
            if ends_ref is not None:
                end = pl.cdiv(ends_ref[index, row + tile.stay - 1], tile.step)
            first = lax.min(first, end)  # keys that no query sees take no step, and get zeros
            return index, lax.rem(batch_head, jnp.int32(heads)), row, first, end

        def staying(index, head, row):
            rows = pl.ds(row, tile.stay)
            for columns, number, slot in zip((*keys, values), numbers, (*k_slots, v_slot)):
                yield columns.at(operands[number], index, rows, head), slot

        def passing(index, head, step):
            rows = pl.ds(step * tile.step, tile.step)
            for columns, slots in zip(q_columns, q_slots):
                yield columns.at(q_ref, index, rows, head), slots
            yield dout_ref.at[index, rows, head], do_slots
            yield start_s_ref.at[index, head, rows], s_slots
            yield start_dp_ref.at[index, head, rows], dp_slots

        @pl.when(thread == MATH_WARPGROUPS)
        def _load():
            work.load(place, staying, passing)

        @pl.when(thread < MATH_WARPGROUPS)
        def _multiply():
            work.begin()

            def one_tile(entry, done):
                index, head, row, first, end = place(entry)
                my_row = row + thread * 64
                # The first step in which one of my keys is seen, and the first in which all are.
                begin = lax.div(lax.max(my_row - offset_, 0), jnp.int32(tile.step))
                begin = lax.clamp(first, begin, end)
                whole = pl.cdiv(lax.max(my_row + 63 - offset_, 0), tile.step)
                whole = lax.clamp(begin, whole, end)
                tail, my_ends = end, None
                if ends_ref is not None:
                    rows = ends_ref.at[index, pl.ds(my_row, 64)]
                    my_ends = plgpu.load(rows, layout=ROWS, optimized=False)
                    tail = lax.div(ends_ref[index, my_row], jnp.int32(tile.step))
                    tail = lax.clamp(whole, tail, end)

                def hide(s, step):
                    """Logits with -inf where a query does not see a key; keys are rows."""
                    key_of, query_of = (
                        plgpu.broadcasted_iota(jnp.int32, s.shape, dim, layout=WGMMA)
                        for dim in (0, 1)
                    )
                    query = step * tile.step
                    visible = key_of - query_of <= query + offset_ - my_row
                    if my_ends is not None:
                        my_end = lax.broadcast_in_dim(my_ends, s.shape, [0])
                        visible &= query_of + query < my_end
                    return jnp.where(visible, s, -jnp.inf)

                def one_step(step, held, sum_refs, hidden):
                    sums = [Sum(ref, one) for ref, one in zip(sum_refs, held)]
                    *dk, dv = sums
                    at = work.slot(done + step - first)
                    mine = pl.ds(opaque(thread) * 64, 64)
                    plgpu.barrier_wait(work.full.at[at])

                    def from_columns(slots, left, width):
                        numbers = plgpu.load(slots.at[at, pl.ds(left, width)], layout=COLUMNS)
                        return lax.broadcast_in_dim(numbers, (64, width), [1])

                    pairs = [(k.at[mine], q.at[at]) for k, q in zip(k_slots, q_slots)]
                    (s,) = multiply([Product(pairs, from_columns(s_slots, 0, tile.step))])
                    s = hide(s, step) if hidden else s
                    p = jnp.exp2(s * (scale * LOG2_E)).astype(jnp.bfloat16)
                    ds, width = [], tile.step // tile.dp_parts
                    for left in range(0, tile.step, width):
                        pairs = [(v_slot.at[mine], do_slots.at[at, pl.ds(left, width)])]
                        start = from_columns(dp_slots, left, width)
                        last = left + width == tile.step
                        then = (lambda: dv.add(p, do_slots.at[at])) if last else lambda: 0
                        (dp,) = multiply([Product(pairs, start)], then)
                        part = p[:, left : left + width].astype(jnp.float32)
                        ds.append((part * dp).astype(jnp.bfloat16))
                    ds = ds[0] if len(ds) == 1 else jnp.concatenate(ds, axis=1)
                    for total, q in zip(dk, q_slots):
                        total.add(ds, q.at[at])
                    settle()
                    plgpu.barrier_arrive(work.empty.at[at])
                    return tuple(one.held for one in sums)

                widths = [*(columns.width for columns in keys), value_dim]

                def run(*sum_refs):
                    plgpu.barrier_wait(work.kept)
                    work.skip(first, begin, done - first)
                    plain = functools.partial(one_step, sum_refs=sum_refs, hidden=False)
                    hiding = functools.partial(one_step, sum_refs=sum_refs, hidden=True)
                    like = plgpu.layout_cast(jnp.zeros((64,), jnp.float32), ROWS)
                    held = tuple(Sum.nothing(like, width) for width in widths)
                    held = lax.fori_loop(begin, whole, hiding, held)
                    held = lax.fori_loop(whole, tail, plain, held)
                    if my_ends is not None:
                        held = lax.fori_loop(tail, end, hiding, held)
                    plgpu.barrier_arrive(work.free)
                    return [Sum(ref, one).value() for ref, one in zip(sum_refs, held)]

                accumulators = [plgpu.ACC((64, width), jnp.float32) for width in widths]
                sums = pl.run_scoped(run, *accumulators)
                for columns, number, total in zip((*keys, values), numbers, sums):
                    out = functools.partial(
                        _rows_of, outs[number], index, my_row, head, columns.first
                    )
                    total = total if columns is values else total * scale
                    store(total, out, out_slots.at[thread])
                return end - first

            over_tiles(table_ref, count_ref, one_tile)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    operands = [q, dout, start_s, start_dp, *lists, *place_of_first.operands]
    if ends is not None:
        operands.append(ends)
    narrow = math.gcd(value_dim, 64, *(columns.width for columns in keys))
    return plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((batch, key_length, heads, array.shape[-1]), jnp.bfloat16)
            for array in arrays
        ],
        scratch_types=(
            *(buffer(tile.stay, columns.width) for columns in keys),
            *(buffer(tile.stages, tile.step, columns.width) for columns in keys),
            buffer(tile.stay, value_dim),
            buffer(tile.stages, tile.step, value_dim),
            plgpu.SMEM((tile.stages, tile.step), jnp.float32),
            plgpu.SMEM((tile.stages, tile.step), jnp.float32),
            buffer(MATH_WARPGROUPS, tile.store_buffers, 64, narrow),
            plgpu.Barrier(num_arrivals=len(keys) + 1),
            plgpu.Barrier(num_arrivals=MATH_WARPGROUPS),
            plgpu.Barrier(num_arrivals=len(keys) + 3, num_barriers=tile.stages),
            plgpu.Barrier(num_arrivals=MATH_WARPGROUPS, num_barriers=tile.stages),
        ),
        kernel_name="attention_key_gradients",
        **launch(lists),
    )(*operands, *arrays)


def query_gradients(
    q: Float[Array, "B T N P"],
    keys: tuple[Columns, ...],
    values: Columns,
    dout: Float[Array, "B T N U"],
    start_s: Float[Array, "B N T"],
    start_dp: Float[Array, "B N T"],
    offset: int | Int[Array, ""],
    starts: Int[Array, "B T"] | None,
    scale: float,
    tile: BackwardTile,
) -> Float[Array, "B T N P"]:
    """dQ, in bfloat16; the operands are those of `attend` and `key_gradients`, T padded to 128."""
    batch, length, heads, _ = q.shape
    key_length, value_dim = values.array.shape[1], values.width
    q_tiles = pl.cdiv(length, tile.stay)
    place_of_first = Offset.of(offset)
    guess = place_of_first.guess(length, key_length)
    steps = [
        pl.cdiv(min(guess + (i + 1) * tile.stay, key_length), tile.step) for i in range(q_tiles)
    ]
    lists = Lists.of(steps, batch * heads, 2 * key_length * (q.shape[-1] + value_dim))
    arrays, numbers = unique((*keys, values))
    q_columns = beside(q, keys)
    if starts is not None:
        starts = jnp.pad(starts, ((0, 0), (0, q_tiles * tile.stay - length)), mode="edge")

    def kernel(*refs):
        refs = Refs(refs)
        q_ref, dout_ref, start_s_ref, start_dp_ref, table_ref, count_ref = refs.some(6)
        offset_ref, starts_ref = (
            refs.one(place_of_first.static is None),
            refs.one(starts is not None),
        )
        operands, dq_ref = refs.some(len(arrays)), refs.one()
        q_slots, k_slots = refs.some(len(keys)), refs.some(len(keys))
        do_slot, v_slots, out_slots = refs.some(3)
        thread = lax.axis_index("warpgroup")
        offset_ = place_of_first.read(offset_ref)
        work = _Work(tile, table_ref, count_ref, *refs.rest())

        def place(entry):
            """Batch, head, first row, and first and end step of a tile."""
            q_tile = lax.rem(entry, jnp.int32(q_tiles))
            batch_head = lax.div(entry, jnp.int32(q_tiles))
            index = lax.div(batch_head, jnp.int32(heads))
            row = q_tile * tile.stay
            end = lax.min(offset_ + row + tile.stay, jnp.int32(key_length))
            first = jnp.int32(0)
            if starts_ref is not None:
                first = lax.div(starts_ref[index, row], jnp.int32(tile.step))
            return index, lax.rem(batch_head, jnp.int32(heads)), row, first, pl.cdiv(end, tile.step)

        def staying(index, head, row):
            rows = pl.ds(row, tile.stay)
            for columns, slot in zip(q_columns, q_slots):
                yield columns.at(q_ref, index, rows, head), slot
            yield dout_ref.at[index, rows, head], do_slot

        def passing(index, head, step):
            rows = pl.ds(step * tile.step, tile.step)
            for columns, number, slots in zip((*keys, values), numbers, (*k_slots, v_slots)):
                yield columns.at(operands[number], index, rows, head), slots

        @pl.when(thread == MATH_WARPGROUPS)
        def _load():
            work.load(place, staying, passing)

        @pl.when(thread < MATH_WARPGROUPS)
        def _multiply():
            work.begin()

            def one_tile(entry, done):
                index, head, row, first, end = place(entry)
                my_row = row + thread * 64
                # The end of the steps in which one of my queries sees a key, and in which all do.
                last = pl.cdiv(offset_ + my_row + 64, tile.step)
                last = lax.clamp(first, last, end)
                whole = lax.div(offset_ + my_row + 1, jnp.int32(tile.step))
                whole = lax.clamp(first, whole, last)
                seen, start = first, None
                if starts_ref is not None:
                    rows = starts_ref.at[index, pl.ds(my_row, 64)]
                    start = plgpu.load(rows, layout=ROWS, optimized=False)
                    latest = pl.cdiv(starts_ref[index, my_row + 63], tile.step)
                    seen = lax.clamp(first, latest, whole)
                my_rows = pl.ds(my_row, 64)
                start_s, start_dp = (
                    plgpu.load(ref.at[index, head, my_rows], layout=ROWS, optimized=False)
                    for ref in (start_s_ref, start_dp_ref)
                )

                def hide(s, step):
                    """Logits with -inf where a query does not see a key."""
                    query_of, key_of = (
                        plgpu.broadcasted_iota(jnp.int32, s.shape, dim, layout=WGMMA)
                        for dim in (0, 1)
                    )
                    key = step * tile.step
                    visible = query_of - key_of >= key - my_row - offset_
                    if start is not None:
                        visible &= key_of + key >= lax.broadcast_in_dim(start, s.shape, [0])
                    return jnp.where(visible, s, -jnp.inf)

                def one_step(step, held, sum_refs, hidden):
                    sums = [Sum(ref, one) for ref, one in zip(sum_refs, held)]
                    at = work.slot(done + step - first)
                    mine = pl.ds(opaque(thread) * 64, 64)
                    plgpu.barrier_wait(work.full.at[at])
                    s_start, dp_start = (
                        lax.broadcast_in_dim(start, (64, tile.step), [0])
                        for start in (start_s, start_dp)
                    )
                    pairs = [(q.at[mine], k.at[at]) for q, k in zip(q_slots, k_slots)]
                    dp_pairs = [(do_slot.at[mine], v_slots.at[at])]
                    s, dp = multiply([Product(pairs, s_start), Product(dp_pairs, dp_start)])
                    s = hide(s, step) if hidden else s
                    p = jnp.exp2(s * (scale * LOG2_E))
                    ds = (p * dp).astype(jnp.bfloat16)
                    for total, k in zip(sums, k_slots):
                        total.add(ds, k.at[at])
                    settle()
                    plgpu.barrier_arrive(work.empty.at[at])
                    return tuple(one.held for one in sums)

                def run(*sum_refs):
                    plgpu.barrier_wait(work.kept)
                    plain = functools.partial(one_step, sum_refs=sum_refs, hidden=False)
                    hiding = functools.partial(one_step, sum_refs=sum_refs, hidden=True)
                    held = tuple(Sum.nothing(start_s, one.width) for one in keys)
                    if start is not None:
                        held = lax.fori_loop(first, seen, hiding, held)
                    held = lax.fori_loop(seen, whole, plain, held)
                    held = lax.fori_loop(whole, last, hiding, held)
                    work.skip(last, end, done - first)
                    plgpu.barrier_arrive(work.free)
                    return [Sum(ref, one).value() for ref, one in zip(sum_refs, held)]

                accumulators = [plgpu.ACC((64, one.width), jnp.float32) for one in keys]
                sums = pl.run_scoped(run, *accumulators)
                for columns, total in zip(q_columns, sums):
                    out = functools.partial(_rows_of, dq_ref, index, my_row, head, columns.first)
                    store(total * scale, out, out_slots.at[thread])
                return end - first

            over_tiles(table_ref, count_ref, one_tile)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    operands = [q, dout, start_s, start_dp, *lists, *place_of_first.operands]
    if starts is not None:
        operands.append(starts)
    narrow = math.gcd(64, *(columns.width for columns in keys))
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(q.shape, jnp.bfloat16),
        scratch_types=(
            *(buffer(tile.stay, columns.width) for columns in keys),
            *(buffer(tile.stages, tile.step, columns.width) for columns in keys),
            buffer(tile.stay, value_dim),
            buffer(tile.stages, tile.step, value_dim),
            buffer(MATH_WARPGROUPS, tile.store_buffers, 64, narrow),
            plgpu.Barrier(num_arrivals=len(keys) + 1),
            plgpu.Barrier(num_arrivals=MATH_WARPGROUPS),
            plgpu.Barrier(num_arrivals=len(keys) + 1, num_barriers=tile.stages),
            plgpu.Barrier(num_arrivals=MATH_WARPGROUPS, num_barriers=tile.stages),
        ),
        kernel_name="attention_query_gradients",
        **launch(lists),
    )(*operands, *arrays)


def _rows_of(ref, index, row, head, first, left, width):
    return ref.at[index, pl.ds(row, 64), head, pl.ds(first + left, width)]
