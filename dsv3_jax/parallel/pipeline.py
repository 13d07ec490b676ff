"""The pipeline's executor: one SPMD program that runs the tables of a schedule over `pipe`.

A scan over ticks; in each, a rank does what its row of the tables says (a switch), hands its result
to its neighbours (ppermute), and puts away what came. The branches of the switch differ between
ranks of `pipe` alone, so that collectives over other axes are sound inside of them: whole groups
take the same branch. What is computed is the caller's (`RankActs`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.parallel.ticks import IDLE, TickTables

Message = Float[Array, "B T D"]
Totals = Any  # gradients and statistics that acts add to


class RankActs(NamedTuple):
    """What a rank does with a micro-batch in one of its stages, `chunk`.

    Functions of traced integers and arrays, alike on all ranks; they thread the totals through.
    """

    # (totals, chunk, microbatch, x) to (totals, y, what both backward passes need of it)
    forward: Callable[..., tuple[Totals, Message, Any]]
    # (totals, chunk, microbatch, saved, dy) to (totals, dx, what the weights' gradient needs)
    input_backward: Callable[..., tuple[Totals, Message, Any]]
    # (totals, chunk, microbatch, saved, for_weights) to totals
    weight_backward: Callable[..., Totals]


def run_ticks(
    tables: TickTables,
    acts: RankActs,
    totals: Totals,
    message: jax.ShapeDtypeStruct,
    num_microbatches: Int[Array, ""],
    axis: str = "pipe",
) -> Totals:
    """The totals of this rank after all ticks; inside a shard_map that is manual over `axis`.

    `message` is what ranks hand over, hidden states and their gradients alike. Micro-batches from
    num_microbatches on are left out: their ticks pass idle. Of what is saved, and of messages,
    there are as many slots as the tables say.
    """
    rank = lax.axis_index(axis)
    rows = {name: jnp.asarray(table)[:, rank] for name, table in tables.columns().items()}
    number = jax.ShapeDtypeStruct((), jnp.int32)
    _, _, saved = jax.eval_shape(acts.forward, totals, number, number, message)
    backward = (totals, number, number, saved, message)
    _, _, for_weights = jax.eval_shape(acts.input_backward, *backward)

    def slots(shapes: Any, count: int) -> Any:
        return jax.tree.map(lambda s: jnp.zeros((count, *s.shape), s.dtype), shapes)

    nothing = jnp.zeros(message.shape, message.dtype)

    def idle(totals, buffers, row, received):
        return totals, buffers, nothing

    def forward(totals, buffers, row, received):
        totals, y, saved = acts.forward(totals, row["chunk"], row["microbatch"], received)
        return totals, (_put(buffers[0], row["saved"], saved), buffers[1]), y

    def input_backward(totals, buffers, row, received):
        saved = _take(buffers[0], row["saved"])
        where = row["chunk"], row["microbatch"]
        totals, dx, for_weights = acts.input_backward(totals, *where, saved, received)
        return totals, (buffers[0], _put(buffers[1], row["saved"], for_weights)), dx

    def weight_backward(totals, buffers, row, received):
        kept = (_take(buffer, row["saved"]) for buffer in buffers)
        totals = acts.weight_backward(totals, row["chunk"], row["microbatch"], *kept)
        return totals, buffers, nothing

    branches = [idle, forward, input_backward, weight_backward]
    size = lax.axis_size(axis)
    down = [(r, (r + 1) % size) for r in range(size)]
    up = [(r, (r - 1) % size) for r in range(size)]

    def tick(carry, row):
        totals, buffers, mail = carry
        op = jnp.where(row["microbatch"] < num_microbatches, row["op"], IDLE)
        received = mail[row["received"]]
        totals, buffers, result = lax.switch(op, branches, totals, buffers, row, received)
        mail = mail.at[row["from_above"]].set(lax.ppermute(result, axis, down))
        mail = mail.at[row["from_below"]].set(lax.ppermute(result, axis, up))
        mail = mail.at[row["from_self"]].set(result)
        return (totals, buffers, mail), None

    buffers = slots(saved, tables.num_saved), slots(for_weights, tables.num_saved)
    mail = slots(message, tables.num_mail + 1)
    (totals, _, _), _ = lax.scan(tick, (totals, buffers, mail), rows)
    return totals


def _put(buffer: Any, slot: Array, value: Any) -> Any:
    return jax.tree.map(lambda b, v: b.at[slot].set(v), buffer, value)


def _take(buffer: Any, slot: Array) -> Any:
    return jax.tree.map(lambda b: b[slot], buffer)
