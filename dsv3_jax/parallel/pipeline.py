"""The pipeline's executor: one SPMD program that runs the tables of a schedule over `pipe`.

A scan over ticks. In each, a rank does what its row of the tables says, layer by layer, hands its
result to its neighbours (ppermute), and puts away what came. Every kind of work is a loop, which
runs as often as this rank's stage wants it in this tick, mostly never; how often differs between
ranks of `pipe` alone, so that collectives over other axes are sound inside of them: whole groups
make the same turns. Loops, and no branches of a conditional: XLA copies whole buffers at the end
of a branch that reads them, and here those hold all that is kept. What is computed, and kept for a
later act, is the caller's (`Work`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.parallel.ticks import BACKWARD, IDLE, INPUT_BACKWARD, WEIGHT_BACKWARD, TickTables

Message = Float[Array, "B T D"]
Totals = Any  # gradients and statistics that acts add to
Buffers = Any  # what acts keep for later ones, in slots


class Place(NamedTuple):
    """Of which stage and micro-batch an act is, and the slots that it reads and writes.

    Fields:
        chunk: which of the rank's stages.
        microbatch: whose turn it is.
        saved: of what its forward keeps for both backward passes, one of tables.num_saved.
        pending: of what the gradient of its input leaves for that of the weights, one of
            tables.num_pending.
    """

    chunk: Int[Array, ""]
    microbatch: Int[Array, ""]
    saved: Int[Array, ""]
    pending: Int[Array, ""]


class Work(NamedTuple):
    """One kind of work of an act, such as the forward of a layer.

    Fields:
        op: the act, FORWARD, INPUT_BACKWARD or WEIGHT_BACKWARD.
        counts: how often each stage wants it, by rank and chunk.
        backward: whether a stage's layers are taken from the last to the first.
        run: (totals, buffers, place, layer, x) to (totals, buffers, x), functions of arrays, alike
            on all ranks; x is a micro-batch's hidden states or their gradient.
        name: of the loop, in what compiled programs say of where an operation comes from.
    """

    op: int
    counts: Int[np.ndarray, "ranks chunks"]
    backward: bool
    run: Callable[[Totals, Buffers, Place, Any, Message], tuple[Totals, Buffers, Message]]
    name: str = "work"


def run_ticks(
    tables: TickTables,
    works: Sequence[Work],
    totals: Totals,
    buffers: Buffers,
    message: jax.ShapeDtypeStruct,
    num_microbatches: Int[Array, ""],
    edge: Callable[[Array, Place, Message], Message] = lambda op, place, x: x,
    axis: str = "pipe",
) -> Totals:
    """The totals of this rank after all ticks; inside a shard_map that is manual over `axis`.

    `message` is what ranks hand over, hidden states and their gradients alike. Micro-batches from
    num_microbatches on are left out: their ticks pass idle. An act's works are done in their order.
    Buffers and messages have as many slots as the tables say. `edge` is called with what a tick
    begins with and what it ends with. The works of INPUT_BACKWARD come before those of
    WEIGHT_BACKWARD, whose x is handed over as it is.
    """
    rank = lax.axis_index(axis)
    rows = {name: jnp.asarray(table)[:, rank] for name, table in tables.columns().items()}
    counts = [jnp.asarray(work.counts, jnp.int32)[rank] for work in works]
    size = lax.axis_size(axis)
    down = [(r, (r + 1) % size) for r in range(size)]
    up = [(r, (r - 1) % size) for r in range(size)]

    def tick(carry, row):
        totals, buffers, mail = carry
        place = Place(**{name: row[name] for name in Place._fields})
        op = jnp.where(place.microbatch < num_microbatches, row["op"], IDLE)
        x = edge(op, place, read_slot(mail, row["received"]))
        carry = totals, buffers, x
        for work, of_rank in zip(works, counts):
            count = jnp.where(_is_part(work.op, op), of_rank[place.chunk], 0)

            def turn(number, carry, work=work, count=count):
                totals, buffers, x = carry
                layer = count - 1 - number if work.backward else number
                return work.run(totals, buffers, place, layer, x)

            with jax.named_scope(work.name):
                carry = lax.fori_loop(0, count, turn, carry)
        totals, buffers, x = carry
        x = edge(op, place, x)
        mail = write_slot(mail, lax.ppermute(x, axis, down), row["from_above"])
        mail = write_slot(mail, lax.ppermute(x, axis, up), row["from_below"])
        mail = write_slot(mail, x, row["from_self"])
        return (totals, buffers, mail), None

    mail = empty_slots(message, tables.num_mail + 1)
    (totals, _, _), _ = lax.scan(tick, (totals, buffers, mail), rows)
    return totals


def _is_part(work: int, op: Int[Array, ""]) -> Array:
    """Whether an act is of this kind, or has it as a part."""
    is_whole = op == BACKWARD if work in (INPUT_BACKWARD, WEIGHT_BACKWARD) else False
    return (op == work) | is_whole


def empty_slots(shapes: Any, *counts: int) -> Any:
    """Zeros for `counts` (slots, or slots and layers) of each shape of a tree."""
    return jax.tree.map(lambda s: jnp.zeros((*counts, *s.shape), s.dtype), shapes)


def read_slot(tree: Any, *where: Any) -> Any:
    """Each leaf's part at these indices of its first dims, which are within bounds."""
    return jax.tree.map(lambda leaf: _slice(leaf, where).reshape(leaf.shape[len(where) :]), tree)


def write_slot(tree: Any, value: Any, *where: Any) -> Any:
    """The tree with a value at these indices of its leaves' first dims, written in place by XLA."""

    def write(leaf, part):
        part = part.reshape((1,) * len(where) + part.shape)
        return lax.dynamic_update_slice(leaf, part, _start(leaf, where))

    return jax.tree.map(write, tree, value)


def _slice(leaf: Array, where: tuple) -> Array:
    return lax.dynamic_slice(
        leaf, _start(leaf, where), (1,) * len(where) + leaf.shape[len(where) :]
    )


def _start(leaf: Array, where: tuple) -> tuple:
    zero = jnp.int32(0)
    return *(jnp.asarray(i, jnp.int32) for i in where), *(zero for _ in leaf.shape[len(where) :])
