"""The loop of the weight gradients on Hopper: float32 sums over tokens, one for each expert.

The ring of slots and the roles of the warpgroups are those of `hopper_matmul.py`. Three things
differ. The contracted dimension is tokens, cut into groups, so that the number of steps of a tile
is known on the device only. Both operands are scaled along it in 1x128 tiles, so that the promotion
takes two multiplications for each product where weights need one. And the result is float32, added
to what is there by TMA's reducing store (DeepGEMM: sm90_fp8_gemm_1d1d.cuh, whose k-grouped form
rewrites TMA descriptors where here a tile starts at its group's first token).
"""

import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import hopper, manual
from dsv3_jax.kernels.gemm import hopper_wgmma
from dsv3_jax.kernels.gemm.hopper_matmul import Tile, store_inside
from dsv3_jax.kernels.gemm.hopper_wgmma import SLAB_BYTES
from dsv3_jax.kernels.hopper import WGMMA, plgpu, swizzled
from dsv3_jax.kernels.sums import GradientSum

# Columns of B whose scales are in registers at one time.
SCALE_COLUMNS = 32
STORE = 32  # float32 columns of a store: 128 bytes


def wgrad(
    a: Float[Array, "_N _T"],
    b: Float[Array, "_K _T"],
    starts: Int[Array, " E"],
    sizes: Int[Array, " E"],
    tile: Tile,
    *,
    a_scales: Float[Array, "TB N"] | None = None,
    b_scales: Float[Array, "TB K"] | None = None,
    accumulate: Float[Array, "E N K"] | None = None,
    into: GradientSum | None = None,
    squares: bool = False,
) -> Any:
    """[E, N, K]: a[:, group] @ b[:, group].T for each group of tokens, plus `accumulate`.

    With `into` it is left there, and None is returned. With `squares`, or where `into` has a place
    for them, the sums of the squares of each row of a tile are made as well, [E, tiles of K, rows]
    in whole tiles: they are returned beside the result, or their sum is left in that place.

    E4M3 operands with scales are [N, T] and [K, T]; bfloat16 ones have their tokens first, [T, N]
    and [T, K], so that the signature leaves their order open. Groups start and end at multiples of
    128 tokens. N and K are multiples of 8.
    """
    operands = a, b, starts, sizes, a_scales, b_scales, accumulate
    a, b, starts, sizes, a_scales, b_scales, accumulate = manual.vary(operands)
    scaled = a_scales is not None
    dim = 0 if scaled else 1
    n, k, experts = a.shape[dim], b.shape[dim], sizes.shape[0]
    slab = SLAB_BYTES // a.dtype.itemsize
    stages, tiles = tile.stages, (pl.cdiv(n, tile.m), pl.cdiv(k, tile.n))
    tiles_each = tiles[0] * tiles[1]
    if accumulate is not None and not hopper.interpreted():
        into = GradientSum(jax.new_ref(accumulate[None]), jnp.zeros((), jnp.int32), adds=True)
    adds = into is not None and into.adds
    squares = squares or (into is not None and into.squares is not None)
    # A sum of squares is of what is there in the end; and its buffer is free once a row of a tile
    # has been stored.
    assert not (squares and (adds or accumulate is not None))
    assert not squares or tile.store_buffers <= tile.n // STORE
    memory_registers, math_registers = tile.registers

    def kernel(*refs):
        *refs, a_slots, b_slots, scale_slots, out_slots, square_slots, full, empty = refs
        *refs, out, squares_ref = refs if squares else (*refs, None)
        a_ref, b_ref, starts_ref, sizes_ref, number_ref, *scale_refs = refs
        thread = lax.axis_index("warpgroup")
        schedule = plgpu.nd_loop(
            (experts * tiles_each,), collective_axes="block", init_carry=jnp.int32(0)
        )

        def place(index):
            """A tile's expert, first row and column, first token and number of steps."""
            expert = lax.div(index, jnp.int32(tiles_each))
            within = lax.rem(index, jnp.int32(tiles_each))
            row, column = plgpu.planar_snake(within, tiles, 1, tile.band)
            steps = lax.div(sizes_ref[expert], jnp.int32(slab))
            return expert, row * tile.m, column * tile.n, starts_ref[expert], steps

        @pl.when(thread == tile.warpgroups)
        def _load():
            plgpu.set_max_registers(memory_registers, action="decrease")

            @schedule
            def _(info, carry: Any):
                row, column, start, steps = place(info.index[0])[1:]
                rows, columns = pl.ds(row, tile.m), pl.ds(column, tile.n)

                @pl.loop(0, steps)
                def _(step):
                    slot = lax.rem(carry + step, jnp.int32(stages))
                    plgpu.barrier_wait(empty.at[slot])
                    ts = pl.ds(pl.multiple_of(start + step * slab, slab), slab)
                    for ref, slots, span in ((a_ref, a_slots, rows), (b_ref, b_slots, columns)):
                        source = ref.at[span, ts] if scaled else ref.at[ts, span]
                        plgpu.copy_gmem_to_smem(source, slots.at[slot], full.at[slot])
                    if scaled:
                        first = lax.div(start, jnp.int32(slab)) + step
                        for ref, slots, span in zip(scale_refs, scale_slots, (rows, columns)):
                            plgpu.copy_gmem_to_smem(
                                ref.at[first, span], slots.at[slot], full.at[slot]
                            )

                return carry + steps

            @pl.loop(0, stages)
            def _(slot):
                plgpu.barrier_wait(empty.at[slot])

        @pl.when(thread < tile.warpgroups)
        def _multiply():
            plgpu.set_max_registers(math_registers, action="increase")

            @pl.loop(0, stages)
            def _(slot):
                plgpu.barrier_arrive(empty.at[slot])

            @schedule
            def _(info, carry: Any):
                expert, row, column, _, steps = place(info.index[0])
                layer = out.at[number_ref[0]]
                slots = (a_slots, b_slots, full, empty)
                slot_of = lambda step: lax.rem(carry + step, jnp.int32(stages))  # noqa: E731
                if scaled:
                    pieces = _scaled_loop(tile, steps, slot_of, slots, scale_slots)
                else:
                    pieces = _plain_loop(tile, steps, slot_of, slots)
                buffer, column_tile = 0, lax.div(column, jnp.int32(tile.n))
                for wave in range(tile.waves):
                    first = row + thread * (64 * tile.waves) + wave * 64
                    of_rows = 0.0
                    for left in range(0, tile.n, STORE):
                        plgpu.wait_smem_to_gmem(tile.store_buffers - 1, wait_read_only=True)
                        piece = pieces[wave * (tile.n // STORE) + left // STORE]
                        out_slots.at[thread, buffer][...] = piece
                        last = left + STORE >= tile.n
                        if squares:
                            of_rows += jnp.sum(piece * piece, axis=1)
                        if squares and last:
                            square_slots.at[thread, wave][...] = of_rows
                        plgpu.commit_smem()
                        send = functools.partial(
                            plgpu.copy_smem_to_gmem,
                            out_slots.at[thread, buffer],
                            layer.at[expert, pl.ds(first, 64), pl.ds(column + left, STORE)],
                            reduction_op="add" if adds else None,
                            commit_group=False,
                        )
                        store_inside(column + left, k, STORE, send)
                        if squares_ref is not None and last:
                            plgpu.copy_smem_to_gmem(
                                square_slots.at[thread, wave],
                                squares_ref.at[expert, column_tile, pl.ds(first, 64)],
                                commit_group=False,
                            )
                        plgpu.commit_smem_to_gmem_group()
                        buffer = (buffer + 1) % tile.store_buffers
                return carry + steps

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    shape = manual.result((1, experts, n, k), jnp.float32, a)
    number = jnp.zeros((), jnp.int32) if into is None else into.number
    inputs: list[Any] = [a, b, starts, sizes, number.reshape(1)]
    if a_scales is not None and b_scales is not None:
        inputs += [a_scales, b_scales]
    if into is not None:
        inputs.append(into.total)
    out_type = [shape] if into is None else []
    if squares:
        by_tile = (experts, tiles[1], tiles[0] * tile.m)
        out_type.append(manual.result(by_tile, jnp.float32, a))
    slots = [
        plgpu.SMEM(
            (stages, span, slab) if scaled else (stages, slab, span),
            a.dtype,
            transforms=swizzled(a.dtype),
        )
        for span in (tile.m, tile.n)
    ]
    out_tiling = swizzled(jnp.float32, math.gcd(k, STORE))
    result = hopper.kernel(
        kernel,
        out_type=tuple(out_type),
        grid=(min(hopper.multiprocessors(), experts * tiles_each),),
        grid_names=("block",),
        num_threads=tile.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=(
            *slots,
            tuple(
                plgpu.SMEM((stages, span) if scaled else (32,), jnp.float32)
                for span in (tile.m, tile.n)
            ),
            plgpu.SMEM(
                (tile.warpgroups, tile.store_buffers, 64, STORE),
                jnp.float32,
                transforms=out_tiling,
            ),
            plgpu.SMEM((tile.warpgroups, tile.waves, 64), jnp.float32),
            plgpu.Barrier(num_arrivals=4 if scaled else 2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=tile.warpgroups, num_barriers=stages),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*inputs)
    if into is not None:
        if squares:
            into.put_squares(jnp.sum(result[0]))
        return None if accumulate is None else jax.freeze(into.total)[0]
    gradient, *of_tiles = manual.vary(result, a)
    if squares:
        return gradient[0], of_tiles[0]
    return gradient[0] if accumulate is None else accumulate + gradient[0]


def _scaled_loop(tile: Tile, steps, slot_of, slots, scale_slots):
    """Totals of a tile of FP8 operands, (64, STORE) each: for each wave, the pieces of its row."""
    a_slots, b_slots, full, empty = slots
    a_scale_slots, b_scale_slots = scale_slots
    thread = lax.axis_index("warpgroup")
    pieces = range(0, tile.n, SCALE_COLUMNS)
    in_place = tile.waves > 1 and not hopper.interpreted()

    def one_step(step, carry):
        totals, accumulator = carry
        totals = list(totals)
        slot = slot_of(step)
        plgpu.barrier_wait(full.at[slot])
        for wave in range(tile.waves):
            rows = pl.ds(thread * (64 * tile.waves) + wave * 64, 64)
            a_scale = plgpu.load(a_scale_slots.at[slot, rows], layout=WGMMA.reduce(1))
            a_scale = lax.broadcast_in_dim(a_scale, (64, SCALE_COLUMNS), [0])
            a_block, b_block = a_slots.at[slot, rows], b_slots.at[slot]
            if in_place:
                started = hopper_wgmma.start(accumulator[0], a_block, b_block)
                accumulator = (product,) = hopper_wgmma.finish((started,))
            else:
                product = hopper_wgmma.multiply(a_block, b_block)
            for index, left in enumerate(pieces):
                columns = pl.ds(left, SCALE_COLUMNS)
                b_scale = plgpu.load(b_scale_slots.at[slot, columns], layout=WGMMA.reduce(0))
                b_scale = lax.broadcast_in_dim(b_scale, (64, SCALE_COLUMNS), [1])
                block = product[:, left : left + SCALE_COLUMNS]
                totals[wave * len(pieces) + index] += block * a_scale * b_scale
        plgpu.barrier_arrive(empty.at[slot])
        return tuple(totals), accumulator

    zeros = hopper_wgmma.zeros(SCALE_COLUMNS)
    accumulator = (hopper_wgmma.zeros(tile.columns),) if in_place else ()
    init = ((zeros,) * (tile.waves * len(pieces)), accumulator)
    return lax.fori_loop(0, steps, one_step, init)[0]


def _plain_loop(tile: Tile, steps, slot_of, slots):
    """Totals of a tile of bfloat16 operands with tokens first, (64, STORE) each."""
    a_slots, b_slots, full, empty = slots
    columns = pl.ds(lax.axis_index("warpgroup") * 64, 64)

    def accumulate(sum_ref):
        @pl.loop(0, steps)
        def _(step):
            slot = slot_of(step)
            plgpu.barrier_wait(full.at[slot])
            plgpu.wgmma(sum_ref, a_slots.at[slot, :, columns].T, b_slots.at[slot])
            plgpu.wgmma_wait(1)

            @pl.when(step > 0)
            def _():
                plgpu.barrier_arrive(empty.at[slot_of(step - 1)])

        total = sum_ref[...]

        @pl.when(steps > 0)
        def _():
            plgpu.barrier_arrive(empty.at[slot_of(steps - 1)])

        return total

    total = pl.run_scoped(accumulate, plgpu.ACC((64, tile.n), jnp.float32))
    return tuple(total[:, left : left + STORE] for left in range(0, tile.n, STORE))
