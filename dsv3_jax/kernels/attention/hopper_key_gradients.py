"""dK and dV of causal attention on Hopper, and the dS that dQ is made of.

A block keeps a tile of keys and values, and queries pass by. It works on transposed tiles: P^T
leaves the tensor core in the registers from which dV's product reads its left operand. What is
constant along a row of the logits, the log-sum-exp and D, is where the sums of S and dP start from,
and takes no registers of its own.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import hopper
from dsv3_jax.kernels.attention.hopper_kept import Kept
from dsv3_jax.kernels.attention.hopper_parts import (
    COLUMNS,
    LOG2_E,
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
from dsv3_jax.kernels.attention.hopper_products import (
    Product,
    Sum,
    in_pairs,
    multiply,
    opaque,
    settle,
    widened,
)
from dsv3_jax.kernels.attention.hopper_ring import (
    BackwardTile,
    Given,
    Place,
    Ring,
    rows_of,
)
from dsv3_jax.kernels.hopper import WGMMA, plgpu


def work(given: Given, bounds: Sequence[int], tile: BackwardTile) -> Lists:
    """The lists of key tiles, for chunk after chunk of heads."""
    steps = pl.cdiv(given.length, tile.step)
    return Lists.of(
        [
            steps - min(max(row - given.guess, 0) // tile.step, steps)
            for row in range(0, given.key_length, tile.stay)
        ],
        bounds,
        2 * given.length * (given.q.shape[-1] + given.values.width),
    )


def key_gradients(
    into: Sequence[Any],
    given: Given,
    lists: Lists,
    tile: BackwardTile,
    kept: Kept | None = None,
    chunk: Any = 0,
) -> Any:
    """Writes the gradients of the arrays that the keys and the values are columns of to `into`.

    Those are refs in the order of `unique`, and hold the gradient for each head, [B, S, N, D], also
    of an array that all heads share. With `kept` the dS of the chunk's heads is returned, laid out
    as it says: every tile with a pair that is seen is whole. dK takes a step's dS from shared
    memory, and is added to behind the logits of the next step, whose exponentials run under it; a
    step's slot is handed back after that, so that the ring needs two at least, and wants three.
    """
    q, keys, values, dout = given.q, given.keys, given.values, given.dout
    heads, value_dim = q.shape[2], values.width
    key_tiles, q_steps = pl.cdiv(given.key_length, tile.stay), pl.cdiv(given.length, tile.step)
    arrays, numbers = unique((*keys, values))
    q_columns = beside(q, keys)
    ends = in_whole_tiles(given.ends, tile.stay)
    narrow = narrow_of((*keys, values), tile.step)
    together = 1 if kept is None else kept.steps_of(tile.step)

    def kernel(*refs):
        refs = Refs(refs)
        q_ref, dout_ref, start_s_ref, start_dp_ref, table_ref, count_ref = refs.some(6)
        offset_ref, ends_ref = refs.one(given.offset.static is None), refs.one(ends is not None)
        chunk_ref = refs.one(kept is not None)
        operands, outs = refs.some(len(arrays)), refs.some(len(arrays))
        ds_ref = refs.one(kept is not None)
        k_slots, q_slots = refs.some(len(keys)), refs.one()
        v_slot, do_slots, s_slots, dp_slots, out_slots = refs.some(5)
        thread = lax.axis_index("warpgroup")
        offset = given.offset.read(offset_ref)
        current = 0 if chunk_ref is None else chunk_ref[0]
        first_kept = None if kept is None else kept.first(current)
        ring = Ring(tile.stages, table_ref, count_ref, current, *refs.rest())

        def place(entry):
            head = lax.div(entry, jnp.int32(key_tiles))
            row = lax.rem(entry, jnp.int32(key_tiles)) * tile.stay
            first = lax.div(lax.max(row - offset, 0), jnp.int32(tile.step * together)) * together
            end = jnp.int32(q_steps)
            if ends_ref is not None:
                last = ends_ref[lax.div(head, jnp.int32(heads)), row + tile.stay - 1]
                end = lax.min(pl.cdiv(last, tile.step * together) * together, end)
            first = lax.min(first, end)  # keys that no query sees take no step, and get zeros
            return Place(head, row, first, end, heads)

        def staying(place):
            rows = pl.ds(place.row, tile.stay)
            batch, head = place.at
            for columns, number, slot in zip((*keys, values), numbers, (*k_slots, v_slot)):
                yield columns.at(operands[number], batch, rows, head), slot

        def passing(place, step, slot):
            rows = pl.ds(step * tile.step, tile.step)
            batch, head = place.at
            yield q_ref.at[batch, rows, head], q_slots.at[slot]
            yield dout_ref.at[batch, rows, head], do_slots.at[slot]
            yield start_s_ref.at[batch, head, rows], s_slots.at[slot]
            yield start_dp_ref.at[batch, head, rows], dp_slots.at[slot]

        @pl.when(thread == MATH_WARPGROUPS)
        def _load():
            ring.load(tile.memory_registers, place, passing, staying)

        @pl.when(thread < MATH_WARPGROUPS)
        def _multiply():
            ring.begin(tile.math_registers)

            def one_tile(entry, done):
                my = place(entry)
                first, end = my.first, my.end
                batch = my.at[0]
                my_row = my.row + thread * 64
                # The first step in which one of my keys is seen, and the first in which all are.
                begin = lax.div(lax.max(my_row - offset, 0), jnp.int32(tile.step))
                begin = lax.clamp(first, begin, end)
                whole = pl.cdiv(lax.max(my_row + 63 - offset, 0), tile.step)
                whole = lax.clamp(begin, whole, end)
                tail, my_ends = end, None
                if ends_ref is not None:
                    rows = ends_ref.at[batch, pl.ds(my_row, 64)]
                    my_ends = plgpu.load(rows, layout=ROWS, optimized=False)
                    tail = lax.div(ends_ref[batch, my_row], jnp.int32(tile.step))
                    tail = lax.clamp(whole, tail, end)

                def hide(s, step):
                    """Logits with -inf where a query does not see a key; keys are rows."""
                    key_of, query_of = (
                        plgpu.broadcasted_iota(jnp.int32, s.shape, dim, layout=WGMMA)
                        for dim in (0, 1)
                    )
                    query = step * tile.step
                    visible = key_of - query_of <= query + offset - my_row
                    if my_ends is not None:
                        my_end = lax.broadcast_in_dim(my_ends, s.shape, [0])
                        visible &= query_of + query < my_end
                    return jnp.where(visible, s, -jnp.inf)

                def from_columns(slots, at):
                    """One number a query in every row, from a slot."""
                    numbers = plgpu.load(slots.at[at], layout=COLUMNS)
                    return lax.broadcast_in_dim(numbers, (64, tile.step), [1])

                def keep(ds, step):
                    """dS of my keys, to shared memory and from there to device memory."""
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    for piece, left in enumerate(range(0, tile.step, narrow)):
                        out_slots.at[thread, piece][...] = ds[:, left : left + narrow]
                    plgpu.commit_smem()
                    if kept is not None:
                        *at, query = kept.at(my.head - first_kept, my.row, step * tile.step)
                        rows = pl.ds(thread * 64, 64)
                        for piece, left in enumerate(range(0, tile.step, narrow)):
                            target = ds_ref.at[*at, rows, pl.ds(query + left, narrow)]
                            plgpu.copy_smem_to_gmem(out_slots.at[thread, piece], target)

                def keep_nothing(step):
                    nothing = jnp.zeros((64, tile.step), jnp.bfloat16)
                    keep(plgpu.layout_cast(nothing, WGMMA), step)

                def add_keys(dk, at):
                    """Starts what dS gives to dK; returns how many products that puts in flight."""
                    return sum(
                        dk.add(out_slots.at[thread, piece], q_slots.at[at, pl.ds(left, narrow)])
                        for piece, left in enumerate(range(0, tile.step, narrow))
                    )

                def one_step(step, held, sum_refs, hidden, first_step=False):
                    sums = [Sum(ref, one) for ref, one in zip(sum_refs, held)]
                    dk, dv = sums
                    now = done + step - first
                    at, before = ring.slot(now), ring.slot(now - 1)
                    mine = pl.ds(opaque(thread) * 64, 64)
                    plgpu.barrier_wait(ring.full.at[at])
                    pairs = [
                        (k.at[mine], q_slots.at[at, :, pl.ds(q.first, q.width)])
                        for k, q in zip(k_slots, q_columns)
                    ]
                    then = (lambda: 0) if first_step else lambda: add_keys(dk, before)
                    (s,) = multiply([Product(pairs, from_columns(s_slots, at))], then)
                    s = hide(s, step) if hidden else s
                    p = in_pairs(jnp.exp2(s * (given.scale * LOG2_E)).astype(jnp.bfloat16))
                    product = Product(
                        [(v_slot.at[mine], do_slots.at[at])], from_columns(dp_slots, at)
                    )
                    (dp,) = multiply([product], lambda: dv.add(p, do_slots.at[at]))
                    if not first_step:
                        plgpu.barrier_arrive(ring.empty.at[before])
                    keep((widened(p) * dp).astype(jnp.bfloat16), step)
                    settle()
                    return tuple(one.held for one in sums)

                def last(step, held, sum_refs):
                    sums = [Sum(ref, one) for ref, one in zip(sum_refs, held)]
                    at = ring.slot(done + step - first)
                    add_keys(sums[0], at)
                    settle()
                    plgpu.barrier_arrive(ring.empty.at[at])
                    return tuple(one.held for one in sums)

                widths = [q.shape[-1], value_dim]

                def run(*sum_refs):
                    plgpu.barrier_wait(ring.there)
                    ring.skip(first, begin, done - first, keep_nothing)
                    plain = functools.partial(one_step, sum_refs=sum_refs, hidden=False)
                    hiding = functools.partial(one_step, sum_refs=sum_refs, hidden=True)
                    start = functools.partial(hiding, first_step=True)
                    like = plgpu.layout_cast(jnp.zeros((64,), jnp.float32), ROWS)
                    held = tuple(Sum.nothing(like, width) for width in widths)
                    second = lax.min(begin + 1, end)
                    held = lax.fori_loop(begin, second, start, held)
                    held = lax.fori_loop(second, whole, hiding, held)
                    held = lax.fori_loop(lax.max(second, whole), tail, plain, held)
                    if my_ends is not None:
                        held = lax.fori_loop(lax.max(second, tail), end, hiding, held)
                    finish = functools.partial(last, sum_refs=sum_refs)
                    held = lax.fori_loop(lax.max(begin, end - 1), end, finish, held)
                    plgpu.barrier_arrive(ring.free)
                    return [Sum(ref, one).value() for ref, one in zip(sum_refs, held)]

                accumulators = [plgpu.ACC((64, width), jnp.float32) for width in widths]
                dk, dv = pl.run_scoped(run, *accumulators)
                dk = dk * given.scale
                sums = [dk[:, q.first : q.first + q.width] for q in q_columns]
                pieces = [
                    (total, rows_of(outs[number], my, my_row, columns.first))
                    for columns, number, total in zip((*keys, values), numbers, (*sums, dv))
                ]
                store(pieces, out_slots.at[thread])
                return end - first

            ring.over_tiles(one_tile)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    operands = [q, dout, given.start_s, given.start_dp, *lists, *given.offset.operands]
    if ends is not None:
        operands.append(ends)
    if kept is not None:
        operands.append(jnp.reshape(chunk, 1))
    return hopper.kernel(
        kernel,
        out_type=() if kept is None else jax.ShapeDtypeStruct(kept.shape, jnp.bfloat16),
        scratch_types=(
            *(buffer(tile.stay, columns.width, narrow=narrow) for columns in keys),
            buffer(tile.stages, tile.step, q.shape[-1], narrow=narrow),
            buffer(tile.stay, value_dim, narrow=narrow),
            buffer(tile.stages, tile.step, value_dim, narrow=narrow),
            plgpu.SMEM((tile.stages, tile.step), jnp.float32),
            plgpu.SMEM((tile.stages, tile.step), jnp.float32),
            buffer(MATH_WARPGROUPS, tile.step // narrow, 64, narrow, narrow=narrow),
            plgpu.Barrier(num_arrivals=len(keys) + 1),
            plgpu.Barrier(num_arrivals=MATH_WARPGROUPS),
            plgpu.Barrier(num_arrivals=4, num_barriers=tile.stages),
            plgpu.Barrier(num_arrivals=MATH_WARPGROUPS, num_barriers=tile.stages),
        ),
        kernel_name="attention_key_gradients",
        **launch(lists),
    )(*operands, *arrays, *into)
