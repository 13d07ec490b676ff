"""The warpgroup of a block of Hopper's paged attention that brings queries and pages."""

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels.hopper import plgpu
from dsv3_jax.kernels.mla_decode.fp8_pages import GROUPS as FP8_GROUPS
from dsv3_jax.kernels.mla_decode.hopper_block import (
    FP8_SLOTS,
    GROUPS,
    LATENT_TILES,
    ORDER,
    ROWS,
    SLOTS,
    TILES,
    Block,
)


def load(block: Block) -> None:
    """Brings bfloat16 pages."""
    table, rope = block.inputs.table, block.inputs.rope
    (latent,) = block.inputs.pool

    @block.for_each_piece
    def _(sequence, begin, end):
        _copy_queries(block, sequence)

        @pl.loop(0, pl.cdiv(end - begin, 2))
        def _(pair):
            for slot in range(SLOTS):
                page = table[sequence, lax.min(begin + 2 * pair + slot, end - 1)]
                for t in ORDER:
                    if t in GROUPS:
                        plgpu.barrier_wait(block.room(slot, t))
                    if t < LATENT_TILES:
                        source = latent.at[page, :, pl.ds(t * 64, 64)]
                    else:
                        source = rope.at[page]
                    full = block.shared.k_full.at[slot * TILES + t]
                    _copy(block, source, block.shared.k.at[slot, t], full)

    _await_the_end(block)


def load_fp8(block: Block) -> None:
    """Brings FP8 pages, each with its scales and rope, as slots become free."""
    inputs, shared = block.inputs, block.shared
    values, scales = inputs.pool

    def piece(sequence, begin, end, turn):
        def number(place):
            return inputs.table[sequence, lax.min(begin + place, end - 1)]

        def copy(place, page):
            following = number(place + 1)
            slot = lax.rem(turn + place, FP8_SLOTS)
            for half in block.groups:
                plgpu.barrier_wait(block.room(slot, half))
            full = shared.k_full.at[slot]
            for group in range(FP8_GROUPS):
                columns = pl.ds(group * 128, 128)
                _copy(block, values.at[page, :, columns], shared.k.at[slot, group], full)
            _copy(block, scales.at[page], shared.scales.at[slot], full)
            _copy(block, inputs.rope.at[page], shared.rope.at[slot], full)
            return following

        _copy_queries(block, sequence)
        lax.fori_loop(0, end - begin, copy, number(0))
        return turn + (end - begin)

    block.fold_pieces(piece, jnp.int32(0))
    _await_the_end(block)


def _copy_queries(block: Block, sequence) -> None:
    shared, inputs = block.shared, block.inputs
    plgpu.barrier_wait(shared.q_empty)
    for t in range(TILES):
        if t < LATENT_TILES:
            source, columns, tile = inputs.q_latent, pl.ds(t * 64, 64), shared.q.at[t]
        else:
            source, columns = inputs.q_rope, pl.ds(0, 64)
            tile = shared.q_rope.at[0] if block.call.fp8 else shared.q.at[t]
        rows = source.at[sequence, pl.ds(block.row, ROWS), columns]
        plgpu.copy_gmem_to_smem(rows, tile, shared.q_full)


def _copy(block: Block, source, room, full) -> None:
    axes = ("cluster",) if block.call.tuning.cluster > 1 else None
    plgpu.copy_gmem_to_smem(source, room, full, collective_axes=axes)


def _await_the_end(block: Block) -> None:
    plgpu.barrier_wait(block.shared.q_empty)
    for slot in range(FP8_SLOTS if block.call.fp8 else SLOTS):
        for group in block.groups:
            plgpu.barrier_wait(block.room(slot, group))
