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

from dsv3_jax.kernels import manual
from dsv3_jax.kernels.gemm import hopper
from dsv3_jax.kernels.gemm.hopper import WGMMA, plgpu, swizzled
from dsv3_jax.kernels.mla_decode import wgmma
from dsv3_jax.kernels.mla_decode.api import Pages, Results, Rows
from dsv3_jax.kernels.mla_decode.schedule import PAGE, Schedule, make_schedule
from dsv3_jax.quantization.block_scaled import BlockScaled, dequantize

ROWS = 64  # of a block: heads x new tokens
LATENT_TILES = 8
TILES = 9  # of 64 columns each: latent, then rope
ORDER = (8, *range(8))  # rope first, whose place is the first to be free
GROUPS = (8, 0, 4)  # the first tile of each group that is handed back at once
HALF = 4  # tiles of the output that a math warpgroup holds
LOG2_E = math.log2(math.e)
LOWEST = -1e30  # finite, so that a row that sees nothing yields zeros and not NaN
LANES = WGMMA.reduce(1)
# A thread starts with 168: asking for more than three times that in all would wait for ever.
LOADER_REGISTERS, MATH_REGISTERS = 40, 232


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
    if isinstance(latent, BlockScaled):
        # By XLA, and only the pages of these sequences: the pool may hold all layers' pages.
        numbers = jnp.clip(block_table, 0, rope.shape[0] - 1).reshape(-1)
        latent = dequantize(jax.tree.map(lambda x: x[numbers], latent), q_latent.dtype)
    if {x.dtype for x in (q_latent, q_rope, latent, rope)} != {jnp.dtype(jnp.bfloat16)}:
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
    if _row_tiles(rows) % tuning.cluster:
        tuning = dataclasses.replace(tuning, cluster=1)
    in_order = isinstance(pages.latent, BlockScaled)
    operands = (q_latent, q_rope, latent, rope, block_table, lengths, schedule)
    whole, partial = _attend(*operands, scale, new, in_order, tuning)
    out, lse = (x[:, :rows] for x in _combine(*whole, *partial, schedule))
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
    q_latent, q_rope, latent, rope, block_table, lengths, schedule,
    scale, new: int, in_order: bool, tuning: Tuning,
):  # fmt: skip
    """Results of sequences that one part reads alone, and partial results; both with log-sum-exp.

    `in_order`: latents are not where the table says, but one table entry after the other.

    A part's partial result of a sequence that began in an earlier part is at [0, part], and of one
    that it begins and does not end at [1, part].
    """
    batch, rows, width = q_latent.shape
    heads = rows // new
    tiles, parts = _row_tiles(rows), schedule.parts
    padded = tiles * ROWS
    if hopper._interpreting.get():  # TMA reads zeros past the edge, and the interpreter nothing
        q_latent, q_rope = (
            jnp.pad(q, ((0, 0), (0, padded - rows), (0, 0))) for q in (q_latent, q_rope)
        )
    log_scale = scale * LOG2_E
    interpreted = hopper._interpreting.get()
    cluster = tuning.cluster
    multicast = ("cluster",) if cluster > 1 else None

    def kernel(
        q_latent, q_rope, latent, rope, table, lengths, starts, cuts, first, last,
        out, lse, partial, partial_lse,
        q_s, k_s, p_s, own_s, row_s, q_full, q_empty, k_full, k_empty, p_ready,
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

        def load():
            @for_each_piece
            def _(sequence, begin, end):
                plgpu.barrier_wait(q_empty)
                for t in range(TILES):
                    source = q_latent if t < LATENT_TILES else q_rope
                    columns = pl.ds(t * 64 if t < LATENT_TILES else 0, 64)
                    plgpu.copy_gmem_to_smem(
                        source.at[sequence, pl.ds(row, ROWS), columns], q_s.at[t], q_full
                    )

                @pl.loop(0, pl.cdiv(end - begin, 2))
                def _(pair):
                    for slot in range(2):
                        place = lax.min(begin + 2 * pair + slot, end - 1)
                        page = table[sequence, place]
                        latent_page = sequence * table.shape[1] + place if in_order else page
                        for t in ORDER:
                            if t in GROUPS:
                                plgpu.barrier_wait(k_empty.at[slot * len(GROUPS) + GROUPS.index(t)])
                            if t < LATENT_TILES:
                                source = latent.at[latent_page, :, pl.ds(t * 64, 64)]
                            else:
                                source = rope.at[page]
                            plgpu.copy_gmem_to_smem(
                                source,
                                k_s.at[slot, t],
                                k_full.at[slot * TILES + t],
                                collective_axes=multicast,
                            )

            plgpu.barrier_wait(q_empty)
            for index in range(2 * len(GROUPS)):
                plgpu.barrier_wait(k_empty.at[index])

        @pl.when(warpgroup == 2)
        def _load():
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
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
                    plgpu.barrier_wait(k_full.at[me * TILES + t])
                    s = wgmma.multiply(
                        s,
                        q_s.at[t],
                        k_s.at[me, pl.ds(t, 1)],
                        b_rows_first=False,
                        clear=t == ORDER[0],
                    )
                ((s,),) = wgmma.wait(0, s)
                release(me, 8)
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
            release(me, 8)
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
            plgpu.set_max_registers(MATH_REGISTERS, action="increase")
            _math(0)

        @pl.when(warpgroup == 1)
        def _odd():
            plgpu.set_max_registers(MATH_REGISTERS, action="increase")
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
        q_latent, q_rope, latent, rope, block_table, lengths,
        schedule.starts, schedule.cuts, schedule.first, schedule.last,
    )  # fmt: skip
    return (out, lse), (partial, partial_lse)


def _zeros():
    return plgpu.layout_cast(jnp.zeros((ROWS, 64), jnp.float32), WGMMA)


def _across(row):
    return lax.broadcast_in_dim(row, (ROWS, 64), [0])


def _scaled(tiles, factor):
    return tuple(tile * _across(factor) for tile in tiles)


def _combine(out, lse, partial, partial_lse, schedule: Schedule):
    """`out` and `lse` with the sequences that several parts read filled in from partial results."""
    batch, rows, width = out.shape
    parts = schedule.parts
    # Loads in flight hide their latency: of many pieces where few sequences share all parts, of
    # many rows otherwise.
    pieces = min(16, pl.next_power_of_2(pl.cdiv(parts, batch)))
    row_count = 16 // pieces
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=4)

    def kernel(partial, partial_lse, begins, ends, out, lse):
        sequence, row = lax.axis_index("sequence"), lax.axis_index("rows") * row_count
        begin, end = begins[sequence], ends[sequence]

        @pl.when(end - begin > 1)
        def _():
            def chunk(index, carry):
                first = begin + index * pieces
                places = [lax.min(first + i, end - 1) for i in range(pieces)]
                kinds = [(place == begin).astype(jnp.int32) for place in places]
                real = [first + i < end for i in range(pieces)]
                results = []
                for r, (total, weight, top) in enumerate(carry):
                    at = [(kind, place, row + r) for kind, place in zip(kinds, places)]
                    values = [plgpu.load(partial.at[i], layout=layout) for i in at]
                    logs = [lax.select(ok, partial_lse[i], LOWEST) for ok, i in zip(real, at)]
                    new_top = functools.reduce(lax.max, logs, top)
                    decay = jnp.exp2(top - new_top)
                    total, weight = total * decay, weight * decay
                    for value, log in zip(values, logs):
                        share = jnp.exp2(log - new_top)
                        total, weight = total + value * share, weight + share
                    results.append((total, weight, new_top))
                return tuple(results)

            nothing = plgpu.layout_cast(jnp.zeros((width,), jnp.float32), layout)
            init = ((nothing, jnp.float32(0), jnp.float32(2 * LOWEST)),) * row_count
            results = lax.fori_loop(0, pl.cdiv(end - begin, pieces), chunk, init)
            for r, (total, weight, top) in enumerate(results):
                out[sequence, row + r] = (total / weight).astype(out.dtype)
                lse[sequence, row + r] = top + jnp.log2(weight)

    refs = jax.new_ref(out), jax.new_ref(lse)
    plgpu.kernel(
        kernel,
        out_type=(),
        grid=(batch, rows // row_count),
        grid_names=("sequence", "rows"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(partial, partial_lse, schedule.begin, schedule.end, *refs)
    return tuple(map(jax.freeze, refs))
