"""The two warpgroups of a block of Hopper's paged attention that multiply, where pages are FP8.

Both products are transposed, so that the cache, converted in registers, is wgmma's first operand
(`fp8_pages`): scores are [64 tokens, 64 heads], and the output [512 columns, 64 heads], of which
each warpgroup holds half. Warpgroup 0 scores the even pages and warpgroup 1 the odd ones, and each
weighs its half of all of them, in order: the one that has scored a page first weighs the page
before, which the other has published meanwhile, and then publishes weights of its own. So they are
half a turn apart, and one has the tensor cores while the other works out weights.

A weight is published times its token's unit, over a power of two that a head's largest one sets: it
is at most 2^`rise`, and values are over their token's unit. That power moves only when a weight
would exceed 2^`rise`, which a vote of a warpgroup's threads finds out: a maximum over tokens is
across lanes and warps, and so is worked out only then. Pages are published in order, and what was
held before is changed to a page's power before that page is added.

Registers are as scarce as can be: beside 220 KB of shared memory a spill costs a trip to the L2
cache. So the vote comes before the weights, and not with them; ratios are in shared memory.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels.hopper import WGMMA, interpreted, plgpu
from dsv3_jax.kernels.mla_decode import columns, fp8_pages, wgmma
from dsv3_jax.kernels.mla_decode.combine import LOWEST
from dsv3_jax.kernels.mla_decode.hopper_block import FP8_SLOTS, HALF, LATENT_TILES, ROWS, Block
from dsv3_jax.kernels.mla_decode.hopper_softmax import LOG2_E
from dsv3_jax.kernels.mla_decode.kv_splits import PAGE


def attend(block: Block, me: int) -> None:
    """Scores the even or odd pages, and writes its half of the output of every piece."""
    shared = block.shared
    warpgroup = _Warpgroup(block, me)
    lowest = plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), columns.LAYOUT)
    shared.top[...] = lowest  # a number, so that the first `top` is one
    for slot in range(FP8_SLOTS):
        warpgroup.release(slot)
    plgpu.barrier_arrive(shared.q_empty)

    def piece(sequence, begin, end, turn):
        plgpu.barrier_wait(shared.q_full)
        fp8_pages.prepare_queries(shared.q.at[pl.ds(4 * me, 4)])
        warpgroup.meet()
        pairs = pl.cdiv(end - begin, 2)
        work = _Piece(block.inputs.lengths[sequence], begin, end, turn)
        zeros = plgpu.layout_cast(jnp.zeros((64, ROWS), jnp.float32), WGMMA)
        nothing = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), columns.LAYOUT)
        init = ((zeros,) * HALF, nothing)
        held = lax.fori_loop(0, pairs, functools.partial(warpgroup.pair, work), init)
        if me == 0:
            held = warpgroup.weigh_other(turn + 2 * pairs, held)
        warpgroup.store(sequence, begin, end, *held)
        return lax.rem(turn + 2 * pairs, FP8_SLOTS)

    block.fold_pieces(piece, jnp.int32(0))


@dataclass(frozen=True)
class _Piece:
    """What a piece's pairs share; `turn` is the slot of its first page."""

    length: Any
    begin: Any
    end: Any
    turn: Any


@dataclass(frozen=True)
class _Warpgroup:
    """One of the two, number `me`, while it is traced."""

    block: Block
    me: int

    def release(self, slot: Any) -> None:
        """Hands this warpgroup's half of a slot back to whoever loads."""
        columns.together(self.me)  # one thread speaks for all
        plgpu.barrier_arrive(self.block.room(slot, self.me))

    def pair(self, piece: _Piece, number, held):
        """Adds this warpgroup's page of a pair to what it holds, and first the other's last one."""
        shared, me = self.block.shared, self.me
        turn = piece.turn + 2 * number + me
        slot = lax.rem(turn, FP8_SLOTS)
        plgpu.barrier_wait(shared.k_full.at[slot])
        ratios, unit = fp8_pages.units(shared.scales.at[slot])
        fp8_pages.share(ratios, shared.ratios.at[slot])
        s = self.scores(slot, ratios, unit)
        weigh_other = functools.partial(self.weigh_other, turn)
        if me == 0:
            held = lax.cond(number > 0, weigh_other, lambda held: held, held)
        else:
            held = weigh_other(held)
        page = piece.begin + 2 * number + me
        s = self.block.masked(s, piece.length, page, piece.end, tokens=0)
        out, total = self.publish(number, s, unit, *held)
        return self.weigh(out, slot, me), total

    def publish(self, number, s, unit, out, total):
        """Weights of scores, for both warpgroups; what is held, over the same power of two."""
        shared, me, rise = self.block.shared, self.me, self.block.call.tuning.rise
        # Logits in log2, those of weights times units.
        scale = jnp.float32(self.block.call.scale * LOG2_E)
        x = s * _down(unit * scale) + _down(jnp.log2(unit))
        top = self.top(number)
        risen = columns.agree(columns.exceeds(x, top, rise), me)

        def keep(out, total, top, x):
            return out, total, top

        def raise_top(out, total, top, x):
            left = shared.columns.at[me]
            columns.leave_largest(x, left)
            columns.together(me)
            new = functools.reduce(jnp.maximum, _partials(left))
            new = jnp.where(new > top + rise, new, top)
            decay = jnp.exp2(top - new)
            shared.top[...] = new
            shared.decay[...] = decay
            return _decayed(out, decay), total * decay, new

        out, total, top = lax.cond(risen > 0, raise_top, keep, out, total, top, x)
        p = jnp.exp2(x - columns.across(top))
        columns.publish(shared.weights.at[me], p)
        total = columns.add(total, p, 1 / unit)
        shared.risen[me] = risen
        columns.together(me, commit=True)
        plgpu.barrier_arrive(shared.weights_ready.at[me])
        return out, total

    def weigh_other(self, turn, held):
        """What is held, with the page before `turn`, which the other warpgroup publishes."""
        shared, other, slot = self.block.shared, 1 - self.me, lax.rem(turn - 1, FP8_SLOTS)
        plgpu.barrier_wait(shared.k_full.at[slot])  # it has come, but each of its phases counts
        plgpu.barrier_wait(shared.weights_ready.at[other])

        def decayed(out, total):
            decay = plgpu.load(shared.decay, layout=columns.LAYOUT)
            return _decayed(out, decay), total * decay

        def same(out, total):
            return out, total

        out, total = lax.cond(shared.risen[other] > 0, decayed, same, *held)
        return self.weigh(out, slot, other), total

    def scores(self, slot, ratios, unit):
        """Products of a page with all queries, [64 tokens, 64 heads], over the tokens' units."""
        shared = self.block.shared
        page = shared.k.at[slot]
        s = (plgpu.layout_cast(jnp.zeros((PAGE, ROWS), jnp.float32), WGMMA),)
        fetched = fp8_pages.fetch_keys(page, 0)
        for half in range(LATENT_TILES):
            keys = fp8_pages.keys(fetched, ratios, half)
            if half + 1 < LATENT_TILES:
                fetched = fp8_pages.fetch_keys(page, half + 1)
            queries = shared.q.at[pl.ds(half, 1)]
            s = wgmma.multiply(
                s, keys, queries, b_rows_first=False, clear=half == 0, registers=True
            )
            wgmma.allow(1)
        keys = fp8_pages.rope_keys(shared.rope.at[slot], unit)
        s = wgmma.multiply(s, keys, shared.q_rope, b_rows_first=False, registers=True)
        ((s,),) = wgmma.wait(0, s)
        return s

    def top(self, number):
        """The running maxima before this warpgroup's page; before the first, the lowest number."""
        top = plgpu.load(self.block.shared.top, layout=columns.LAYOUT)
        if self.me == 1:
            return top
        return jnp.minimum(top, lax.select(number == 0, jnp.float32(LOWEST), jnp.float32(-LOWEST)))

    def weigh(self, out, slot, which):
        """The output with a page added, whose half is handed back."""
        shared, me = self.block.shared, self.me
        page, weights = shared.k.at[slot], shared.weights.at[pl.ds(which, 1)]
        out = list(out)
        fetched = fp8_pages.fetch_values(page, HALF * me)
        for tile in range(HALF):
            if tile % 2 == 0:
                factors = fp8_pages.factors(shared.ratios.at[slot], 2 * me + tile // 2)
            values = fp8_pages.values(fetched, factors)
            if tile + 1 < HALF:
                fetched = fp8_pages.fetch_values(page, HALF * me + tile + 1)
            (out[tile],) = wgmma.multiply(
                (out[tile],), values, weights, b_rows_first=True, registers=True
            )
            wgmma.allow(1)
        (out,) = wgmma.wait(0, tuple(out))
        self.release(slot)
        return out

    def meet(self) -> None:
        """Waits for the other warpgroup; what both have written is there."""
        if not interpreted():
            return columns.meet()
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.block.shared.met)
        plgpu.barrier_wait(self.block.shared.met)

    def store(self, sequence, begin, end, result, total) -> None:
        """Writes this warpgroup's half of a piece's result, and the first also its log-sum-exp."""
        out, lse, partial, partial_lse = self.block.outputs
        starts, me = self.block.inputs.starts, self.me
        shared = self.block.shared
        columns.leave(total, shared.columns.at[me])
        self.meet()
        left = [*_partials(shared.columns.at[0]), *_partials(shared.columns.at[1])]
        total = functools.reduce(jnp.add, left)
        top = plgpu.load(shared.top, layout=columns.LAYOUT)
        # The next piece may begin, and write what was read here.
        plgpu.barrier_arrive(shared.q_empty)
        rows = pl.ds(self.block.row, ROWS)
        some = total > 0
        factor = columns.across(jnp.where(some, 1 / jnp.where(some, total, 1.0), 0.0))
        result = [tile * factor for tile in result]
        log_sum = jnp.where(some, top + jnp.log2(jnp.where(some, total, 1.0)), LOWEST)
        whole = (begin == 0) & (end == starts[sequence + 1] - starts[sequence])

        @pl.when(whole)
        def _():
            for t, tile in enumerate(result):
                columns.store(out.at[sequence, rows, pl.ds((HALF * me + t) * 64, 64)], tile)
            if me == 0:
                lse[sequence, rows] = log_sum

        @pl.when(jnp.logical_not(whole))
        def _():
            kind = (begin == 0).astype(jnp.int32)
            for t, tile in enumerate(result):
                part = partial.at[kind, self.block.part, rows, pl.ds((HALF * me + t) * 64, 64)]
                columns.store(part, tile)
            if me == 0:
                partial_lse[kind, self.block.part, rows] = log_sum


def _partials(left) -> list[Any]:
    """What the warps have left of a vector of columns."""
    return [plgpu.load(left.at[i], layout=columns.LAYOUT) for i in range(columns.partials())]


def _decayed(out, decay):
    factor = columns.across(decay)
    return tuple(tile * factor for tile in out)


def _down(tokens):
    """A number for each token as an array [64 tokens, 64 heads]."""
    return lax.broadcast_in_dim(tokens, (PAGE, ROWS), [0])
