"""Reading peers' rows on Hopper: bulk copies over NVLink into shared memory, and on to their slots.

Every device reads; nobody writes to another's memory. So a kernel needs two agreements only: all
peers' inputs are there (XLA holds all devices at a barrier before a kernel that names others'
memory), and no input is given up while a peer may still read it (the semaphore at the end). Rows
are taken from the peers in turn, each device beginning with itself, so that all links are in use
at all times.

A block is one multiprocessor's: its warpgroups work alone, each with a ring of rows in shared
memory. While one row is on its way out to its slots, the next ones are on their way in.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.kernels import hopper, manual
from dsv3_jax.kernels.hopper import plgpu
from dsv3_jax.kernels.peers import hopper_slots
from dsv3_jax.kernels.peers.hopper_slots import LANES, piece_of, strided, sum_slots

Axes = tuple[str, ...]

WARPGROUPS = 4  # of a block that copies
SUMMING = 2  # of a block that adds up
STAGES = 8  # rows in flight of a warpgroup, at most
MAX_BARRIERS = 32
ROOM = 200 * 1024  # bytes of shared memory for rows
BULK = 16  # bytes that a bulk copy's size is a multiple of


class Peers(NamedTuple):
    """The devices that read from each other, and this one's number among them.

    Without axes they are those of an emulation on one device, which Pallas's interpreter can run:
    it knows no other device's memory. Every operand then holds the rows of all, [N, R, ...].
    """

    size: int
    axes: Axes = ()
    me: int = 0

    def index(self) -> Any:
        """This device's number, in a kernel."""
        return lax.axis_index(self.axes) if self.axes else jnp.int32(self.me)

    def rows_of(self, ref: Any, peer: Any, *where: Any) -> Any:
        """The reference to what a peer has in place of this device's ref.at[where]."""
        if not self.axes:
            return ref.at[peer, *where]
        return plgpu.remote_ref(ref.at[where], self.place_of(peer))

    def place_of(self, peer: Any) -> dict[str, Any]:
        """The mesh coordinates of peer number `peer`."""
        place = {}
        for axis in reversed(self.axes):
            size = jnp.int32(lax.axis_size(axis))
            place[axis] = lax.rem(peer, size)
            peer = lax.div(peer, size)
        return place

    def fetch(self, source: Any, target: Any, arrived: Any) -> None:
        """Begins a copy of `rows_of` into shared memory."""
        if self.axes:
            # Not zeros: one bulk copy, from an address that the kernel finds.
            inside = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
            plgpu.copy_gmem_to_smem(source, target, arrived, oob_mode=inside)
        else:
            plgpu.copy_gmem_to_smem(source, target, arrived)

    def semaphores(self) -> list[Any]:
        """What `leave_together` needs of scratch."""
        return [plgpu.SemaphoreType.REGULAR] if self.axes else []

    def leave_together(self, semaphores: Sequence[Any], warpgroups: int) -> None:
        """Ends the kernel only when every peer's warpgroups have read what they want from here.

        A semaphore of scratch memory is a block's own: block b waits for block b of every peer.
        """
        for semaphore in semaphores:
            for peer in range(self.size):
                pl.semaphore_signal(semaphore, device_id=self.place_of(jnp.int32(peer)))

            @pl.when(lax.axis_index("warpgroup") == 0)
            def _(semaphore=semaphore):
                pl.semaphore_wait(semaphore, self.size * warpgroups, decrement=False)


def gather_rows(
    x: Array,
    slots: Int[Array, "NR K"],
    free: Int[Array, "E 2"],
    *,
    num_rows: int,
    axes: Axes,
    multiprocessors: int,
) -> Array:
    """The rows of all peers at their slots; see `api.gather_rows`."""
    peers = _peers(axes, x)
    return gather_from(peers, x, slots, free, num_rows, multiprocessors, beside(multiprocessors))


def beside(multiprocessors: int) -> int:
    """The blocks that copy at home while so many multiprocessors read from others."""
    return max(hopper.multiprocessors() - multiprocessors, 1)


sum_slots_backward = hopper_slots.sum_slots_backward


def return_rows(
    rows: Float[Array, "M D"],
    weights: Float[Array, "NR K"] | None,
    slots: Int[Array, "NR K"],
    needed: Bool[Array, "R N"],
    *,
    sent_as: Any,
    axes: Axes,
    multiprocessors: int,
) -> Float[Array, "R D"]:
    """What peers have for each row, summed; see `api.return_rows`."""
    peers = _peers(axes, jax.ShapeDtypeStruct(rows.shape, sent_as))
    partial = sum_slots(rows, weights, slots, dtype=sent_as)
    return sum_from(peers, partial, needed, rows.dtype, multiprocessors)


def gather_from(
    peers: Peers,
    x: Array,
    slots: Int[Array, "NR K"],
    free: Int[Array, "E 2"],
    num_rows: int,
    multiprocessors: int,
    at_home: int,
) -> Array:
    """`gather_rows` from these peers: of the grid's blocks the first ones read from others.

    `at_home` more copy this device's own rows and write the zeros. They wait for nobody, and are
    through long before the first ones are.
    """
    items, per_row = slots.shape
    rows, dim = items // peers.size, x.shape[-1]
    stages = min(STAGES, ROOM // (_row_bytes(x) * WARPGROUPS))
    if stages < 2:
        raise NotImplementedError(f"rows of {_row_bytes(x)} bytes do not fit into shared memory")
    others = peers.size - 1
    readers, copiers = multiprocessors * WARPGROUPS, at_home * WARPGROUPS
    x, slots, free = manual.vary((x, slots, free))
    wanted = (slots < num_rows).any(axis=1).astype(jnp.int32)

    def kernel(x_ref, wanted_ref, slots_ref, free_ref, out, ring, zeros, arrived, *done):
        block, me = lax.axis_index("block"), peers.index()
        reads = block < multiprocessors
        first = lax.select(reads, block, block - multiprocessors) * WARPGROUPS
        worker = first + lax.axis_index("warpgroup")
        workers = lax.select(reads, jnp.int32(readers), jnp.int32(copiers))
        count = lax.select(reads, jnp.int32(rows * others), jnp.int32(rows))

        def place(step):
            return lax.axis_index("warpgroup") * stages + lax.rem(step, jnp.int32(stages))

        def source_of(step):
            """The peer whose row this step takes, its place there, and whether there is one."""
            item = step * workers + worker
            # Of a multiple of the peers every warpgroup would have one peer's rows only.
            turn = item + step if readers % others == 0 else item
            turn = lax.select(reads, lax.rem(turn, jnp.int32(others)) + 1, jnp.int32(0))
            row = lax.select(reads, lax.div(item, jnp.int32(others)), item)
            peer = lax.rem(me + turn, jnp.int32(peers.size))
            return peer, lax.min(row, jnp.int32(rows - 1)), item < count

        def is_wanted(step):
            peer, row, there = source_of(step)
            return there & (wanted_ref[peer * rows + row] > 0)

        def slots_of(step):
            peer, row, there = source_of(step)
            found = [slots_ref[peer * rows + row, k] for k in range(per_row)]
            return [lax.select(there, slot, jnp.int32(num_rows)) for slot in found]

        def fetch(step):
            peer, row, _ = source_of(step)
            theirs = peers.rows_of(x_ref, peer, row)
            peers.fetch(theirs, ring.at[place(step)], arrived.at[place(step)])

        def store(step, slot):
            plgpu.copy_smem_to_gmem(ring.at[place(step)], out.at[slot], commit_group=False)

        for step in range(stages):
            pl.when(is_wanted(step))(functools.partial(fetch, jnp.int32(step)))

        @pl.when(jnp.logical_not(reads) & (lax.axis_index("warpgroup") == 0))
        def _():
            _clear(zeros, out, free_ref, block - multiprocessors, at_home)

        def take(step, known):
            fetch_next, *slots_now = known
            # What the next step must know is on its way while this one waits for its row.
            known = [is_wanted(step + stages), *slots_of(step + 1)]

            @pl.when(functools.reduce(lax.min, slots_now) < num_rows)
            def _():
                plgpu.barrier_wait(arrived.at[place(step)])
                for slot in slots_now:
                    pl.when(slot < num_rows)(functools.partial(store, step, slot))

            plgpu.commit_smem_to_gmem_group()
            # The row before this one has left its place.
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            pl.when(fetch_next)(lambda: fetch(step - 1 + stages))
            return known

        steps = lax.div(count + workers - 1, workers)
        lax.fori_loop(jnp.int32(0), steps, take, [jnp.bool_(False), *slots_of(jnp.int32(0))])
        plgpu.wait_smem_to_gmem(0)

        @pl.when(reads)
        def _():
            peers.leave_together(done, WARPGROUPS)

    out = plgpu.kernel(
        kernel,
        out_type=manual.result((num_rows, dim), x.dtype, slots),
        grid=(multiprocessors + at_home,),
        grid_names=("block",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((WARPGROUPS * stages, dim), x.dtype),
            # A register store fills whole multiples of the threads.
            plgpu.SMEM((pl.cdiv(dim, LANES) * LANES,), x.dtype),
            plgpu.Barrier(num_barriers=WARPGROUPS * stages),
            *peers.semaphores(),
        ],
    )(x, wanted, slots, free)
    return manual.vary(out, slots)


def sum_from(
    peers: Peers,
    partial: Float[Array, "*all NR D"],
    needed: Bool[Array, "R N"],
    dtype: Any,
    multiprocessors: int,
) -> Float[Array, "R D"]:
    """The sum of what each of these peers has for this device's rows.

    `partial` is this device's array; without axes, where Peers only counts, that of all of them.
    """
    rows, dim = needed.shape[0], partial.shape[-1]
    piece = piece_of(dim)
    pieces, layout = dim // piece, strided(piece)
    stage_bytes = peers.size * piece * partial.dtype.itemsize
    stages = min(STAGES, MAX_BARRIERS // SUMMING, ROOM // (stage_bytes * SUMMING))
    if stages < 2:
        raise NotImplementedError(f"{peers.size} peers' rows do not fit into shared memory")
    workers = multiprocessors * SUMMING
    partial, needed = manual.vary((partial, needed.astype(jnp.int32)))

    def kernel(source, needed_ref, out, ring, arrived, *done):
        worker = lax.axis_index("block") * SUMMING + lax.axis_index("warpgroup")
        me = peers.index()

        def place(step):
            return lax.axis_index("warpgroup") * stages + lax.rem(step, jnp.int32(stages))

        def columns_of(step):
            item = step * workers + worker
            row, which = lax.div(item, jnp.int32(pieces)), lax.rem(item, jnp.int32(pieces))
            return row, pl.ds(which * piece, piece)

        def fetch(step):
            row, columns = columns_of(step)

            @pl.when(row < rows)
            def _():
                for turn in range(peers.size):
                    peer = lax.rem(me + turn, jnp.int32(peers.size))
                    theirs = peers.rows_of(source, peer, me * rows + row, columns)
                    copy = functools.partial(peers.fetch, theirs, ring.at[place(step), peer])
                    skip = plgpu.barrier_arrive
                    for wanted, act in (
                        (needed_ref[row, peer] > 0, copy),
                        (needed_ref[row, peer] <= 0, skip),
                    ):
                        pl.when(wanted)(functools.partial(act, arrived.at[place(step)]))

        for step in range(stages):
            fetch(jnp.int32(step))

        @pl.loop(0, pl.cdiv(rows * pieces, workers))
        def _(step):
            row, columns = columns_of(step)

            @pl.when(row < rows)
            def _():
                plgpu.barrier_wait(arrived.at[place(step)])
                total = plgpu.layout_cast(jnp.zeros((piece,), jnp.float32), layout)
                for peer in range(peers.size):

                    def add(total, peer=peer):
                        theirs = ring.at[place(step), peer]
                        theirs = plgpu.load(theirs, layout=layout, optimized=False)
                        return total + theirs.astype(jnp.float32)

                    total = lax.cond(needed_ref[row, peer] > 0, add, lambda total: total, total)
                out[row, columns] = total.astype(out.dtype)

            fetch(step + stages)

        peers.leave_together(done, SUMMING)

    out = plgpu.kernel(
        kernel,
        out_type=manual.result((rows, dim), dtype, partial),
        grid=(multiprocessors,),
        grid_names=("block",),
        num_threads=SUMMING,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((SUMMING * stages, peers.size, piece), partial.dtype),
            plgpu.Barrier(num_arrivals=peers.size, num_barriers=SUMMING * stages),
            *peers.semaphores(),
        ],
    )(partial, needed)
    return manual.vary(out, partial)


def _clear(zeros, out, free_ref, block, blocks: int) -> None:
    """Zeros in the free rows of the experts' groups."""
    zeros[...] = jnp.zeros(zeros.shape, zeros.dtype)
    plgpu.commit_smem()
    experts = free_ref.shape[0]

    @pl.loop(0, pl.cdiv(experts, blocks))
    def _(turn):
        expert = turn * blocks + block

        @pl.when(expert < experts)
        def _():
            @pl.loop(free_ref[expert, 0], free_ref[expert, 1])
            def _(row):
                whole = zeros.at[pl.ds(0, out.shape[1])]
                plgpu.copy_smem_to_gmem(whole, out.at[row], commit_group=False)


def _row_bytes(part: Any) -> int:
    return part.shape[-1] * part.dtype.itemsize


def _peers(axes: Axes, x: Any) -> Peers:
    """The devices along the axes; NotImplementedError where they cannot read such rows."""
    hopper.require()
    if hopper.interpreted():
        raise NotImplementedError("Pallas's interpreter cannot read another device's memory")
    if jax.process_count() > 1:
        raise NotImplementedError("needs all devices in one process, which knows their addresses")
    if x.ndim != 2 or _row_bytes(x) % BULK:
        raise NotImplementedError(
            f"rows of {x.dtype}{list(x.shape[1:])} are no multiple of {BULK} bytes"
        )
    return Peers(math.prod(lax.axis_size(axis) for axis in axes), axes)
