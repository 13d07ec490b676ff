"""The warpgroup of a block of Hopper's paged attention that brings queries and pages."""

import jax.experimental.pallas as pl
from jax import lax

from dsv3_jax.kernels.hopper import plgpu
from dsv3_jax.kernels.mla_decode import fp8_pages
from dsv3_jax.kernels.mla_decode.hopper_block import (
    GROUPS,
    HALF,
    LATENT_TILES,
    ORDER,
    ROPE_TILE,
    ROWS,
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
            for slot in range(2):
                page = table[sequence, lax.min(begin + 2 * pair + slot, end - 1)]
                for t in ORDER:
                    if t in GROUPS:
                        plgpu.barrier_wait(block.room(slot, t))
                    if t < LATENT_TILES:
                        source = latent.at[page, :, pl.ds(t * 64, 64)]
                    else:
                        source = rope.at[page]
                    _copy(block, source, slot, t)

    _await_the_end(block)


def load_and_convert(block: Block) -> None:
    """Brings FP8 pages; a half of one is converted while the next one is loaded."""
    inputs, shared = block.inputs, block.shared
    pool, rope, table = inputs.pool, inputs.rope, inputs.table

    @block.for_each_piece
    def _(sequence, begin, end):
        def number(place):
            page = table[sequence, lax.min(place, end - 1)]
            # An empty sequence has none, and a load, unlike TMA, must not miss the pool.
            return lax.clamp(0, page, rope.shape[0] - 1)

        def copy_rope(page, slot):
            plgpu.barrier_wait(block.room(slot, ROPE_TILE))
            _copy(block, rope.at[page], slot, ROPE_TILE)

        def convert(index, carry):
            page, following, next_but_one, low_half = carry
            slot = lax.rem(index, 2)

            def store(half, numbers):
                plgpu.barrier_wait(block.room(slot, HALF * half))
                for unit in (2 * half, 2 * half + 1):
                    fp8_pages.store(shared.k.at[slot], unit, numbers)
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(shared.k_ready.at[slot * TILES + 2 * unit])

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
        _copy_queries(block, sequence)
        copy_rope(numbers[0], 0)
        lax.fori_loop(0, count, convert, (*numbers, low_half))

    _await_the_end(block)


def _copy_queries(block: Block, sequence) -> None:
    plgpu.barrier_wait(block.shared.q_empty)
    for t in range(TILES):
        source = block.inputs.q_latent if t < LATENT_TILES else block.inputs.q_rope
        columns = pl.ds(t * 64 if t < LATENT_TILES else 0, 64)
        plgpu.copy_gmem_to_smem(
            source.at[sequence, pl.ds(block.row, ROWS), columns],
            block.shared.q.at[t],
            block.shared.q_full,
        )


def _copy(block: Block, source, slot, tile) -> None:
    plgpu.copy_gmem_to_smem(
        source,
        block.shared.k.at[slot, tile],
        block.shared.k_full.at[slot * TILES + tile],
        collective_axes=("cluster",) if block.call.tuning.cluster > 1 else None,
    )


def _await_the_end(block: Block) -> None:
    plgpu.barrier_wait(block.shared.q_empty)
    for slot in range(2):
        for group in GROUPS:
            plgpu.barrier_wait(block.room(slot, group))
