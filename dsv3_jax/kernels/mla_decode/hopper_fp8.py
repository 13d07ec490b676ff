"""The three warpgroups of a block of Hopper's paged attention that compute, where pages are FP8.

One scores pages and works out weights; each of two others weighs its half of the values. Scores of
a page are under way while the weights of the one before are worked out, and while those are, the
two weigh what was published: the tensor cores have work from all three.

Both products are transposed, so that the page is the first operand: scores are [64 tokens, heads],
and the output [512 columns, heads], 64 of these or as many sixteens as there are. Scores are
products of FP8 numbers: a query is held as two of them (`fp8_pages`), for twice the products at
twice bfloat16's rate, and nothing of a page is converted. Values become float16 in registers,
exactly, where weights are float16.

A weight is published times its token's scale, over a power of two that a head's largest one sets:
it is at most 2^`HIGHEST`. That power moves only when a weight would exceed this, which a vote of
the threads finds out when a page's weights are written; then they are written once more. A maximum
over tokens is across lanes and warps, and so is worked out only then. What was weighed before a
page is changed to its power before it is added.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels.hopper import WGMMA, plgpu
from dsv3_jax.kernels.mla_decode import columns, fp8_pages, wgmma
from dsv3_jax.kernels.mla_decode.combine import LOWEST
from dsv3_jax.kernels.mla_decode.hopper_block import FP8_SLOTS, HALF, Block
from dsv3_jax.kernels.mla_decode.hopper_softmax import LOG2_E
from dsv3_jax.kernels.mla_decode.kv_splits import PAGE

SCORER = 2  # the number of the warpgroup; those that weigh are 0 and 1
BUFFERS = 2  # of weights, which pages have in turn
# Of a page's 32 products with all queries, how many are issued one after the other, each time: at
# first, beside each step of `publish`, and at the end.
AT_ONCE = (2, 4, 4, 4, 4, 14)
HIGHEST = 15.0  # of a weight's exponent: float16 ends at 65,504
RAISED = 7.0  # the exponent that a head's largest weight gets where the power moves
SMALLEST = 2.0**-60  # of a token's scale: it, and one over it, are far from float32's ends


def score(block: Block) -> None:
    """Publishes the weights of every page, and the sums of every piece's."""
    shared = block.shared
    plgpu.barrier_arrive(shared.q_empty)

    def piece(sequence, begin, end, place):
        plgpu.barrier_wait(shared.q_full)
        fp8_pages.leave_largest(shared.q, shared.q_rope.at[0], shared.largest)
        columns.together(SCORER)
        unit = fp8_pages.query_unit(shared.largest)
        fp8_pages.split_queries(shared.q, unit)
        fp8_pages.scale_rope(shared.q_rope.at[0], unit)
        columns.together(SCORER, commit=True)
        scorer = _Scorer(block, block.inputs.lengths[sequence], begin, end, unit)
        plgpu.barrier_wait(shared.sums_free)
        shared.top[: block.columns] = columns.nothing(block.columns)
        columns.together(SCORER)
        plgpu.barrier_wait(shared.k_full.at[place.slot])
        made = list(scorer.products(place.slot))[-1]
        exponents = scorer.exponents(0, place.slot, made)
        carry = place, exponents, columns.nothing(block.columns)
        place, _, sums = lax.fori_loop(0, end - begin, scorer.page, carry)
        plgpu.barrier_arrive(shared.q_empty)
        columns.leave(sums, shared.columns)
        columns.together(SCORER)
        plgpu.barrier_arrive(shared.sums_ready)
        return place

    block.fold_pieces(piece, _Place.first())
    plgpu.barrier_wait(shared.sums_free)  # each of its phases counts
    for buffer in range(BUFFERS):
        plgpu.barrier_wait(shared.weights_free.at[buffer])


class _Place(NamedTuple):
    """Where a page lies, and its weights; pages take slots and buffers in turn."""

    slot: Any
    buffer: Any

    @classmethod
    def first(cls) -> "_Place":
        """That of a block's first page."""
        return cls(jnp.int32(0), jnp.int32(0))

    def following(self) -> "_Place":
        """That of the page after this one."""
        slot = lax.select(self.slot == FP8_SLOTS - 1, jnp.int32(0), self.slot + 1)
        return _Place(slot, 1 - self.buffer)


@dataclass(frozen=True)
class _Scorer:
    """The warpgroup that scores, in a piece; `unit` is its queries'."""

    block: Block
    length: Any
    begin: Any
    end: Any
    unit: Any

    def page(self, number, carry):
        """Publishes a page's weights, adds them up, and makes the exponents of the next one's.

        Products of the next one are issued a few at a time: a warp that issues one waits until the
        one before has begun, and so would do nothing else meanwhile.
        """
        place, (x, scale), sums = carry
        following = place.following()

        @pl.when(number + 1 < self.end - self.begin)
        def _():
            plgpu.barrier_wait(self.block.shared.k_full.at[following.slot])

        products = self.products(following.slot)  # of nothing, after the last page
        next(products)
        beside = functools.partial(next, products)
        sums = self.publish(number, place.buffer, x, scale, sums, beside)
        made = list(products)[-1]
        return following, self.exponents(number + 1, following.slot, made), sums

    def products(self, slot):
        """Issues some of a page's products with all queries at each step; returns those so far."""
        shared = self.block.shared
        steps, first = fp8_pages.SCORE_STEPS, 0
        made: Any = self.block.columns
        for count in AT_ONCE:
            here = steps[first : first + count]
            made = wgmma.multiply_fp8(made, shared.k.at[slot], shared.q, here)
            first += count
            yield made
        assert first == len(steps)
        # To the same sums, as rotated keys and queries are over the scales of the others.
        keys, queries = shared.rope.at[slot], shared.q_rope
        yield wgmma.multiply(made, keys, queries, b_rows_first=False)

    def exponents(self, number, slot, products):
        """Of a page's weights [64 tokens, heads] by the power so far, and the tokens' scales."""
        scale = plgpu.load(self.block.shared.scales.at[slot], layout=columns.ROWS)
        scale = jnp.maximum(scale, jnp.float32(SMALLEST))
        of_logits = jnp.float32(self.block.call.scale * LOG2_E)
        factor, start = scale * self.unit * of_logits, jnp.log2(scale)
        top = self.block.vector(self.block.shared.top)
        ((x,),) = wgmma.wait(0, products)
        x = columns.fold(x, factor, start, top)
        x = self.block.masked(x, self.length, self.begin + number, self.end, tokens=0)
        return x, scale

    def publish(self, number, buffer, x, scale, sums, beside: Callable[[], Any]) -> Any:
        """Hands a page's weights over; returns the lanes' shares of the sums with them.

        `beside` issues what is to be under way meanwhile.
        """
        shared, first = self.block.shared, number == 0
        plgpu.barrier_wait(shared.weights_free.at[buffer])
        shares, largest = self.write(buffer, x, scale, beside)
        risen = jnp.where(first, 1, columns.exceeds(largest, HIGHEST, SCORER))
        shared.risen[buffer] = risen

        def hand_over():
            plgpu.barrier_arrive(shared.weights_ready.at[buffer])
            return sums + shares

        def raise_top():
            columns.leave_largest(x, shared.columns)
            columns.together(SCORER)
            largest = functools.reduce(jnp.maximum, _partials(self.block))
            # A head that sees nothing of a piece's first page sees nothing of the others.
            limit = lax.select(first, jnp.float32(LOWEST), jnp.float32(HIGHEST))
            step = jnp.where(largest > limit, largest - RAISED, 0.0)
            top = self.block.vector(shared.top)
            columns.together(SCORER)  # all have read what is overwritten
            shared.top[: self.block.columns] = top + step
            decay = jnp.exp2(-lax.select(first, jnp.float32(0), jnp.float32(1)) * step)
            shared.decay[buffer, : self.block.columns] = decay
            shares, _ = self.write(buffer, x - columns.across(step), scale)
            columns.together(SCORER, commit=True)
            plgpu.barrier_arrive(shared.weights_ready.at[buffer])
            return sums * decay + shares

        return lax.cond(risen > 0, raise_top, hand_over)

    def write(
        self, buffer, x, scale, beside: Callable[[], Any] = lambda: None
    ) -> columns.Published:
        """Writes the weights of exponents x."""
        weights, over = self.block.shared.weights.at[buffer], 1 / scale
        made = columns.nothing_published(self.block.columns)
        for quarter in range(self.block.columns // 16):
            made = columns.publish(weights, x, made, over, quarter)
            beside()
        return made


def weigh(block: Block, me: int) -> None:
    """Writes its half of the output of every piece."""
    shared = block.shared
    columns.together(me)  # one thread speaks for all
    for slot in range(FP8_SLOTS):
        plgpu.barrier_arrive(block.room(slot, me))
    for buffer in range(BUFFERS):
        plgpu.barrier_arrive(shared.weights_free.at[buffer])
    plgpu.barrier_arrive(shared.sums_free)
    weigher = _Weigher(block, me)

    def piece(sequence, begin, end, place):
        zeros = plgpu.layout_cast(jnp.zeros((64, block.columns), jnp.float32), WGMMA)
        place, out = lax.fori_loop(0, end - begin, weigher.page, (place, (zeros,) * HALF))
        weigher.store(sequence, begin, end, out)
        return place

    block.fold_pieces(piece, _Place.first())


@dataclass(frozen=True)
class _Weigher:
    """One of the warpgroups that weigh, number `me`, while it is traced."""

    block: Block
    me: int

    def page(self, _, carry):
        """The output with a page added."""
        place, out = carry
        shared, me = self.block.shared, self.me
        plgpu.barrier_wait(shared.weights_ready.at[place.buffer])  # and so the page itself is there

        def decayed(out):
            decay = self.block.vector(shared.decay.at[place.buffer])
            return tuple(tile * columns.across(decay) for tile in out)

        out = list(lax.cond(shared.risen[place.buffer] > 0, decayed, lambda out: out, out))
        weights = shared.weights.at[pl.ds(place.buffer, 1)]
        page = shared.k.at[place.slot]
        pieces = [(tile, start) for tile in range(HALF) for start in (0, PAGE // 2)]

        def fetch(number):
            tile, start = pieces[number]
            return fp8_pages.fetch(page, HALF * me + tile, start)

        fetched = fetch(0)
        for number, (tile, start) in enumerate(pieces):
            values = fp8_pages.as_values(fetched)
            if number + 1 < len(pieces):
                fetched = fetch(number + 1)
            (out[tile],) = wgmma.multiply(
                (out[tile],), values, weights, b_rows_first=True, registers=True, start=start
            )
            wgmma.allow(1)
        columns.together(me)  # one thread speaks for all
        plgpu.barrier_arrive(self.block.room(place.slot, me))
        (out,) = wgmma.wait(0, tuple(out))
        columns.together(me)
        plgpu.barrier_arrive(shared.weights_free.at[place.buffer])
        return place.following(), out

    def store(self, sequence, begin, end, result) -> None:
        """Writes this warpgroup's half of a piece's result, and the first also its log-sum-exp."""
        out, lse, partial, partial_lse = self.block.outputs
        starts, me = self.block.inputs.starts, self.me
        shared = self.block.shared
        plgpu.barrier_wait(shared.sums_ready)
        total = functools.reduce(jnp.add, _partials(self.block))
        top = self.block.vector(shared.top)
        columns.together(me)
        plgpu.barrier_arrive(shared.sums_free)
        rows = pl.ds(self.block.row, self.block.columns)
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


def _partials(block: Block) -> list[Any]:
    """What the warps have left of a vector of columns."""
    return [block.vector(block.shared.columns.at[i]) for i in range(columns.partials())]
