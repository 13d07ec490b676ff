"""The forward pass of causal attention on Hopper, in Pallas Mosaic GPU.

A block holds a memory warpgroup and two math warpgroups of 64 query rows each. The memory warpgroup
keeps rings of key and value tiles full by TMA. A math warpgroup starts the next tile's logits
before it multiplies the last tile's probabilities, which stay in registers, by the values: while
the tensor core works on the second product, the first one's softmax runs. Blocks live as long as
the kernel and work through lists of tiles (`tile_order`); the rings never drain between tiles.
The design is FlashAttention-3's (Shah et al., 2024), told in Pallas.

Letters: B batch, T query rows, S key rows, N heads, P width of queries and keys, U of values.
"""

import functools
from dataclasses import dataclass

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import hopper
from dsv3_jax.kernels.attention.hopper_parts import (
    LOG2_E,
    MATH_WARPGROUPS,
    ROWS,
    Columns,
    Lists,
    Offset,
    Refs,
    arrive_at,
    beside,
    buffer,
    in_whole_tiles,
    launch,
    narrow_of,
    over_tiles,
    store,
    unique,
    wait_for,
)
from dsv3_jax.kernels.attention.hopper_products import (
    Product,
    Sum,
    multiply,
    opaque,
)
from dsv3_jax.kernels.hopper import WGMMA, plgpu

LOWEST = -1e30  # finite: a row that has seen no key yet must not become NaN


@dataclass(frozen=True)
class ForwardTile:
    """Sizes and order of one block's work."""

    kv: int = 128
    stages: int = 2
    memory_registers: int = 24
    math_registers: int = 240

    @property
    def q(self) -> int:
        """Query rows."""
        return 64 * MATH_WARPGROUPS


def shared_memory(tile: ForwardTile, key_dim: int, value_dim: int) -> int:
    """Bytes of shared memory that a block needs."""
    ring = tile.stages * tile.kv * (key_dim + value_dim)
    staging = tile.q * 64
    return 2 * (tile.q * key_dim + ring + staging) + 4 * tile.q + 2048


def attend(
    q: Float[Array, "B T N P"],
    keys: tuple[Columns, ...],
    values: Columns,
    offset: int | Int[Array, ""],
    starts: Int[Array, "B T"] | None,
    scale: float,
    tile: ForwardTile,
) -> tuple[Float[Array, "B T N U"], Float[Array, "B N T"]]:
    """Attention's output in bfloat16 and its log-sum-exp in float32.

    The columns of `keys` beside each other are the P columns of the keys. Query t sees the keys
    from starts[t] (0 without) to offset + t. T and S are multiples of 8.
    """
    batch, length, heads, _ = q.shape
    key_length = values.array.shape[1]
    value_dim = values.width
    q_tiles = pl.cdiv(length, tile.q)
    place_of_first = Offset.of(offset)
    steps = place_of_first.steps(length, key_length, tile.q, tile.kv)
    lists = Lists.of(steps, (0, batch * heads), 2 * key_length * (q.shape[-1] + value_dim))
    arrays, place_of = unique((*keys, values))
    q_columns = beside(q, keys)
    starts = in_whole_tiles(starts, tile.q)
    scale_log2 = scale * LOG2_E
    static = place_of_first.static
    masks_ahead = static is None or tile.kv != tile.q or static % tile.kv != 0

    def kernel(*refs):
        refs = Refs(refs)
        q_ref, operands = refs.one(), refs.some(len(arrays))
        table_ref, count_ref = refs.some(2)
        offset_ref, starts_ref = refs.one(static is None), refs.one(starts is not None)
        out_ref, lse_ref = refs.some(2)
        q_slots, k_slots = refs.some(len(keys)), refs.some(len(keys))
        v_slots, out_slots, lse_slots, *barriers = refs.rest()
        q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
        key_refs = [operands[place] for place in place_of[:-1]]
        value_ref = operands[place_of[-1]]
        thread = lax.axis_index("warpgroup")
        offset_ = place_of_first.read(offset_ref)

        def place(entry):
            """Batch, head, first row, and first and end key tile of a tile."""
            q_tile = lax.rem(entry, jnp.int32(q_tiles))
            batch_head = lax.div(entry, jnp.int32(q_tiles))
            index = lax.div(batch_head, jnp.int32(heads))
            row = q_tile * tile.q
            end = pl.cdiv(lax.min(offset_ + row + tile.q, jnp.int32(key_length)), tile.kv)
            first = jnp.int32(0)
            if starts_ref is not None:  # queries that see nothing have a hidden tile, too
                first = lax.min(lax.div(starts_ref[index, row], jnp.int32(tile.kv)), end - 1)
            return index, lax.rem(batch_head, jnp.int32(heads)), row, first, end

        def slot_of(step):
            return lax.rem(step, jnp.int32(tile.stages))

        @pl.when(thread == MATH_WARPGROUPS)
        def _load():
            plgpu.set_max_registers(tile.memory_registers, action="decrease")

            def one_tile(entry, done):
                index, head, row, first, end = place(entry)

                def load_keys(step):
                    slot = slot_of(done + step)
                    plgpu.barrier_wait(k_empty.at[slot])
                    for columns, ref, slots in zip(keys, key_refs, k_slots):
                        rows = pl.ds((end - 1 - step) * tile.kv, tile.kv)
                        source = columns.at(ref, index, rows, head)
                        plgpu.copy_gmem_to_smem(source, slots.at[slot], k_full.at[slot])

                def load_values(step):
                    slot = slot_of(done + step)
                    plgpu.barrier_wait(v_empty.at[slot])
                    rows = pl.ds((end - 1 - step) * tile.kv, tile.kv)
                    source = values.at(value_ref, index, rows, head)
                    plgpu.copy_gmem_to_smem(source, v_slots.at[slot], v_full.at[slot])

                load_keys(jnp.int32(0))
                for half in range(MATH_WARPGROUPS):
                    plgpu.barrier_wait(q_empty.at[half])
                    mine = pl.ds(half * 64, 64)
                    for columns, slot in zip(q_columns, q_slots):
                        source = columns.at(q_ref, index, pl.ds(row + half * 64, 64), head)
                        plgpu.copy_gmem_to_smem(source, slot.at[mine], q_full.at[half])

                # In the order in which the products want them.
                @pl.loop(1, end - first)
                def _(step):
                    load_keys(step)
                    load_values(step - 1)

                load_values(end - first - 1)
                return end - first

            over_tiles(table_ref, count_ref, 0, one_tile)
            # Every hand-back is waited for.
            for half in range(MATH_WARPGROUPS):
                plgpu.barrier_wait(q_empty.at[half])
            wait_for((k_empty, v_empty), tile.stages)

        @pl.when(thread < MATH_WARPGROUPS)
        def _multiply():
            plgpu.set_max_registers(tile.math_registers, action="increase")
            plgpu.barrier_arrive(q_empty.at[thread])
            arrive_at((k_empty, v_empty), tile.stages)

            def one_tile(entry, done):
                index, head, row, first, end = place(entry)
                my_first = row + thread * 64
                start = None
                count = end - first
                # Steps count key tiles from the last; those before `masked` and from `below` on
                # hold keys that some row does not see.
                masked = lax.clamp(
                    jnp.int32(1), end - lax.div(offset_ + my_first + 1, jnp.int32(tile.kv)), count
                )
                below = count
                if starts_ref is not None:
                    rows = starts_ref.at[index, pl.ds(my_first, 64)]
                    start = plgpu.load(rows, layout=ROWS, optimized=False)
                    latest = pl.cdiv(starts_ref[index, my_first + 63], tile.kv)
                    below = lax.clamp(masked, end - latest, count)

                def hide(s, step):
                    """Logits with -inf where a row does not see a key."""
                    key = (end - 1 - step) * tile.kv
                    row_of, key_of = (
                        plgpu.broadcasted_iota(jnp.int32, s.shape, dim, layout=WGMMA)
                        for dim in (0, 1)
                    )
                    visible = row_of - key_of >= key - my_first - offset_
                    if start is not None:
                        visible &= key_of + key >= lax.broadcast_in_dim(start, s.shape, [0])
                    return jnp.where(visible, s, -jnp.inf)

                def softmax(s, m, total):
                    """Probabilities, new maxima and sums, and what the old output shrinks by."""
                    new_m = jnp.maximum(m, s.max(axis=1) * scale_log2)
                    alpha = jnp.exp2(m - new_m)
                    p = jnp.exp2(s * scale_log2 - lax.broadcast_in_dim(new_m, s.shape, [0]))
                    return p.astype(jnp.bfloat16), new_m, total * alpha + p.sum(axis=1), alpha

                def logits(step, then=lambda: 0):
                    """A tile's logits; what `then` starts is in flight when they are there."""
                    slot = slot_of(done + step)
                    my_rows = pl.ds(opaque(thread) * 64, 64)
                    plgpu.barrier_wait(k_full.at[slot])
                    pairs = [(q.at[my_rows], k.at[slot]) for q, k in zip(q_slots, k_slots)]
                    (s,) = multiply([Product(pairs)], then)
                    plgpu.barrier_arrive(k_empty.at[slot])
                    return s

                def run(o_ref):
                    plgpu.barrier_wait(q_full.at[thread])
                    m = plgpu.layout_cast(jnp.full((64,), LOWEST, jnp.float32), ROWS)
                    total = plgpu.layout_cast(jnp.zeros((64,), jnp.float32), ROWS)
                    p, m, total, _ = softmax(hide(logits(jnp.int32(0)), 0), m, total)

                    def add(o, p, step):
                        slot = slot_of(done + step)
                        plgpu.barrier_wait(v_full.at[slot])
                        return o.add(p, v_slots.at[slot])

                    def one_step(step, carry, hidden):
                        p, m, total, held = carry
                        o = Sum(o_ref, held)

                        s = logits(step, lambda: add(o, p, step - 1))
                        p, m, total, alpha = softmax(hide(s, step) if hidden else s, m, total)
                        value = o.value()
                        plgpu.barrier_arrive(v_empty.at[slot_of(done + step - 1)])
                        o.set(value * lax.broadcast_in_dim(alpha, value.shape, [0]))
                        return p, m, total, o.held

                    plain = functools.partial(one_step, hidden=False)
                    hiding = functools.partial(one_step, hidden=True)
                    carry = (p, m, total, Sum.nothing(total, value_dim))
                    if masks_ahead:
                        carry = lax.fori_loop(1, masked, hiding, carry)
                    carry = lax.fori_loop(masked if masks_ahead else 1, below, plain, carry)
                    if start is not None:
                        carry = lax.fori_loop(below, count, hiding, carry)
                    p, m, total, held = carry
                    plgpu.barrier_arrive(q_empty.at[thread])
                    o = Sum(o_ref, held)
                    add(o, p, count - 1)
                    value = o.value()
                    plgpu.barrier_arrive(v_empty.at[slot_of(done + count - 1)])
                    return value, m, total

                o, m, total = pl.run_scoped(run, plgpu.ACC((64, value_dim), jnp.float32))
                total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
                rows = pl.ds(my_first, 64)
                o = o * lax.broadcast_in_dim(1.0 / total, o.shape, [0])
                store(
                    [(o, lambda left, width: out_ref.at[index, rows, head, pl.ds(left, width)])],
                    out_slots.at[thread],
                )
                # The wait for the last store's buffer was for this one's, too.
                lse_slots.at[thread][...] = (m + jnp.log2(total)) * (1 / LOG2_E)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(lse_slots.at[thread], lse_ref.at[index, head, rows])
                return count

            over_tiles(table_ref, count_ref, 0, one_tile)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    operands = [q, *arrays, *lists, *place_of_first.operands]
    if starts is not None:
        operands.append(starts)
    warpgroups, narrow = MATH_WARPGROUPS, narrow_of((*keys, values))
    out, lse = hopper.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((batch, length, heads, value_dim), jnp.bfloat16),
            # Whole tiles: copies of vectors do not stop at the end of a row, as those of tiles do.
            jax.ShapeDtypeStruct((batch, heads, q_tiles * tile.q), jnp.float32),
        ),
        scratch_types=(
            *(buffer(tile.q, columns.width, narrow=narrow) for columns in keys),
            *(buffer(tile.stages, tile.kv, columns.width, narrow=narrow) for columns in keys),
            buffer(tile.stages, tile.kv, value_dim, narrow=narrow),
            buffer(warpgroups, 1, 64, narrow, narrow=narrow),
            plgpu.SMEM((warpgroups, 64), jnp.float32),
            plgpu.Barrier(num_arrivals=len(keys), num_barriers=warpgroups),
            plgpu.Barrier(num_arrivals=1, num_barriers=warpgroups),
            plgpu.Barrier(num_arrivals=len(keys), num_barriers=tile.stages),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=tile.stages),
            plgpu.Barrier(num_arrivals=1, num_barriers=tile.stages),
            plgpu.Barrier(num_arrivals=warpgroups, num_barriers=tile.stages),
        ),
        kernel_name="attention_forward",
        **launch(lists),
    )(*operands)
    return out, lse[..., :length]
