"""The two warpgroups of a block of Hopper's paged attention that multiply.

Pages come in pairs. Warpgroup 0 scores the even page and warpgroup 1 the odd one; each holds half
of the output's columns, and so needs the weights of both pages: they are handed over in shared
memory. The running maximum of a pair's odd page starts from that of its even one.
"""

import functools
import math
from dataclasses import dataclass

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels.hopper import WGMMA, interpreted, plgpu
from dsv3_jax.kernels.mla_decode import wgmma
from dsv3_jax.kernels.mla_decode.combine import LOWEST
from dsv3_jax.kernels.mla_decode.hopper_block import (
    HALF,
    ORDER,
    ROPE_TILE,
    ROWS,
    TILES,
    Block,
)

LOG2_E = math.log2(math.e)
LANES = WGMMA.reduce(1)


def attend(block: Block, me: int) -> None:
    """Scores the pages of slot `me`, and writes its half of the output of every piece."""
    shared = block.shared
    warpgroup = _Warpgroup(block, me)
    # What this warpgroup hands back, it owns at first.
    warpgroup.release(me, ROPE_TILE)
    for slot in range(2):
        warpgroup.release(slot, HALF * me)
    plgpu.barrier_arrive(shared.q_empty)

    @block.for_each_piece
    def _(sequence, begin, end):
        plgpu.barrier_wait(shared.q_full)
        zeros = (_zeros(),) * HALF
        lowest = plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), LANES)
        nothing = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), LANES)
        length = block.inputs.lengths[sequence]
        pair = (warpgroup.even_pair, warpgroup.odd_pair)[me]
        result, m, total = lax.fori_loop(
            0,
            pl.cdiv(end - begin, 2),
            functools.partial(pair, length, begin, end),
            (zeros, lowest, nothing),
        )
        plgpu.barrier_arrive(shared.q_empty)
        # The other warpgroup's share of the sum.
        shared.rows[2 + me] = total
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.weights_ready.at[2 + me])
        plgpu.barrier_wait(shared.weights_ready.at[3 - me])
        total = total + plgpu.load(shared.rows.at[3 - me], layout=LANES)
        warpgroup.store(sequence, begin, end, result, m, total)


@dataclass(frozen=True)
class _Warpgroup:
    """One of the two, number `me`, while it is traced."""

    block: Block
    me: int

    def release(self, slot: int, group: int) -> None:
        """Hands a group of a slot's tiles back to whoever loads."""
        wgmma.synchronize()  # one thread speaks for all
        plgpu.barrier_arrive(self.block.room(slot, group))

    def scores(self, length, page, end):
        """Products of all queries with the page in this warpgroup's slot.

        -inf where a token must not look, and all over from page `end` on.
        """
        shared, me = self.block.shared, self.me
        s = (_zeros(),)
        for t in ORDER:
            plgpu.barrier_wait(shared.k_full.at[me * TILES + t])
            s = wgmma.multiply(
                s,
                shared.q.at[t],
                shared.k.at[me, pl.ds(t, 1)],
                b_rows_first=False,
                clear=t == ORDER[0],
            )
        ((s,),) = wgmma.wait(0, s)
        self.release(me, ROPE_TILE)
        return self.block.masked(s, length, page, end, tokens=1)

    def largest(self, s):
        """Each row's largest logit, in log2."""
        return jnp.max(s, axis=1) * jnp.float32(self.block.call.scale * LOG2_E)

    def weights(self, s, m):
        """Weights of the logits before scaling, over 2^m."""
        return jnp.exp2(s * jnp.float32(self.block.call.scale * LOG2_E) - _across(m))

    def risen(self, m, s_max):
        """The running maximum, moved only where the new one exceeds it by enough."""
        return jnp.where(s_max > m + self.block.call.tuning.rise, s_max, m)

    def publish(self, p) -> None:
        """Hands this warpgroup's weights to the other (interpreted, also to itself)."""
        self.block.shared.weights[...] = p
        if interpreted():
            self.block.shared.own_weights[self.me] = p

    def weigh(self, out, p, slot: int):
        """out + p @ this warpgroup's half of the page in a slot, not complete."""
        shared = self.block.shared
        registers = p is not shared.weights
        if registers and interpreted():
            p = shared.own_weights.at[self.me]
        half = shared.k.at[slot, pl.ds(HALF * self.me, HALF)]
        return wgmma.multiply(out, p, half, b_rows_first=True, registers=registers)

    def finish(self, out, slot: int):
        """`out`, complete; hands back this warpgroup's half of the page."""
        (out,) = wgmma.wait(0, out)
        self.release(slot, HALF * self.me)
        return out

    def even_pair(self, length, begin, end, pair, carry):
        """Adds a pair of pages to what warpgroup 0 holds."""
        shared = self.block.shared
        out, m, total = carry
        s = self.scores(length, begin + 2 * pair, end)
        m_even = self.risen(m, self.largest(s))
        p = self.weights(s, m_even)
        shared.rows[0] = m_even
        low_p = p.astype(jnp.bfloat16)
        self.publish(low_p)
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.weights_ready.at[0])
        decay = jnp.exp2(m - m_even)
        total = total * decay + jnp.sum(p, axis=1)
        out = wgmma.scale_rows(out, decay)
        out = self.weigh(out, low_p, 0)
        out = self.finish(out, 0)
        plgpu.barrier_wait(shared.weights_ready.at[1])
        m_odd = plgpu.load(shared.rows.at[1], layout=LANES)
        decay = jnp.exp2(m_even - m_odd)
        out = wgmma.scale_rows(out, decay)
        out = self.finish(self.weigh(out, shared.weights, 1), 1)
        return out, m_odd, total * decay

    def odd_pair(self, length, begin, end, pair, carry):
        """Adds a pair of pages to what warpgroup 1 holds."""
        shared = self.block.shared
        out, m, total = carry
        s = self.scores(length, begin + 2 * pair + 1, end)
        s_max = self.largest(s)
        plgpu.barrier_wait(shared.weights_ready.at[0])
        m_even = plgpu.load(shared.rows.at[0], layout=LANES)
        decay_even = jnp.exp2(m - m_even)
        out = wgmma.scale_rows(out, decay_even)
        out = self.weigh(out, shared.weights, 0)
        # The softmax runs while the product above does.
        m_odd = self.risen(m_even, s_max)
        p = self.weights(s, m_odd)
        decay_odd = jnp.exp2(m_even - m_odd)
        total = total * decay_even * decay_odd + jnp.sum(p, axis=1)
        low_p = p.astype(jnp.bfloat16)
        out = self.finish(out, 0)
        shared.rows[1] = m_odd
        self.publish(low_p)
        plgpu.commit_smem()
        plgpu.barrier_arrive(shared.weights_ready.at[1])
        out = wgmma.scale_rows(out, decay_odd)
        out = self.weigh(out, low_p, 1)
        out = self.finish(out, 1)
        return out, m_odd, total

    def store(self, sequence, begin, end, result, m, total) -> None:
        """Writes this warpgroup's half of a piece's result, and the first also its log-sum-exp."""
        out, lse, partial, partial_lse = self.block.outputs
        starts, me = self.block.inputs.starts, self.me
        rows = pl.ds(self.block.row, ROWS)
        some = total > 0
        result = _scaled(result, jnp.where(some, 1 / jnp.where(some, total, 1.0), 0.0))
        log_sum = jnp.where(some, m + jnp.log2(jnp.where(some, total, 1.0)), LOWEST)
        whole = (begin == 0) & (end == starts[sequence + 1] - starts[sequence])

        @pl.when(whole)
        def _():
            for t in range(HALF):
                columns = pl.ds((HALF * me + t) * 64, 64)
                out[sequence, rows, columns] = result[t].astype(jnp.bfloat16)
            if me == 0:
                lse[sequence, rows] = log_sum

        @pl.when(jnp.logical_not(whole))
        def _():
            kind = (begin == 0).astype(jnp.int32)
            for t in range(HALF):
                columns = pl.ds((HALF * me + t) * 64, 64)
                partial[kind, self.block.part, rows, columns] = result[t]
            if me == 0:
                partial_lse[kind, self.block.part, rows] = log_sum


def _zeros():
    return plgpu.layout_cast(jnp.zeros((ROWS, 64), jnp.float32), WGMMA)


def _across(row):
    return lax.broadcast_in_dim(row, (ROWS, 64), [0])


def _scaled(tiles, factor):
    return tuple(tile * _across(factor) for tile in tiles)
