"""The loop that every Hopper GEMM of this room shares, in Pallas Mosaic GPU.

A block (one a multiprocessor, persistent) holds one memory warpgroup and 1 to 3 math warpgroups.
The memory warpgroup keeps a ring of `stages` slots full by TMA: a slab of A, a slab of B, and A's
scales, 128 bytes of K each. A math warpgroup multiplies a slot by wgmma into a fresh accumulator,
hands the slot back, and adds accumulator x scales to its float32 total: the promotion every 128 of
K (V3 report, section 3.3.2). While one warpgroup promotes, the tensor core works for another.
The design is DeepGEMM's (sm90_fp8_gemm_1d2d.cuh), told in Pallas.

Work is a list of row tiles, each with the weights it meets: for a dense product the list is
arithmetic, for a grouped one it is a table made on the device (`WorkTable`).

A slot is released as soon as its last product is complete. For a handful of rows the time from one
product to the next is latency, not arithmetic; there a slot holds several slabs of K, whose
products are in flight together.
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.kernels import hopper, manual
from dsv3_jax.kernels.gemm import hopper_wgmma
from dsv3_jax.kernels.gemm.hopper_wgmma import SLAB_BYTES, multiply
from dsv3_jax.kernels.hopper import WGMMA, interpreted, plgpu, swizzled


@dataclass(frozen=True)
class Tile:
    """Sizes of the piece of the result that one block works on at a time.

    A math warpgroup owns `waves` x 64 rows and `parts` x `columns` columns, and gets through them
    one 64 x `columns` wgmma at a time. Totals and one accumulator must fit its registers: 64 x 128
    takes 64 of them, so waves x parts = 2 needs 192, and three warpgroups leave room for one.
    """

    warpgroups: int = 2
    waves: int = 1
    columns: int = 128
    parts: int = 1
    stages: int = 4
    slabs: int = 1  # 128 bytes of K that share a slot, and whose products overlap
    cluster: int = 1  # neighbouring tiles that share one read of an operand (TMA multicast)
    shared: Literal["a", "b"] = "a"  # "a": they lie side by side; "b": one under the other
    store_buffers: int = 1  # 64 x 64 pieces of a warpgroup's result that are stored together
    band: int = 8  # column tiles that are walked side by side, for the L2 cache's sake
    rows_first: bool = False  # a band is of row tiles instead

    @property
    def m(self) -> int:
        """Rows."""
        return 64 * self.waves * self.warpgroups

    @property
    def n(self) -> int:
        """Columns."""
        return self.columns * self.parts

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a memory and of a math thread; a block has 65536 in all."""
        return {1: (40, 232), 2: (24, 240), 3: (24, 160)}[self.warpgroups]


class WorkTable(NamedTuple):
    """The row tiles of a grouped product, as a kernel reads them.

    Tile t covers rows row[t] to row[t] + tile.m of the operand, and stores those before end[t].
    """

    expert: Int[Array, " T"]
    row: Int[Array, " T"]
    end: Int[Array, " T"]
    count: Int[Array, "1"]  # the first so many tiles are real
    used: Int[Array, "1"]  # rows from here on belong to nobody, and are stored as zeros


def matmul(
    a: Float[Array, "M K"],
    b: Float[Array, "E N K"] | Float[Array, "E K N"],
    tile: Tile,
    *,
    a_scales: Float[Array, "KB M"] | None = None,
    b_scales: Float[Array, "E NB KB"] | None = None,
    work: WorkTable | None = None,
    b_rows_first: bool = False,
) -> Float[Array, "M N"]:
    """a @ b[expert].T in bfloat16, for E4M3 operands with scales or bfloat16 ones without.

    `b_rows_first`: b is [E, K, N] instead, which the tensor core reads in bfloat16 only.

    M and N are multiples of 8, and M of 4 x 4 bytes for the scales' TMA; edges that cut a tile are
    loaded as zeros and not stored.
    """
    a, b, a_scales, b_scales, work = manual.vary((a, b, a_scales, b_scales, work))
    m, k = a.shape
    n = b.shape[2] if b_rows_first else b.shape[1]
    scaled = a_scales is not None
    width = tile.slabs * SLAB_BYTES // a.dtype.itemsize  # of K in a slot
    steps, stages = pl.cdiv(k, width), tile.stages  # what lies past K is loaded as zeros
    across, down = (tile.cluster, 1) if tile.shared == "a" else (1, tile.cluster)
    n_tiles = pl.cdiv(pl.cdiv(n, tile.n), across)
    if work is not None and down > 1:
        raise ValueError("neighbouring row tiles of a grouped product may have different weights")
    m_tiles = pl.cdiv(pl.cdiv(m, tile.m), down) if work is None else work.row.shape[0]
    blocks = min(hopper.multiprocessors() // tile.cluster, m_tiles * n_tiles)
    copies = 3 if scaled else 2
    piece = math.gcd(tile.columns, 128)  # columns under one scale, wherever a tile starts
    store = math.gcd(piece, 64)
    memory_registers, math_registers = tile.registers
    multicast = {tile.shared: ("cluster",)} if tile.cluster > 1 else {}

    def kernel(*refs):
        refs = list(refs)
        a_ref, b_ref = refs[:2]
        del refs[:2]
        a_scales_ref, b_scales_ref = (refs.pop(0), refs.pop(0)) if scaled else (None, None)
        table = WorkTable(*(refs.pop(0) for _ in range(5))) if work is not None else None
        out, a_slots, b_slots, scale_slots, out_slots, full, empty = refs
        thread = lax.axis_index("warpgroup")
        count = m_tiles if table is None else table.count[0]
        schedule = plgpu.nd_loop((count * n_tiles,), collective_axes="block")

        def place(index):
            """First row and column of a tile, its expert, and the row its stores stop at."""
            order = (0, tile.band) if tile.rows_first else (1, tile.band)
            row_tile, column_tile = plgpu.planar_snake(index, (count, n_tiles), *order)
            rank = lax.axis_index("cluster")
            column = (column_tile * across + (rank if across > 1 else 0)) * tile.n
            if table is not None:
                expert = table.expert[row_tile]
                return pl.multiple_of(table.row[row_tile], 64), column, expert, table.end[row_tile]
            return (row_tile * down + (rank if down > 1 else 0)) * tile.m, column, 0, m

        def slot_of(info, step):
            return lax.rem(info.local_index * steps + step, jnp.int32(stages))

        @pl.when(thread == tile.warpgroups)
        def _load():
            plgpu.set_max_registers(memory_registers, action="decrease")

            @schedule
            def _(info):
                row, column, expert = place(info.index[0])[:3]
                rows = pl.ds(row, tile.m)

                @pl.loop(0, steps)
                def _(step):
                    slot = slot_of(info, step)
                    plgpu.barrier_wait(empty.at[slot])
                    ks = pl.ds(step * width, width)
                    plgpu.copy_gmem_to_smem(
                        a_ref.at[rows, ks],
                        a_slots.at[slot],
                        full.at[slot],
                        collective_axes=multicast.get("a"),
                    )
                    b_at = (pl.ds(column, tile.n), ks)
                    plgpu.copy_gmem_to_smem(
                        b_ref.at[expert, *(b_at[::-1] if b_rows_first else b_at)],
                        b_slots.at[slot],
                        full.at[slot],
                        collective_axes=multicast.get("b"),
                    )
                    if a_scales_ref is not None:
                        plgpu.copy_gmem_to_smem(
                            a_scales_ref.at[pl.ds(step * tile.slabs, tile.slabs), rows],
                            scale_slots.at[slot],
                            full.at[slot],
                        )

            # A block must not leave while a neighbour may still hand back a shared slot.
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
            def _(info):
                row, column, expert, end = place(info.index[0])
                slots = functools.partial(slot_of, info)
                if scaled:
                    total = _scaled_loop(
                        tile,
                        steps,
                        slots,
                        (a_slots, b_slots, scale_slots, full, empty),
                        _scale_reader(b_scales_ref, expert, column, tile),
                    )
                else:
                    buffers = (a_slots, b_slots, full, empty)
                    total = _plain_loop(tile, steps, slots, buffers, b_rows_first)
                pieces = [
                    (wave, left) for wave in range(tile.waves) for left in range(0, tile.n, store)
                ]
                for at in range(0, len(pieces), tile.store_buffers):
                    batch = pieces[at : at + tile.store_buffers]
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    for buffer, (wave, left) in enumerate(batch):
                        values = total[wave * (tile.n // piece) + left // piece]
                        if piece > store:
                            values = values[:, left % piece : left % piece + store]
                        out_slots.at[thread, buffer][...] = values.astype(jnp.bfloat16)
                    plgpu.commit_smem()
                    for buffer, (wave, left) in enumerate(batch):
                        first = row + thread * (64 * tile.waves) + wave * 64
                        target = out.at[pl.ds(first, 64), pl.ds(column + left, store)]
                        send = functools.partial(
                            plgpu.copy_smem_to_gmem,
                            out_slots.at[thread, buffer],
                            target,
                            commit_group=False,
                        )
                        if table is not None:  # past `end` another block stores its group's rows
                            send = functools.partial(pl.when(first < end), send)
                        store_inside(column + left, n, store, send)
                    plgpu.commit_smem_to_gmem_group()

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            if table is not None:
                _store_zeros(out, out_slots.at[thread, 0], table.used[0], thread, tile)

    operands = [a, b]
    if a_scales is not None and b_scales is not None:
        operands += [a_scales, b_scales]
    if work is not None:
        operands += work
    barrier: Any = plgpu.Barrier
    if tile.cluster > 1:
        barrier = functools.partial(plgpu.ClusterBarrier, collective_axes=("cluster",))
    out = hopper.kernel(
        kernel,
        out_type=manual.result((m, n), jnp.bfloat16, a),
        grid=(blocks,),
        grid_names=("block",),
        cluster=(tile.cluster,),
        cluster_names=("cluster",),
        num_threads=tile.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=(
            plgpu.SMEM((stages, tile.m, width), a.dtype, transforms=swizzled(a.dtype)),
            plgpu.SMEM(
                (stages, width, tile.n) if b_rows_first else (stages, tile.n, width),
                b.dtype,
                transforms=swizzled(b.dtype),
            ),
            plgpu.SMEM((stages, tile.slabs, tile.m) if scaled else (32,), jnp.float32),
            plgpu.SMEM(
                (tile.warpgroups, tile.store_buffers, 64, store),
                jnp.bfloat16,
                transforms=swizzled(jnp.bfloat16, math.gcd(n, store)),
            ),
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            barrier(num_arrivals=tile.warpgroups, num_barriers=stages),
        ),
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )(*operands)
    return manual.vary(out, a)


def store_inside(first: Any, columns: int, piece: int, send: Callable[[], Any]) -> None:
    """Calls `send`, which stores a piece of the result from column `first` on.

    TMA itself leaves out what lies past the end. But of a result with a single piece Mosaic (jax
    0.11.2, TileTransform and DropUnitDimsTransform) drops the index, too, and would store what lies
    past the end over it: that is not sent.
    """
    if columns == piece:
        pl.when(first < columns)(send)
    else:
        send()


def _scaled_loop(tile, steps, slot_of, buffers, read_b_scales):
    """Totals of a tile of FP8 operands: one (64, piece) array for each wave and piece.

    While the last product of a step is in flight, the next step is made ready: its slot is waited
    for and its scales are read. Nothing but a promotion then stands between two products.
    """
    a_slots, b_slots, scale_slots, full, empty = buffers
    piece = math.gcd(tile.columns, 128)
    thread = lax.axis_index("warpgroup")
    products = list(itertools.product(range(tile.waves), range(tile.parts)))
    rows = [pl.ds(thread * (64 * tile.waves) + wave * 64, 64) for wave in range(tile.waves)]
    ks = [pl.ds(slab * SLAB_BYTES, SLAB_BYTES) for slab in range(tile.slabs)]
    last_step = steps - 1

    def start(accumulator, a, b):
        return multiply(a, b) if interpreted() else hopper_wgmma.start(accumulator, a, b)

    def make_ready(step):
        slot = slot_of(step)
        plgpu.barrier_wait(full.at[slot])
        return [
            [plgpu.load(scale_slots.at[slot, i, r], layout=WGMMA.reduce(1)) for i in range(len(ks))]
            for r in rows
        ]

    def one_step(step, carry, ends: bool):
        """Adds a step to the totals; the scales of the next two are there when it `ends` not."""
        totals, accumulators, a_scales, b_scales, next_b_scales = carry
        totals, next_a_scales, later_b_scales = list(totals), a_scales, next_b_scales
        slot = slot_of(step)
        for wave, part in products:
            columns = pl.ds(part * tile.columns, tile.columns)
            accumulators = [
                start(accumulator, a_slots.at[slot, rows[wave], k], b_slots.at[slot, columns, k])
                for accumulator, k in zip(accumulators, ks)
            ]
            last = (wave, part) == products[-1]
            if last and not ends:
                next_a_scales = make_ready(step + 1)
                later_b_scales = read_b_scales(lax.min(step + 2, jnp.int32(last_step)))
            if not interpreted():
                accumulators = list(hopper_wgmma.finish(accumulators))
            if last:
                plgpu.barrier_arrive(empty.at[slot])
            for slab, first in itertools.product(range(tile.slabs), range(0, tile.columns, piece)):
                place = (part * tile.columns + first) // piece
                scale = a_scales[wave][slab] * b_scales[slab][place]
                block = accumulators[slab]
                if piece < tile.columns:
                    block = block[:, first : first + piece]
                scale = lax.broadcast_in_dim(scale, (64, piece), [0])
                totals[wave * (tile.n // piece) + place] += block * scale
        return totals, accumulators, next_a_scales, next_b_scales, later_b_scales

    carry = (
        [hopper_wgmma.zeros(piece)] * (tile.waves * tile.n // piece),
        [hopper_wgmma.zeros(tile.columns)] * tile.slabs,
        make_ready(jnp.int32(0)),
        read_b_scales(jnp.int32(0)),
        read_b_scales(jnp.int32(min(1, last_step))),
    )
    carry = lax.fori_loop(0, last_step, functools.partial(one_step, ends=False), carry)
    return one_step(jnp.int32(last_step), carry, ends=True)[0]


def _plain_loop(tile, steps, slot_of, buffers, b_rows_first):
    """Totals of a tile of bfloat16 operands, which the tensor core adds up in float32 itself."""
    a_slots, b_slots, full, empty = buffers
    piece = math.gcd(tile.columns, 128)
    thread = lax.axis_index("warpgroup")
    rows = pl.ds(thread * 64, 64)

    def accumulate(sum_ref):
        @pl.loop(0, steps)
        def _(step):
            slot = slot_of(step)
            plgpu.barrier_wait(full.at[slot])
            b_block = b_slots.at[slot]
            plgpu.wgmma(sum_ref, a_slots.at[slot, rows], b_block if b_rows_first else b_block.T)
            # One wgmma stays in flight; the slot before it has been read.
            plgpu.wgmma_wait(1)

            @pl.when(step > 0)
            def _():
                plgpu.barrier_arrive(empty.at[slot_of(step - 1)])

        total = sum_ref[...]
        plgpu.barrier_arrive(empty.at[slot_of(steps - 1)])
        return total

    total = pl.run_scoped(accumulate, plgpu.ACC((64, tile.n), jnp.float32))
    return tuple(total[:, first : first + piece] for first in range(0, tile.n, piece))


def _scale_reader(b_scales, expert, column, tile: Tile):
    """A function of the step: for each slab, the scale of B for each piece of the columns."""
    piece = math.gcd(tile.columns, 128)
    last, last_slab = b_scales.shape[1] - 1, b_scales.shape[2] - 1
    first_block = lax.div(column, jnp.int32(128))
    aligned = tile.n % 128 == 0
    blocks = tile.n // 128 if aligned else pl.cdiv(tile.n - piece, 128) + 1

    def read_slab(slab):
        slab = lax.min(slab, jnp.int32(last_slab))
        scales = [
            b_scales[expert, lax.min(first_block + block, jnp.int32(last)), slab]
            for block in range(blocks)
        ]
        by_piece = []
        for start in range(0, tile.n, piece):
            scale = scales[start // 128]
            if not aligned and start // 128 + 1 < blocks:
                crossed = lax.div(column + start, jnp.int32(128)) > first_block + start // 128
                scale = lax.select(crossed, scales[start // 128 + 1], scale)
            by_piece.append(scale)
        return tuple(by_piece)

    return lambda step: tuple(read_slab(step * tile.slabs + i) for i in range(tile.slabs))


def _store_zeros(out, zeros, used, thread, tile: Tile):
    """Fills the rows from `used` on with zeros, 64 rows a warpgroup at a time."""
    store = zeros.shape[-1]
    rows, columns = pl.cdiv(out.shape[0] - used, 64 * tile.warpgroups), pl.cdiv(out.shape[1], store)
    zeros[...] = plgpu.layout_cast(jnp.zeros((64, store), jnp.bfloat16), WGMMA)
    plgpu.commit_smem()

    @plgpu.nd_loop((rows * columns,), collective_axes=("block", "cluster"))
    def _(info):
        row = used + (lax.div(info.index[0], columns) * tile.warpgroups + thread) * 64
        column = lax.rem(info.index[0], columns) * store
        row = pl.multiple_of(row, 64)
        plgpu.copy_smem_to_gmem(zeros, out.at[pl.ds(row, 64), pl.ds(column, store)])

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
