"""dQ of causal attention on Hopper, with the logits formed again.

A block keeps a tile of queries, and keys and values pass by. For rows so long that not one head's
dS may be kept (`hopper_kept`).
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import hopper
from dsv3_jax.kernels.attention.hopper_parts import (
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
from dsv3_jax.kernels.attention.hopper_products import Product, Sum, multiply, opaque, settle
from dsv3_jax.kernels.attention.hopper_ring import (
    BackwardTile,
    Given,
    Place,
    Ring,
    rows_of,
)
from dsv3_jax.kernels.hopper import WGMMA, plgpu


def work(given: Given, bounds: Sequence[int], tile: BackwardTile) -> Lists:
    """The lists of query tiles, for chunk after chunk of heads."""
    steps = given.offset.steps(given.length, given.key_length, tile.stay, tile.step)
    return Lists.of(steps, bounds, 2 * given.key_length * (given.q.shape[-1] + given.values.width))


def query_gradients(into: Any, given: Given, lists: Lists, tile: BackwardTile) -> None:
    """Writes dQ in bfloat16 to the ref `into`, for the heads of `lists`."""
    q, keys, values, dout = given.q, given.keys, given.values, given.dout
    heads, value_dim, key_length = q.shape[2], values.width, given.key_length
    q_tiles = pl.cdiv(given.length, tile.stay)
    arrays, numbers = unique((*keys, values))
    q_columns = beside(q, keys)
    starts = in_whole_tiles(given.starts, tile.stay)

    def kernel(*refs):
        refs = Refs(refs)
        q_ref, dout_ref, start_s_ref, start_dp_ref, table_ref, count_ref = refs.some(6)
        offset_ref, starts_ref = (
            refs.one(given.offset.static is None),
            refs.one(starts is not None),
        )
        operands, dq_ref = refs.some(len(arrays)), refs.one()
        q_slots, k_slots = refs.some(len(keys)), refs.some(len(keys))
        do_slot, v_slots, out_slots = refs.some(3)
        thread = lax.axis_index("warpgroup")
        offset = given.offset.read(offset_ref)
        ring = Ring(tile.stages, table_ref, count_ref, 0, *refs.rest())

        def place(entry):
            head = lax.div(entry, jnp.int32(q_tiles))
            row = lax.rem(entry, jnp.int32(q_tiles)) * tile.stay
            end = lax.min(offset + row + tile.stay, jnp.int32(key_length))
            first = jnp.int32(0)
            if starts_ref is not None:
                start = starts_ref[lax.div(head, jnp.int32(heads)), row]
                first = lax.div(start, jnp.int32(tile.step))
            return Place(head, row, first, pl.cdiv(end, tile.step), heads)

        def staying(place):
            rows = pl.ds(place.row, tile.stay)
            batch, head = place.at
            for columns, slot in zip(q_columns, q_slots):
                yield columns.at(q_ref, batch, rows, head), slot
            yield dout_ref.at[batch, rows, head], do_slot

        def passing(place, step, slot):
            rows = pl.ds(step * tile.step, tile.step)
            batch, head = place.at
            for columns, number, slots in zip((*keys, values), numbers, (*k_slots, v_slots)):
                yield columns.at(operands[number], batch, rows, head), slots.at[slot]

        @pl.when(thread == MATH_WARPGROUPS)
        def _load():
            ring.load(tile.memory_registers, place, passing, staying)

        @pl.when(thread < MATH_WARPGROUPS)
        def _multiply():
            ring.begin(tile.math_registers)

            def one_tile(entry, done):
                my = place(entry)
                first, end = my.first, my.end
                batch, head = my.at
                my_row = my.row + thread * 64
                # The end of the steps in which one of my queries sees a key, and in which all do.
                last = pl.cdiv(offset + my_row + 64, tile.step)
                last = lax.clamp(first, last, end)
                whole = lax.div(offset + my_row + 1, jnp.int32(tile.step))
                whole = lax.clamp(first, whole, last)
                seen, start = first, None
                if starts_ref is not None:
                    rows = starts_ref.at[batch, pl.ds(my_row, 64)]
                    start = plgpu.load(rows, layout=ROWS, optimized=False)
                    latest = pl.cdiv(starts_ref[batch, my_row + 63], tile.step)
                    seen = lax.clamp(first, latest, whole)
                my_rows = pl.ds(my_row, 64)
                start_s, start_dp = (
                    plgpu.load(ref.at[batch, head, my_rows], layout=ROWS, optimized=False)
                    for ref in (start_s_ref, start_dp_ref)
                )

                def hide(s, step):
                    """Logits with -inf where a query does not see a key."""
                    query_of, key_of = (
                        plgpu.broadcasted_iota(jnp.int32, s.shape, dim, layout=WGMMA)
                        for dim in (0, 1)
                    )
                    key = step * tile.step
                    visible = query_of - key_of >= key - my_row - offset
                    if start is not None:
                        visible &= key_of + key >= lax.broadcast_in_dim(start, s.shape, [0])
                    return jnp.where(visible, s, -jnp.inf)

                def one_step(step, held, sum_refs, hidden):
                    sums = [Sum(ref, one) for ref, one in zip(sum_refs, held)]
                    at = ring.slot(done + step - first)
                    mine = pl.ds(opaque(thread) * 64, 64)
                    plgpu.barrier_wait(ring.full.at[at])
                    s_start, dp_start = (
                        lax.broadcast_in_dim(start, (64, tile.step), [0])
                        for start in (start_s, start_dp)
                    )
                    pairs = [(q.at[mine], k.at[at]) for q, k in zip(q_slots, k_slots)]
                    dp_pairs = [(do_slot.at[mine], v_slots.at[at])]
                    s, dp = multiply([Product(pairs, s_start), Product(dp_pairs, dp_start)])
                    s = hide(s, step) if hidden else s
                    p = jnp.exp2(s * (given.scale * LOG2_E))
                    ds = (p * dp).astype(jnp.bfloat16)
                    for total, k in zip(sums, k_slots):
                        total.add(ds, k.at[at])
                    settle()
                    plgpu.barrier_arrive(ring.empty.at[at])
                    return tuple(one.held for one in sums)

                def run(*sum_refs):
                    plgpu.barrier_wait(ring.there)
                    plain = functools.partial(one_step, sum_refs=sum_refs, hidden=False)
                    hiding = functools.partial(one_step, sum_refs=sum_refs, hidden=True)
                    held = tuple(Sum.nothing(start_s, one.width) for one in keys)
                    if start is not None:
                        held = lax.fori_loop(first, seen, hiding, held)
                    held = lax.fori_loop(seen, whole, plain, held)
                    held = lax.fori_loop(whole, last, hiding, held)
                    ring.skip(last, end, done - first)
                    plgpu.barrier_arrive(ring.free)
                    return [Sum(ref, one).value() for ref, one in zip(sum_refs, held)]

                accumulators = [plgpu.ACC((64, one.width), jnp.float32) for one in keys]
                sums = pl.run_scoped(run, *accumulators)
                pieces = [
                    (total * given.scale, rows_of(dq_ref, my, my_row, columns.first))
                    for columns, total in zip(q_columns, sums)
                ]
                store(pieces, out_slots.at[thread])
                return end - first

            ring.over_tiles(one_tile)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    operands = [q, dout, given.start_s, given.start_dp, *lists, *given.offset.operands]
    if starts is not None:
        operands.append(starts)
    narrow = narrow_of((*keys, values))
    hopper.kernel(
        kernel,
        out_type=(),
        scratch_types=(
            *(buffer(tile.stay, columns.width, narrow=narrow) for columns in keys),
            *(buffer(tile.stages, tile.step, columns.width, narrow=narrow) for columns in keys),
            buffer(tile.stay, value_dim, narrow=narrow),
            buffer(tile.stages, tile.step, value_dim, narrow=narrow),
            buffer(MATH_WARPGROUPS, 1, 64, narrow, narrow=narrow),
            plgpu.Barrier(num_arrivals=len(keys) + 1),
            plgpu.Barrier(num_arrivals=MATH_WARPGROUPS),
            plgpu.Barrier(num_arrivals=len(keys) + 1, num_barriers=tile.stages),
            plgpu.Barrier(num_arrivals=MATH_WARPGROUPS, num_barriers=tile.stages),
        ),
        kernel_name="attention_query_gradients",
        **launch(lists),
    )(*operands, *arrays, into)
