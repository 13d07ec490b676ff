"""Paged latent attention for Hopper, in Pallas Mosaic GPU: split over the keys, then combined."""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import hopper, manual
from dsv3_jax.kernels.hopper import WGMMA, plgpu, swizzled
from dsv3_jax.kernels.mla_decode import fp8_pages, wgmma
from dsv3_jax.kernels.mla_decode.api import Pages, Results, Rows
from dsv3_jax.kernels.mla_decode.combine import LOWEST, combine
from dsv3_jax.kernels.mla_decode.schedule import PAGE, Schedule, make_schedule
from dsv3_jax.quantization.block_scaled import BlockScaled

ROWS = 64  # of a block: heads x new tokens
LATENT_TILES = 8
TILES = 9  # of 64 columns each: latent, then rope
ROPE_TILE = 8
ORDER = (ROPE_TILE, *range(8))  # rope first, whose place is the first to be free
GROUPS = (8, 0, 4)  # the first tile of each group that is handed back at once
HALF = 4  # tiles of the output that a math warpgroup holds
LOG2_E = math.log2(math.e)
LANES = WGMMA.reduce(1)
# Of a thread that loads, and of one that multiplies. A thread starts with 168: asking for more than
# three times that in all would wait for ever.
REGISTERS, FP8_REGISTERS = (40, 232), (104, 200)  # with 192 ptxas serialises the products


@dataclass(frozen=True)
class Tuning:
    """How a block works; none of it changes the result but for rounding."""

    cluster: int = 2  # blocks of other heads that share each read of a page (TMA multicast)
    rise: float = 8.0  # the running maximum moves only when scores exceed it by so much (log2)


def parts_of(rows: int) -> int:
    """Parts of a schedule for so many rows (heads x new tokens): blocks that read other pages."""
    return max(hopper.multiprocessors() // _row_tiles(rows), 1)


def reads(width: int, rope: int, dtype: Any) -> bool:
    """Whether rows of `width` latent and `rope` rotated numbers are what the kernel is made for."""
    return (width, rope) == (LATENT_TILES * 64, 64) and jnp.dtype(dtype) == jnp.bfloat16


def _row_tiles(rows: int) -> int:
    return pl.cdiv(rows, ROWS)


def mla_decode(
    pages: Pages,
    *,
    scale: float,
    schedule: Schedule | None = None,
    tuning: Tuning | None = None,
) -> Results:
    """Softmax-weighted latents and log-sum-exp; see `api.mla_decode`."""
    q_latent, q_rope, latent, rope, block_table, lengths = pages
    hopper.require()
    batch, new, heads, width = q_latent.shape
    if (width, q_rope.shape[-1]) != (512, 64):
        raise NotImplementedError(
            f"latent and rope widths {width} and {q_rope.shape[-1]} must be 512 and 64"
        )
    pool = (latent.values, latent.scales) if isinstance(latent, BlockScaled) else (latent,)
    fp8 = len(pool) == 2
    dtypes = {x.dtype for x in (q_latent, q_rope, rope, *(() if fp8 else pool))}
    if dtypes != {jnp.dtype(jnp.bfloat16)}:
        raise NotImplementedError(f"{q_latent.dtype} by {latent.dtype} must be bfloat16 throughout")
    if manual.varies(pages):
        raise NotImplementedError("a shard_map around it must have check_vma=False")  # warp_map
    if latent.shape[1] != PAGE:
        raise NotImplementedError(f"pages of {latent.shape[1]} tokens must be of {PAGE}")
    rows = new * heads
    if schedule is None:
        here = jnp.minimum(lengths, block_table.shape[1] * PAGE)
        schedule = make_schedule(here, parts_of(rows))
    q_latent, q_rope = (q.reshape(batch, rows, -1) for q in (q_latent, q_rope))
    tuning = tuning or Tuning()
    if fp8 or _row_tiles(rows) % tuning.cluster:
        tuning = dataclasses.replace(tuning, cluster=1)
    operands = (q_latent, q_rope, pool, rope, block_table, lengths, schedule)
    whole, partial = _attend(*operands, scale, new, tuning)
    out, lse = (x[:, :rows] for x in combine(*whole, *partial, schedule))
    return out.reshape(batch, new, heads, width), lse.reshape(batch, new, heads) / LOG2_E


def mla_decode_contiguous(rows: Rows, *, scale: float, schedule: Schedule | None = None) -> Results:
    """The same for contiguous rows, which are pages in order."""
    hopper.require()
    if rows.latent.shape[1] % PAGE:
        raise NotImplementedError(
            f"a cache of {rows.latent.shape[1]} rows is no whole number of pages of {PAGE}"
        )
    return mla_decode(rows.in_pages(PAGE), scale=scale, schedule=schedule)


def _attend(
    q_latent, q_rope, pool, rope, block_table, lengths, schedule,
    scale, new: int, tuning: Tuning,
):  # fmt: skip
    """Results of sequences that one part reads alone, and partial results; both with log-sum-exp.

    `pool` holds the latents of all pages, or their FP8 values and scales.

    A part's partial result of a sequence that began in an earlier part is at [0, part], and of one
    that it begins and does not end at [1, part].
    """
    batch, rows, width = q_latent.shape
    heads = rows // new
    tiles, parts = _row_tiles(rows), schedule.parts
    padded = tiles * ROWS
    interpreted = hopper.interpreted()
    if interpreted:  # TMA reads zeros past the edge, and the interpreter nothing
        q_latent, q_rope = (
            jnp.pad(q, ((0, 0), (0, padded - rows), (0, 0))) for q in (q_latent, q_rope)
        )
    log_scale = scale * LOG2_E
    cluster = tuning.cluster
    multicast = ("cluster",) if cluster > 1 else None
    fp8 = len(pool) == 2
    registers = FP8_REGISTERS if fp8 else REGISTERS
    awaited = (ROPE_TILE, *range(0, 8, 2)) if fp8 else ORDER  # a unit of FP8 fills two

    def kernel(
        q_latent, q_rope, pool, rope, table, lengths, starts, cuts, first, last,
        out, lse, partial, partial_lse,
        q_s, k_s, p_s, own_s, row_s, q_full, q_empty, k_full, k_ready, k_empty, p_ready,
    ):  # fmt: skip
        warpgroup = lax.axis_index("warpgroup")
        part = lax.axis_index("part")
        tile = lax.axis_index("tile") * cluster + lax.axis_index("cluster")
        row = pl.multiple_of(tile * ROWS, ROWS)
        low, high = cuts[part], cuts[part + 1]

        def for_each_piece(body):
            """body(sequence, first page, one past the last page, carry) for this part's pieces."""

            def step(sequence, carry):
                start = starts[sequence]
                begin = lax.max(low, start) - start
                end = lax.min(high, starts[sequence + 1]) - start
                body(sequence, begin, end)
                return carry

            some = (high > low).astype(jnp.int32)
            lax.fori_loop(first[part], first[part] + (last[part] - first[part]) * some, step, 0)

        def copy_queries(sequence):
            plgpu.barrier_wait(q_empty)
            for t in range(TILES):
                source = q_latent if t < LATENT_TILES else q_rope
                columns = pl.ds(t * 64 if t < LATENT_TILES else 0, 64)
                plgpu.copy_gmem_to_smem(
                    source.at[sequence, pl.ds(row, ROWS), columns], q_s.at[t], q_full
                )

        def await_room(slot, group):
            plgpu.barrier_wait(k_empty.at[slot * len(GROUPS) + GROUPS.index(group)])

        def copy(source, slot, tile):
            plgpu.copy_gmem_to_smem(
                source,
                k_s.at[slot, tile],
                k_full.at[slot * TILES + tile],
                collective_axes=multicast,
            )

        def load():
            """Brings bfloat16 pages."""
            (latent,) = pool

            @for_each_piece
            def _(sequence, begin, end):
                copy_queries(sequence)

                @pl.loop(0, pl.cdiv(end - begin, 2))
                def _(pair):
                    for slot in range(2):
                        page = table[sequence, lax.min(begin + 2 * pair + slot, end - 1)]
                        for t in ORDER:
                            if t in GROUPS:
                                await_room(slot, t)
                            if t < LATENT_TILES:
                                source = latent.at[page, :, pl.ds(t * 64, 64)]
                            else:
                                source = rope.at[page]
                            copy(source, slot, t)

            await_the_end()

        def load_and_convert():
            """Brings FP8 pages; a half of one is converted while the next one is loaded."""

            @for_each_piece
            def _(sequence, begin, end):
                def number(place):
                    page = table[sequence, lax.min(place, end - 1)]
                    # An empty sequence has none, and a load, unlike TMA, must not miss the pool.
                    return lax.clamp(0, page, rope.shape[0] - 1)

                def copy_rope(page, slot):
                    await_room(slot, ROPE_TILE)
                    copy(rope.at[page], slot, ROPE_TILE)

                def convert(index, carry):
                    page, following, next_but_one, low_half = carry
                    slot = lax.rem(index, 2)

                    def store(half, numbers):
                        await_room(slot, HALF * half)
                        for unit in (2 * half, 2 * half + 1):
                            fp8_pages.store(k_s.at[slot], unit, numbers)
                            plgpu.commit_smem()
                            plgpu.barrier_arrive(k_ready.at[slot * TILES + 2 * unit])

                    # Used two turns from now: by then the loads that it would wait for are done.
                    coming = number(begin + index + 3)
                    high_half = fp8_pages.fetch(pool, page, 1, low_half)
                    fp8_pages.prefetch(pool, rope, next_but_one)
                    store(0, low_half)
                    low_half = fp8_pages.fetch(pool, following, 0, high_half)
                    store(1, high_half)

                    @pl.when(index + 1 < count)
                    def _():
                        copy_rope(following, 1 - slot)

                    return following, next_but_one, coming, low_half

                count = 2 * pl.cdiv(end - begin, 2)  # the last one twice, where it has no partner
                numbers = [number(begin + i) for i in range(3)]
                low_half = fp8_pages.fetch(pool, numbers[0], 0)
                fp8_pages.prefetch(pool, rope, numbers[1])
                copy_queries(sequence)
                copy_rope(numbers[0], 0)
                lax.fori_loop(0, count, convert, (*numbers, low_half))

            await_the_end()

        def await_the_end():
            plgpu.barrier_wait(q_empty)
            for slot in range(2):
                for group in GROUPS:
                    await_room(slot, group)

        @pl.when(warpgroup == 2)
        def _load():
            plgpu.set_max_registers(registers[0], action="decrease")
            if fp8:
                load_and_convert()
            else:
                plgpu.warp_map(lambda warp: pl.when(warp == 0)(load))

        def _math(me: int):
            """Warpgroup `me` scores the pages of its slot, and holds its half of the output."""

            def release(slot, tile):
                wgmma.synchronize()  # one thread speaks for all
                plgpu.barrier_arrive(k_empty.at[slot * len(GROUPS) + GROUPS.index(tile)])

            def scores(length, page, end):
                """Products of all queries with the page in this warpgroup's slot.

                -inf where a token must not look, and all over from page `end` on.
                """
                s = (_zeros(),)
                for t in ORDER:
                    if t in awaited:
                        ready = k_ready if fp8 and t < LATENT_TILES else k_full
                        plgpu.barrier_wait(ready.at[me * TILES + t])
                    s = wgmma.multiply(
                        s,
                        q_s.at[t],
                        k_s.at[me, pl.ds(t, 1)],
                        b_rows_first=False,
                        clear=t == ORDER[0],
                    )
                ((s,),) = wgmma.wait(0, s)
                release(me, ROPE_TILE)
                # To the last new token.
                visible = lax.select(page < end, length - page * PAGE, 0)

                def mask(s):
                    column = plgpu.broadcasted_iota(jnp.int32, (ROWS, PAGE), 1, layout=WGMMA)
                    if new == 1:
                        limit = visible
                    else:
                        place = plgpu.broadcasted_iota(jnp.int32, (ROWS, PAGE), 0, layout=WGMMA)
                        token = lax.div(place + row, jnp.int32(heads))
                        limit = token + (visible - (new - 1))
                    return jnp.where(column < limit, s, -jnp.inf)

                return lax.cond(visible - (new - 1) < PAGE, mask, lambda s: s, s)

            def largest(s):
                return jnp.max(s, axis=1) * jnp.float32(log_scale)

            def weights(s, m):
                return jnp.exp2(s * jnp.float32(log_scale) - _across(m))

            def publish(p):
                """Hands this warpgroup's weights to the other (interpreted, also to itself)."""
                p_s[...] = p
                if interpreted:
                    own_s[me] = p

            def weigh(out, p, slot):
                """out + p @ this warpgroup's half of the page in a slot, not complete."""
                registers = p is not p_s
                if registers and interpreted:
                    p = own_s.at[me]
                half = k_s.at[slot, pl.ds(HALF * me, HALF)]
                return wgmma.multiply(out, p, half, b_rows_first=True, registers=registers)

            def finish(out, slot):
                """`out`, complete; hands back this warpgroup's half of the page."""
                (out,) = wgmma.wait(0, out)
                release(slot, HALF * me)
                return out

            def risen(m, s_max):
                return jnp.where(s_max > m + tuning.rise, s_max, m)

            def even_pair(length, begin, end, pair, carry):
                out, m, total = carry
                s = scores(length, begin + 2 * pair, end)
                m_even = risen(m, largest(s))
                p = weights(s, m_even)
                row_s[0] = m_even
                low_p = p.astype(jnp.bfloat16)
                publish(low_p)
                plgpu.commit_smem()
                plgpu.barrier_arrive(p_ready.at[0])
                decay = jnp.exp2(m - m_even)
                total = total * decay + jnp.sum(p, axis=1)
                out = wgmma.scale_rows(out, decay)
                out = weigh(out, low_p, 0)
                out = finish(out, 0)
                plgpu.barrier_wait(p_ready.at[1])
                m_odd = plgpu.load(row_s.at[1], layout=LANES)
                decay = jnp.exp2(m_even - m_odd)
                out = wgmma.scale_rows(out, decay)
                out = finish(weigh(out, p_s, 1), 1)
                return out, m_odd, total * decay

            def odd_pair(length, begin, end, pair, carry):
                out, m, total = carry
                s = scores(length, begin + 2 * pair + 1, end)
                s_max = largest(s)
                plgpu.barrier_wait(p_ready.at[0])
                m_even = plgpu.load(row_s.at[0], layout=LANES)
                decay_even = jnp.exp2(m - m_even)
                out = wgmma.scale_rows(out, decay_even)
                out = weigh(out, p_s, 0)
                # The softmax runs while the product above does.
                m_odd = risen(m_even, s_max)
                p = weights(s, m_odd)
                decay_odd = jnp.exp2(m_even - m_odd)
                total = total * decay_even * decay_odd + jnp.sum(p, axis=1)
                low_p = p.astype(jnp.bfloat16)
                out = finish(out, 0)
                row_s[1] = m_odd
                publish(low_p)
                plgpu.commit_smem()
                plgpu.barrier_arrive(p_ready.at[1])
                out = wgmma.scale_rows(out, decay_odd)
                out = weigh(out, low_p, 1)
                out = finish(out, 1)
                return out, m_odd, total

            # What this warpgroup hands back, it owns at first.
            release(me, ROPE_TILE)
            for slot in range(2):
                release(slot, HALF * me)
            plgpu.barrier_arrive(q_empty)

            @for_each_piece
            def _(sequence, begin, end):
                plgpu.barrier_wait(q_full)
                zeros = (_zeros(),) * HALF
                lowest = plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), LANES)
                nothing = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), LANES)
                length = lengths[sequence]
                result, m, total = lax.fori_loop(
                    0,
                    pl.cdiv(end - begin, 2),
                    functools.partial((even_pair, odd_pair)[me], length, begin, end),
                    (zeros, lowest, nothing),
                )
                plgpu.barrier_arrive(q_empty)
                # The other warpgroup's share of the sum.
                row_s[2 + me] = total
                plgpu.commit_smem()
                plgpu.barrier_arrive(p_ready.at[2 + me])
                plgpu.barrier_wait(p_ready.at[3 - me])
                total = total + plgpu.load(row_s.at[3 - me], layout=LANES)
                some = total > 0
                result = _scaled(result, jnp.where(some, 1 / jnp.where(some, total, 1.0), 0.0))
                log_sum = jnp.where(some, m + jnp.log2(jnp.where(some, total, 1.0)), LOWEST)
                whole = (begin == 0) & (end == starts[sequence + 1] - starts[sequence])

                @pl.when(whole)
                def _():
                    for t in range(HALF):
                        columns = pl.ds((HALF * me + t) * 64, 64)
                        out[sequence, pl.ds(row, ROWS), columns] = result[t].astype(jnp.bfloat16)
                    if me == 0:
                        lse[sequence, pl.ds(row, ROWS)] = log_sum

                @pl.when(jnp.logical_not(whole))
                def _():
                    kind = (begin == 0).astype(jnp.int32)
                    for t in range(HALF):
                        columns = pl.ds((HALF * me + t) * 64, 64)
                        partial[kind, part, pl.ds(row, ROWS), columns] = result[t]
                    if me == 0:
                        partial_lse[kind, part, pl.ds(row, ROWS)] = log_sum

        @pl.when(warpgroup == 0)
        def _even():
            plgpu.set_max_registers(registers[1], action="increase")
            _math(0)

        @pl.when(warpgroup == 1)
        def _odd():
            plgpu.set_max_registers(registers[1], action="increase")
            _math(1)

    # A barrier over a cluster is arrived at by one thread, one over a block by all 128.
    released = functools.partial(plgpu.ClusterBarrier, collective_axes=("cluster",))
    signal = functools.partial(plgpu.ClusterBarrier, collective_axes=("alone",))
    transforms = swizzled(jnp.bfloat16)
    tile_of = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=transforms)
    struct = jax.ShapeDtypeStruct
    out, lse, partial, partial_lse = plgpu.kernel(
        kernel,
        out_type=(
            struct((batch, padded, width), jnp.bfloat16),
            struct((batch, padded), jnp.float32),
            struct((2, parts, padded, width), jnp.float32),
            struct((2, parts, padded), jnp.float32),
        ),
        grid=(tiles // cluster, parts),
        grid_names=("tile", "part"),
        cluster=(cluster, 1),
        cluster_names=("cluster", "alone"),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=(
            tile_of((TILES, ROWS, 64)),
            tile_of((2, TILES, PAGE, 64)),
            tile_of((ROWS, PAGE)),
            tile_of((2, ROWS, PAGE)) if interpreted else plgpu.SMEM((32,), jnp.float32),
            plgpu.SMEM((4, ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=TILES),
            signal(num_arrivals=2),
            plgpu.Barrier(num_barriers=2 * TILES),
            signal(num_barriers=2 * TILES),
            released(num_barriers=2 * len(GROUPS)),
            signal(num_barriers=4),
        ),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            reduction_scratch_bytes=0,
            # What is shared is handed over by barriers, after `commit_smem` or `synchronize`. With
            # Pallas's own barriers beside them results are the same bits, 1 % later.
            unsafe_no_auto_barriers=True,
        ),
    )(
        q_latent, q_rope, pool, rope, block_table, lengths,
        schedule.starts, schedule.cuts, schedule.first, schedule.last,
    )  # fmt: skip
    return (out, lse), (partial, partial_lse)


def _zeros():
    return plgpu.layout_cast(jnp.zeros((ROWS, 64), jnp.float32), WGMMA)


def _across(row):
    return lax.broadcast_in_dim(row, (ROWS, 64), [0])


def _scaled(tiles, factor):
    return tuple(tile * _across(factor) for tile in tiles)
